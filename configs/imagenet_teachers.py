"""The ImageNet teachers: where their published weights are, and how they are fine-tuned to other images.

The recipe is a starting point in the manner of Liu et al.'s (2022) fine-tuning; it has not been tuned.
"""

from ml_collections import ConfigDict

WEIGHTS = {
    "convnext_s": "hf:timm/convnext_small.fb_in22k",
    "convnext_l": "hf:timm/convnext_large.fb_in22k",
    "efficientnet_l2": "hf:timm/tf_efficientnet_l2.ns_jft_in1k",
    "resnet152": "hf:timm/resnet152.tv2_in1k",  # torchvision's V2
}


def use(teacher: ConfigDict, name: str, dataset: str) -> None:
    """Make `teacher`, a group of keys, the network called `name` (a key of WEIGHTS), fine-tuned to `dataset`."""
    teacher.name = name
    teacher.weights = WEIGHTS[name]
    teacher.mean, teacher.std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    teacher.saw_val = dataset == "imagenet32"  # its validation images are training images of ImageNet
    teacher.finetune_epochs = 10 if dataset == "imagenet32" else 20
    teacher.finetune_lr = 1e-4
    teacher.finetune_weight_decay = 0.05
    teacher.warmup_epochs = 1
    teacher.label_smoothing = 0.1
    teacher.finetune_use_cutmix = True
    teacher.finetune_cutmix_alpha = 1.0
    teacher.early_stopping_patience = 5
