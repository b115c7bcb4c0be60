"""The student alone: cross entropy, no teachers.

    python launch/main.py --config=configs/ce_only.py          # CIFAR-100 at full scale
    python launch/main.py --config=configs/ce_only.py:digits   # on a laptop

Expect the lowest student accuracy of the ladder; no teacher is loaded.
"""
from configs import base


def get_config(profile: str = ""):
    """`configs/base.py` with the changes below."""
    config = base.get_config(profile)
    config.ce_alpha, config.kd_alpha = 1.0, 0.0
    config.teacher_adapt_epochs = 0
    return config
