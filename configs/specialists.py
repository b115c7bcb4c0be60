"""Teachers that know only some classes each, merged into one student that knows all.

    python launch/main.py --config=configs/specialists.py:digits   # handwritten digits, about a minute on two cores
    python launch/main.py --config=configs/specialists.py:own --config.dataset.path=FOLDER   # your own images
    python launch/main.py --config=configs/specialists.py:small    # CIFAR-100 on a CPU, of 60 classes each
    python launch/main.py --config=configs/specialists.py          # CIFAR-100 at full scale, of 50 classes each

Two models that you have already: teacherK.weights and teacherK.classes of each (README.md).
"""

from configs import base


def get_config(profile: str = ""):
    """`configs/base.py` with the changes below; synergy's base and keys are told by the teachers."""
    config = base.get_config(profile)
    config.use_ib = True
    config.specialists.overlap = 20.0 if profile else 0.0
    if profile == "small":
        for teacher in (config.teacher1, config.teacher2):
            teacher.name = "resnet20"
            teacher.train_epochs = 12
    return config
