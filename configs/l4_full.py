"""L4: L3 with partial freezing of the student in the second stage.

    python launch/main.py --config=configs/l4_full.py:digits   # handwritten digits, about a minute on two cores
    python launch/main.py --config=configs/l4_full.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/l4_full.py:small    # CIFAR-100 on a CPU, weights needed: README.md
    python launch/main.py --config=configs/l4_full.py          # CIFAR-100 at full scale

Differs from `l3_tadapt` in use_partial_freeze and student_freeze_level.
"""

from configs import l3_tadapt


def get_config(profile: str = ""):
    """`configs/l3_tadapt.py` with the changes below."""
    config = l3_tadapt.get_config(profile)
    config.use_partial_freeze = True
    config.student_freeze_level = (-1, 2)
    return config
