"""The student alone: cross entropy, no teachers.

    python launch/main.py --config=configs/ce_only.py:digits   # handwritten digits, under a minute on two CPU cores
    python launch/main.py --config=configs/ce_only.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/ce_only.py:small    # CIFAR-100 on a CPU; docs/results.md
    python launch/main.py --config=configs/ce_only.py          # CIFAR-100 at full scale

Expect the accuracy every other config has to beat; no teacher is loaded or trained.
"""

from configs import base


def get_config(profile: str = ""):
    """`configs/base.py` with the changes below."""
    config = base.get_config(profile)
    config.ce_alpha, config.kd_alpha = 1.0, 0.0
    config.teacher_adapt_epochs = 0
    return config
