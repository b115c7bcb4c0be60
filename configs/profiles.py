"""What a profile changes: the same experiment on other data, smaller networks and fewer epochs."""

from ml_collections import ConfigDict

from configs import imagenet_teachers


def _full(config: ConfigDict) -> None:
    """CIFAR-100 at full scale: ImageNet's ConvNeXt-L and ResNet-152, fine-tuned once, teach a ResNet-101."""
    imagenet_teachers.use(config.teacher1, "convnext_l", config.dataset.name)
    imagenet_teachers.use(config.teacher2, "resnet152", config.dataset.name)
    config.enable_kd_after_syn_acc = 0.05


def _small(config: ConfigDict) -> None:
    """Real CIFAR-100 on a CPU: ResNet-56 and ResNet-44 teachers from files, a ResNet-8 student, few images."""
    config.dataset.val_fraction = 0.04
    config.dataset.train_subset = 5000
    config.model.student.name = "resnet8_scratch"
    config.teacher1.name = "resnet56"
    config.teacher2.name = "resnet44"
    for network in (config.model.student, config.teacher1, config.teacher2):
        network.mean, network.std = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)
    config.a_step_views = config.b_step_views = 4
    config.use_amp = False
    config.student_lr = 0.01  # `ce_only` on validation after these epochs: 17.9 %; at the ladder's 1e-3, 12.8 %
    config.student_epochs_per_stage = (8, 8)
    config.teacher_adapt_epochs = 4
    config.synergy_only_epochs = 2
    config.ib_beta_warmup_epochs = 2
    config.enable_kd_after_syn_acc = 0.05
    config.distill_out_dim = 128
    config.ib_mbm_out_dim = 128
    config.schedule.lr_warmup_epochs = 1


def _digits(config: ConfigDict) -> None:
    """Handwritten digits (8x8, bundled with scikit-learn): teachers trained here, few labels for the student."""
    _few_images_on_a_cpu(config, "resnet14", "resnet8", train_epochs=10)
    config.dataset.name = "digits"
    config.dataset.train_subset = 100
    config.dataset.data_aug = 3
    for network in (config.model.student, config.teacher1, config.teacher2):
        network.mean, network.std = (0.305,), (0.376,)
    config.student_epochs_per_stage = (30, 30)
    config.a_step_views, config.b_step_views = 16, 60  # as many as epochs: what 0 gives, in smaller programs
    config.enable_kd_after_syn_acc = 0.3


def _own(config: ConfigDict) -> None:
    """Images of one's own on a CPU, as `dataset.path` alone says: small teachers trained here, a smaller student."""
    _few_images_on_a_cpu(config, "resnet20", "resnet14", train_epochs=30)
    config.dataset.image_size = 32
    config.student_epochs_per_stage = (20, 20)
    config.a_step_views, config.b_step_views = 8, 20


def _few_images_on_a_cpu(config: ConfigDict, first: str, second: str, train_epochs: int) -> None:
    """Two teachers trained here for so many epochs, a ResNet-8 student and its control, in float32."""
    config.dataset.batch_size = 32
    config.dataset.val_fraction = 0.2
    config.model.student.name = "resnet8_scratch"
    for teacher, name in ((config.teacher1, first), (config.teacher2, second)):
        teacher.name = name
        teacher.train_epochs = train_epochs
        teacher.warmup_epochs = 2
    config.use_amp = False
    config.train_control = True
    config.teacher_adapt_epochs = 8
    config.synergy_only_epochs = 4
    config.ib_beta_warmup_epochs = 4
    config.distill_out_dim = 64
    config.ib_mbm_out_dim = 64
    config.schedule.lr_warmup_epochs = 2


PROFILES = {"": _full, "small": _small, "digits": _digits, "own": _own}


def apply(config: ConfigDict, profile: str) -> None:
    """Apply `profile` in place; ValueError names an unknown one."""
    if profile not in PROFILES:
        raise ValueError(f"unknown profile {profile!r} after the colon of --config; known: {sorted(PROFILES)}")
    PROFILES[profile](config)
