"""What runs of results.md share: real CIFAR-100 at 16x16 pixels, few images as they are, a ResNet-8 student, on a CPU.

    python launch/main.py --config=docs/results/cifar16.py:l0_baseline --config.dataset.path=cifar100_6200.npz ...

After the colon stands a config of the ladder; `,one` after it leaves one teacher.
"""

import importlib

from ml_collections import ConfigDict


def get_config(name: str = "l0_baseline") -> ConfigDict:
    """The ladder's `name` with profile `:small`, on smaller images and with teachers that are trained here."""
    name, _, one = name.partition(",")
    config = importlib.import_module(f"configs.{name}").get_config("small")
    config.dataset.image_size = 16
    config.dataset.val_fraction = 0.2
    config.dataset.train_subset = 0
    config.dataset.data_aug = 0
    config.a_step_views = config.b_step_views = 1
    config.student_epochs_per_stage = (6, 6)
    for teacher in (config.teacher1, config.teacher2):
        teacher.name = "resnet14"
        teacher.train_lr = 0.01
    if one:
        with config.unlocked():
            del config.teacher2
    return config
