"""What the configs called finetune_<teacher>_<dataset> share: one teacher, no student."""

from ml_collections import ConfigDict

from configs import base, imagenet_teachers


def finetune(name: str, dataset: str, profile: str) -> ConfigDict:
    """The config that makes the teacher `name`, a key of `imagenet_teachers.WEIGHTS`, ready for `dataset`.

    A run of the ladder at full scale with the same results_dir takes the teacher from there. There are no profiles.
    """
    if profile:
        raise ValueError(f"unknown profile {profile!r} after the colon of --config: fine-tuning has none")
    config = base.get_config()
    with config.unlocked():
        del config.teacher2
    config.dataset.name = dataset
    config.teachers_only = True
    imagenet_teachers.use(config.teacher1, name, dataset)
    return config
