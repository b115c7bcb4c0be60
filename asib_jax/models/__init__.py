"""Every network by name."""

import re
from collections.abc import Callable, Sequence

from asib_jax.errors import UserError
from asib_jax.models.convnext import convnext
from asib_jax.models.efficientnet import efficientnet
from asib_jax.models.ib_mbm import IB_MBM, SynergyHead
from asib_jax.models.kd_model import KDModel, feature_dim
from asib_jax.models.layers import Architecture
from asib_jax.models.mobilenet import ROWS as MOBILENET_ROWS, mobilenet_v2
from asib_jax.models.resnet import cifar_resnet, imagenet_resnet
from asib_jax.models.shufflenet import shufflenet_v2
from asib_jax.models.vgg import vgg
from asib_jax.models.wide_resnet import wide_resnet

# Name -> function of `small_input`: whether the stem is for images of about 32 pixels, of stride 1 without max-pool.
# Where that takes another kernel (3x3 in ResNets and ConvNeXt) it starts at random; all other pretrained weights fit.
# The CIFAR networks (resnet8 ... resnet32x4, wrn_*, vgg*) have one stem only and read images of any size with it.
MODELS: dict[str, Callable[[bool], Architecture]] = {
    **{
        f"resnet{depth}": lambda small_input, depth=depth: cifar_resnet(depth)  # type: ignore[misc]
        for depth in (8, 14, 20, 32, 44, 56, 110)
    },
    "resnet8x4": lambda small_input: cifar_resnet(8, widths=(64, 128, 256), stem=32),
    "resnet32x4": lambda small_input: cifar_resnet(32, widths=(64, 128, 256), stem=32),
    "wrn_16_2": lambda small_input: wide_resnet(16, 2),
    "wrn_40_1": lambda small_input: wide_resnet(40, 1),
    "wrn_40_2": lambda small_input: wide_resnet(40, 2),
    "vgg8": lambda small_input: vgg(((64,), (128,), (256,), (512,), (512,))),
    "vgg13": lambda small_input: vgg(((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))),
    "resnet50": lambda small_input: imagenet_resnet((3, 4, 6, 3), small_input),
    "resnet101": lambda small_input: imagenet_resnet((3, 4, 23, 3), small_input),
    "resnet152": lambda small_input: imagenet_resnet((3, 8, 36, 3), small_input),
    "convnext_s": lambda small_input: convnext((96, 192, 384, 768), (3, 3, 27, 3), 0.4, small_input),
    "convnext_l": lambda small_input: convnext((192, 384, 768, 1536), (3, 3, 27, 3), 0.5, small_input),
    "efficientnet_b0": lambda small_input: efficientnet(1.0, 1.0, 0.2, small_input),
    "efficientnet_b2": lambda small_input: efficientnet(1.1, 1.2, 0.3, small_input),
    "efficientnet_l2": lambda small_input: efficientnet(4.3, 5.3, 0.5, small_input, tensorflow=True),
    "mobilenet_v2": lambda small_input: mobilenet_v2(MOBILENET_ROWS, small_input),
    "shufflenet_v2": lambda small_input: shufflenet_v2((4, 8, 4), (116, 232, 464), small_input),
}


def backbone(name: str, small_input: bool, key: str) -> Architecture:
    """The backbone called `name`, a key of MODELS, alone or with the original's suffix `_scratch` or `_pretrain`.

    The suffix builds the same network: whether weights are imported into it is not decided here.

    Raises UserError for an unknown name, which the configuration `key` holds.
    """
    plain = re.sub(r"_(scratch|pretrain)$", "", name)
    if plain not in MODELS:
        raise UserError(f"unknown model {name!r}; {key} must be one of {', '.join(MODELS)}")
    return MODELS[plain](small_input)


def create_student_by_name(name: str, num_classes: int, *, small_input: bool, **fields) -> KDModel:
    """A student. Names and errors: `backbone`; fields: the other fields of `KDModel`, mean and std are required."""
    return KDModel(backbone(name, small_input, "model.student.name"), num_classes, **fields)


def create_teacher_by_name(name: str, num_classes: int, *, small_input: bool, **fields) -> KDModel:
    """A teacher. Names, errors and fields: as of `create_student_by_name`."""
    return KDModel(backbone(name, small_input, "teacherK.name"), num_classes, **fields)


def build_ib_mbm_from_teachers(
    teachers: Sequence[KDModel], *, dim: int, dropout: float, learnable_temperature: bool, base: str, **fields
) -> tuple[IB_MBM, SynergyHead]:
    """The fusion network and head for these teachers; base: of the head; `fields`: the others of IB_MBM.

    Widths of query and teachers are inferred at initialisation; classes are the teachers'.

    Raises UserError if the teachers are read at different widths.
    """
    widths = [feature_dim(teacher) for teacher in teachers]
    if len(set(widths)) > 1:
        joined = ", their probabilities beside them (ib_mbm_kv)," if teachers[0].joins_probabilities else ""
        raise UserError(
            f"the teachers' features{joined} have different widths {widths}: set use_distillation_adapter=True, "
            "which gives all of them distill_out_dim"
        )
    head = SynergyHead(teachers[0].num_classes, dim, dropout, learnable_temperature, base, len(teachers))
    return IB_MBM(dim, **fields), head
