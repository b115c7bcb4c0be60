"""MobileNetV2 (Sandler et al. 2018) as torchvision's `mobilenet_v2` and timm's `mobilenetv2_100` have it."""
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax

from asib_jax.models.architecture import Architecture, Names
from asib_jax.models.layers import ConvNorm, batch_norm, chain, conv


class Row(NamedTuple):
    """A row of the paper's table 2: `count` blocks of `width` channels, of which the first has the stride."""

    expansion: int
    width: int
    count: int
    stride: int


ROWS = (Row(1, 16, 1, 1), Row(6, 24, 2, 2), Row(6, 32, 3, 2), Row(6, 64, 4, 2), Row(6, 96, 3, 1), Row(6, 160, 3, 2),
        Row(6, 320, 1, 1))

# (our module of a block, its place in torchvision's `conv`, timm's name): a block that does not expand counts from its
# depthwise convolution there.
_PLAIN = (("depthwise_conv", "0.0", "conv_dw"), ("depthwise_bn", "0.1", "bn1"),
          ("project_conv", "1", "conv_pw"), ("project_bn", "2", "bn2"))
_EXPANDED = (("expand_conv", "0.0", "conv_pw"), ("expand_bn", "0.1", "bn1"),
             ("depthwise_conv", "1.0", "conv_dw"), ("depthwise_bn", "1.1", "bn2"),
             ("project_conv", "2", "conv_pwl"), ("project_bn", "3", "bn3"))


def _conv_bn(x: jax.Array, kernel: int, width: int, stride: int = 1, *, train: bool, dtype: Any,
             axis_name: str | None, prefix: str, groups: int = 1) -> jax.Array:
    x = conv(kernel, width, stride, feature_group_count=groups, dtype=dtype, name=f"{prefix}conv")(x)
    return batch_norm(train, dtype=dtype, axis_name=axis_name, name=f"{prefix}bn")(x)


class Block(nn.Module):
    """The inverted residual: 1x1 to `expansion` times the channels (unless 1), 3x3 depthwise, linear 1x1 to `width`.

    The input is added at stride 1 where it has as many channels.
    """

    expansion: int
    width: int
    stride: int
    dtype: Any
    axis_name: str | None

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        layer = partial(_conv_bn, train=train, dtype=self.dtype, axis_name=self.axis_name)
        hidden = self.expansion * x.shape[-1]
        y = nn.relu6(layer(x, 1, hidden, prefix="expand_")) if self.expansion > 1 else x
        y = nn.relu6(layer(y, 3, hidden, self.stride, prefix="depthwise_", groups=hidden))
        y = layer(y, 1, self.width, prefix="project_")
        return x + y if self.stride == 1 and x.shape[-1] == self.width else y


def _names(rows: tuple[Row, ...]) -> tuple[Names, Names]:
    """torchvision's names, which number the blocks through all rows, and timm's."""
    torchvision, timm, position = [], [], 0
    for i, row in enumerate(rows):
        for j in range(row.count):
            position += 1
            for part, place, name in _EXPANDED if row.expansion > 1 else _PLAIN:
                ours = f"layer{i + 1}/block{j}/{part}"
                torchvision.append((ours, f"features.{position}.conv.{place}"))
                timm.append((ours, f"blocks.{i}.{j}.{name}"))
    head = rf"layer{len(rows)}/head/"
    torchvision += [("stem/conv", "features.0.0"), ("stem/bn", "features.0.1"), ("classifier", "classifier.1"),
                    (f"{head}conv", f"features.{position + 1}.0"), (f"{head}bn", f"features.{position + 1}.1")]
    timm += [("stem/conv", "conv_stem"), ("stem/bn", "bn1"), ("classifier", "classifier"),
             (f"{head}conv", "conv_head"), (f"{head}bn", "bn2")]
    return tuple(torchvision), tuple(timm)


def mobilenet_v2(rows: tuple[Row, ...], small_input: bool) -> Architecture:
    """MobileNetV2 of width 1: a stem of 32 channels, stages "layer1", "layer2", ... of one row each, 1280 features.

    The 1x1 convolution to 1280 channels belongs to the last stage. Dropout before the classifier at the paper's
    rate of .2 (torchvision's too). Convolutions start from He normal over fan-out, as torchvision's.

    small_input: the stem's convolution has stride 1 instead of 2, for images of about 32 pixels. All pretrained
        weights fit.
    """
    unit = partial(ConvNorm, activation=nn.relu6)
    stages = [("stem", partial(unit, kernel=3, width=32, stride=1 if small_input else 2))]
    for i, (expansion, width, count, stride) in enumerate(rows, start=1):
        blocks = (partial(Block, expansion, width, 1 if j else stride) for j in range(count))
        head = {"head": partial(unit, kernel=1, width=1280, stride=1)} if i == len(rows) else {}
        stages.append((f"layer{i}", chain(blocks, **head)))
    return Architecture(
        stages=tuple(stages),
        feat_dim=1280,
        names=_names(rows),
        dropout=0.2,
    )
