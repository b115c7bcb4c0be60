"""EfficientNet (Tan & Le 2019): inverted residuals with squeeze-and-excitation, in widths and depths scaled together.

Convolutions start from He normal over the fan-out of their group, as the original's.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from asib_jax.models.layers import Architecture, ConvNorm, Part, chain, conv, conv_norm, keys_of, stochastic_depth

# (expansion, kernel, stride of the first block, width, blocks) of each stage of B0
_STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
_STEM, _HEAD = 32, 1280
_DEPTH_DROP = 0.2

# PyTorch's names of a block's layers. In the first stage nothing is expanded, which moves the names of what follows.
_TIMM_FIRST = {
    "depthwise_conv": "conv_dw",
    "depthwise_bn": "bn1",
    "project_conv": "conv_pw",
    "project_bn": "bn2",
    "squeeze_excite/reduce": "se.conv_reduce",
    "squeeze_excite/expand": "se.conv_expand",
}
_TIMM = _TIMM_FIRST | {
    "expand_conv": "conv_pw",
    "expand_bn": "bn1",
    "depthwise_bn": "bn2",
    "project_conv": "conv_pwl",
    "project_bn": "bn3",
}
_TORCHVISION_ORDER = ("expand", "depthwise", "squeeze_excite", "project")
_TORCHVISION_LAYERS = {"conv": "0", "bn": "1", "reduce": "fc1", "expand": "fc2"}


def _timm_block(match) -> str:
    stage, block, layer = match.groups()
    return f"blocks.{int(stage) - 1}.{block}.{(_TIMM_FIRST if stage == '1' else _TIMM)[layer]}"


def _torchvision_block(match) -> str:
    stage, block, part, layer = match.groups()
    position = _TORCHVISION_ORDER.index(part) - (stage == "1")
    return f"features.{stage}.{block}.block.{position}.{_TORCHVISION_LAYERS[layer]}"


TIMM = (  # of MobileNetV2, too
    (r"stem/conv", "conv_stem"),
    (r"stem/bn", "bn1"),
    (r"[a-z]+(\d)/block(\d+)/(.+)", _timm_block),
    (r"[a-z]+\d/head/conv", "conv_head"),
    (r"[a-z]+\d/head/bn", "bn2"),
    (r"classifier", "classifier"),
)
TORCHVISION = (
    (r"stem/conv", "features.0.0"),
    (r"stem/bn", "features.0.1"),
    (r"blocks(\d)/block(\d+)/(\w+)[_/]([a-z]+)", _torchvision_block),
    (r"blocks7/head/conv", "features.8.0"),
    (r"blocks7/head/bn", "features.8.1"),
    (r"classifier", "classifier.1"),
)


class SqueezeExcite(nn.Module):
    """x scaled per channel by sigmoid(expand(silu(reduce(mean over space)))) (Hu et al. 2018)."""

    width: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        y = jnp.mean(x, axis=(1, 2), keepdims=True, dtype=jnp.float32)
        y = nn.silu(conv(1, self.width, 1, use_bias=True, dtype=self.dtype, name="reduce")(y))
        return x * nn.sigmoid(conv(1, x.shape[-1], 1, use_bias=True, dtype=self.dtype, name="expand")(y))


class Block(Part):
    """The inverted residual (Sandler et al. 2018), with a shortcut where it leaves the shape as it was.

    1x1 to `expansion` times the input's width (unless 1), depthwise, squeeze-and-excitation through a quarter of the
    input's width (if `squeeze`), 1x1 to `width`.
    """

    expansion: int
    kernel: int
    stride: int
    width: int
    drop_rate: float
    depthwise_init: Callable[..., jax.Array]
    activation: Callable[[jax.Array], jax.Array] = nn.silu
    squeeze: bool = True
    padding: str | None = None
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        layer = partial(conv_norm, train=train, dtype=self.dtype, axis_name=self.axis_name, epsilon=self.epsilon)
        inputs, hidden = x.shape[-1], x.shape[-1] * self.expansion
        y = self.activation(layer(x, 1, hidden, 1, name="expand_conv")) if self.expansion > 1 else x
        y = self.activation(
            layer(
                y,
                self.kernel,
                hidden,
                self.stride,
                padding=self.padding,
                feature_group_count=hidden,
                kernel_init=self.depthwise_init,
                name="depthwise_conv",
            )
        )
        if self.squeeze:
            y = SqueezeExcite(inputs // 4, self.dtype, name="squeeze_excite")(y)
        y = layer(y, 1, self.width, 1, name="project_conv")
        if self.stride > 1 or inputs != self.width:
            return y
        return x + stochastic_depth(y, self.drop_rate, keys_of(self, dropout_keys))


def _scaled(width: float) -> int:
    """The multiple of 8 nearest to `width`, or the next one where that loses more than a tenth (Tan & Le)."""
    nearest = max(8, int(width + 4) // 8 * 8)
    return nearest + 8 if nearest < 0.9 * width else nearest


def efficientnet(
    width: float, depth: float, dropout: float, small_input: bool, tensorflow: bool = False
) -> Architecture:
    """B0's widths and numbers of blocks times `width` and `depth`, in stages "stem", "blocks1" ... "blocks7".

    B0 is (width 1, depth 1, dropout 0.2), B2 (1.1, 1.2, 0.3), L2 (4.3, 5.3, 0.5) with `tensorflow`. The last stage
    includes the 1x1 convolution before pooling. Stochastic depth at block i of n has the rate 0.2 i / n (Tan & Le; for
    L2 Xie et al. 2020). BatchNorm's momentum is PyTorch's default in all of them, as in timm and torchvision.

    tensorflow: TensorFlow's padding, at stride 2 of the far side only, and BatchNorm epsilon 1e-3 in place of 1e-5:
        what weights trained there expect. Those are timm's "tf_efficientnet_...", of which L2 has no others. Without
        it weights must be timm's "efficientnet_..." or torchvision's. Names and shapes are the same, so that weights of
        the other kind can be imported, but the network computes something else.
    """
    counts = [math.ceil(depth * count) for *_, count in _STAGES]
    padding, epsilon = ("SAME", 1e-3) if tensorflow else (None, 1e-5)
    unit = partial(ConvNorm, activation=nn.silu, padding=padding, epsilon=epsilon)
    stem = partial(unit, kernel=3, width=_scaled(_STEM * width), stride=1 if small_input else 2)
    stages: list[tuple[str, Callable]] = [("stem", stem)]
    for i, (expansion, kernel, stride, base, _) in enumerate(_STAGES):
        done = sum(counts[:i])
        init = nn.initializers.normal(2**0.5 / kernel)  # over the fan-out of a group
        blocks = (
            partial(
                Block,
                expansion,
                kernel,
                1 if j else stride,
                _scaled(base * width),
                _DEPTH_DROP * (done + j) / sum(counts),
                init,
                padding=padding,
                epsilon=epsilon,
            )
            for j in range(counts[i])
        )
        last = i == len(_STAGES) - 1
        head = {"head": partial(unit, kernel=1, width=_scaled(_HEAD * width), stride=1)} if last else {}
        stages.append((f"blocks{i + 1}", chain(blocks, **head)))
    return Architecture(tuple(stages), feat_dim=_scaled(_HEAD * width), names=(TIMM, TORCHVISION), dropout=dropout)
