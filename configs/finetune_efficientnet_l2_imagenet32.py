"""Fine-tune EfficientNet-L2 to ImageNet at 32x32 and measure it; `configs/imagenet_teachers.py` has the recipe.

python launch/main.py --config=configs/finetune_efficientnet_l2_imagenet32.py --config.dataset.path=FOLDER
"""

from configs.finetune import finetune


def get_config(profile: str = ""):
    """The full-scale defaults with one teacher and no student."""
    return finetune("efficientnet_l2", "imagenet32", profile)
