"""L0: distillation from the average of the teachers' logits, no A-Step.

    python launch/main.py --config=configs/l0_baseline.py:digits   # handwritten digits, about a minute on two cores
    python launch/main.py --config=configs/l0_baseline.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/l0_baseline.py:small    # CIFAR-100 on a CPU, weights needed: README.md
    python launch/main.py --config=configs/l0_baseline.py          # CIFAR-100 at full scale

The parent of the ladder; no fusion network is built.
"""

from configs import base


def get_config(profile: str = ""):
    """`configs/base.py` with the changes below."""
    config = base.get_config(profile)
    config.kd_target = "avg"
    config.teacher_adapt_epochs = 0
    return config
