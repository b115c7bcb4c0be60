"""MobileNetV2 (Sandler et al. 2018) as torchvision's `mobilenet_v2` and timm's `mobilenetv2_100` have it."""

from functools import partial
from typing import NamedTuple

import flax.linen as nn

from asib_jax.models.efficientnet import TIMM, Block
from asib_jax.models.layers import HE_NORMAL, Architecture, ConvNorm, Names, Stage, chain


class Row(NamedTuple):
    """A row of the paper's table 2: `count` blocks of `width` channels, of which the first has the stride."""

    expansion: int
    width: int
    count: int  # type: ignore[assignment]  # hides tuple.count
    stride: int


ROWS = (
    Row(1, 16, 1, 1),
    Row(6, 24, 2, 2),
    Row(6, 32, 3, 2),
    Row(6, 64, 4, 2),
    Row(6, 96, 3, 1),
    Row(6, 160, 3, 2),
    Row(6, 320, 1, 1),
)

# Our layers of a block and their places in torchvision's. In the first row nothing is expanded.
_FIRST = {"depthwise_conv": "0.0", "depthwise_bn": "0.1", "project_conv": "1", "project_bn": "2"}
_OTHERS = {
    "expand_conv": "0.0",
    "expand_bn": "0.1",
    "depthwise_conv": "1.0",
    "depthwise_bn": "1.1",
    "project_conv": "2",
    "project_bn": "3",
}


def _torchvision(rows: tuple[Row, ...]) -> Names:
    """torchvision's names, which number the blocks through all rows."""
    blocks = [(i, j) for i, row in enumerate(rows, start=1) for j in range(row.count)]
    head = len(blocks) + 1
    return (
        ("stem/conv", "features.0.0"),
        ("stem/bn", "features.0.1"),
        *(
            (f"layer{i}/block{j}/{layer}", f"features.{position}.conv.{place}")
            for position, (i, j) in enumerate(blocks, start=1)
            for layer, place in (_FIRST if i == 1 else _OTHERS).items()
        ),
        (r"layer\d/head/conv", f"features.{head}.0"),
        (r"layer\d/head/bn", f"features.{head}.1"),
        ("classifier", "classifier.1"),
    )


def mobilenet_v2(rows: tuple[Row, ...], small_input: bool) -> Architecture:
    """MobileNetV2 of width 1: a stem of 32 channels, stages "layer1", "layer2", ... of one row each, 1280 features.

    The 1x1 convolution to 1280 channels belongs to the last stage. Dropout before the classifier is at torchvision's
    rate of 0.2.

    rows: the first must have expansion 1 and the others a larger one, as PyTorch's names suppose.
    """
    unit = partial(ConvNorm, activation=nn.relu6)
    block = partial(Block, drop_rate=0.0, depthwise_init=HE_NORMAL, activation=nn.relu6, squeeze=False)
    stages: list[Stage] = [("stem", partial(unit, kernel=3, width=32, stride=1 if small_input else 2))]
    for i, (expansion, width, count, stride) in enumerate(rows, start=1):
        blocks = (partial(block, expansion, 3, 1 if j else stride, width) for j in range(count))
        head = {"head": partial(unit, kernel=1, width=1280, stride=1)} if i == len(rows) else {}
        stages.append((f"layer{i}", chain(blocks, **head)))
    return Architecture(stages=tuple(stages), feat_dim=1280, names=(_torchvision(rows), TIMM), dropout=0.2)
