"""Fine-tune ConvNeXt-L to CIFAR-100 and measure it; `configs/imagenet_teachers.py` has the recipe.

python launch/main.py --config=configs/finetune_convnext_l_cifar100.py
"""

from configs.finetune import finetune


def get_config(profile: str = ""):
    """The full-scale defaults with one teacher and no student."""
    return finetune("convnext_l", "cifar100", profile)
