"""Fine-tune EfficientNet-L2 to CIFAR-100 and measure it; `configs/imagenet_teachers.py` has the recipe.

python launch/main.py --config=configs/finetune_efficientnet_l2_cifar100.py
"""

from configs.finetune import finetune


def get_config(profile: str = ""):
    """The full-scale defaults with one teacher and no student."""
    return finetune("efficientnet_l2", "cifar100", profile)
