"""The fusion network without a bottleneck, with CCCP and partial freezing.

    python launch/main.py --config=configs/side_cccp_ppf.py:digits   # handwritten digits, about a minute on two cores
    python launch/main.py --config=configs/side_cccp_ppf.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/side_cccp_ppf.py:small    # CIFAR-100 on a CPU, weights needed: README.md
    python launch/main.py --config=configs/side_cccp_ppf.py          # CIFAR-100 at full scale

Differs from `side_fusion` in use_cccp, use_partial_freeze and student_freeze_level.
"""

from configs import side_fusion


def get_config(profile: str = ""):
    """`configs/side_fusion.py` with the changes below."""
    config = side_fusion.get_config(profile)
    config.use_cccp = True
    config.cccp_alpha = 0.25
    config.use_partial_freeze = True
    config.student_freeze_level = (-1, 2)
    return config
