"""The fusion network without a bottleneck: L0 plus the A-Step and the synergy target.

    python launch/main.py --config=configs/side_fusion.py:digits   # handwritten digits, about a minute on two cores
    python launch/main.py --config=configs/side_fusion.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/side_fusion.py:small    # CIFAR-100 on a CPU, weights needed: README.md
    python launch/main.py --config=configs/side_fusion.py          # CIFAR-100 at full scale

Differs from `l0_baseline` in kd_target, teacher_adapt_epochs, synergy_base and ib_mbm_kv.
"""

from configs import base


def get_config(profile: str = ""):
    """`configs/base.py` with the changes below."""
    config = base.get_config(profile)
    config.use_ib = False
    config.synergy_base = "none"
    config.ib_mbm_kv = "feat"
    return config
