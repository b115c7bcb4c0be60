"""ConvNeXt (Liu et al. 2022). Every normalisation is a LayerNorm over channels: there are no batch statistics.

Convolutions and dense layers of the stages start from a normal distribution of standard deviation 0.02, biases at zero,
layer scales at 1e-6, as the original's. (It truncates at +-2, a hundred deviations.) The classifier starts as that of
every `KDModel`.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from asib_jax.models.layers import Architecture, Chain, Part, conv, keys_of, stochastic_depth

_INIT = nn.initializers.normal(0.02)
_conv = partial(conv, use_bias=True, kernel_init=_INIT)


def _from_zero(rest: str):
    """A replacement that counts stages from zero, as timm does."""
    return lambda match: f"stages.{int(match[1]) - 1}." + match.expand(rest)


NAMES = (
    (  # timm's
        (r"stem/conv", "stem.0"),
        (r"stem/norm", "stem.1"),
        (r"stage(\d)/downsample/norm", _from_zero("downsample.0")),
        (r"stage(\d)/downsample/conv", _from_zero("downsample.1")),
        (r"stage(\d)/block(\d+)", _from_zero(r"blocks.\2")),  # gamma
        (r"stage(\d)/block(\d+)/depthwise", _from_zero(r"blocks.\2.conv_dw")),
        (r"stage(\d)/block(\d+)/norm", _from_zero(r"blocks.\2.norm")),
        (r"stage(\d)/block(\d+)/(fc\d)", _from_zero(r"blocks.\2.mlp.\3")),
        (r"pooled_norm", "head.norm"),
        (r"classifier", "head.fc"),
    ),
)


def _layer_norm(dtype: Any, name: str) -> nn.LayerNorm:
    """Over channels, with float32 statistics. flax's fast variance, E[x^2] - E[x]^2, would cancel digits."""
    return nn.LayerNorm(epsilon=1e-6, use_fast_variance=False, dtype=dtype, name=name)


class Stem(Part):
    """Patches of 4x4 pixels, or with `small_input` a 3x3 convolution of stride 1, and LayerNorm."""

    width: int
    small_input: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        kernel, stride, padding = (3, 1, 1) if self.small_input else (4, 4, 0)
        x = _conv(kernel, self.width, stride, padding=padding, dtype=self.dtype, name="conv")(x)
        return _layer_norm(self.dtype, "norm")(x)


class Block(Part):
    """x + gamma * fc2(gelu(fc1(norm(depthwise 7x7(x))))), with gamma one factor per channel."""

    drop_rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        width = x.shape[-1]
        dense = partial(nn.Dense, dtype=self.dtype, kernel_init=_INIT)
        y = _conv(7, width, 1, feature_group_count=width, dtype=self.dtype, name="depthwise")(x)
        y = dense(4 * width, name="fc1")(_layer_norm(self.dtype, "norm")(y))
        y = dense(width, name="fc2")(nn.gelu(y, approximate=False))
        y *= self.param("gamma", nn.initializers.constant(1e-6), (width,), jnp.float32).astype(self.dtype)
        return x + stochastic_depth(y, self.drop_rate, keys_of(self, dropout_keys))


class Downsample(Part):
    """LayerNorm and a 2x2 convolution of stride 2."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        return _conv(2, self.width, 2, padding=0, dtype=self.dtype, name="conv")(_layer_norm(self.dtype, "norm")(x))


def convnext(widths: tuple[int, ...], counts: tuple[int, ...], drop_rate: float, small_input: bool) -> Architecture:
    """Stages "stem" and "stage1", "stage2", ... of `counts` blocks; every stage but the first halves the resolution.

    ConvNeXt-S is of widths (96, 192, 384, 768), ConvNeXt-L of twice that, both of counts (3, 3, 27, 3).

    drop_rate: stochastic depth of the last block, from 0 at the first linearly over all blocks. For training on
        ImageNet-1k the paper has 0.4 for S and 0.5 for L.
    """
    last, stages, done = sum(counts) - 1, [], 0
    for i, (width, count) in enumerate(zip(widths, counts, strict=True)):
        blocks = tuple((f"block{j}", partial(Block, drop_rate * (done + j) / last)) for j in range(count))
        first = (("downsample", partial(Downsample, width)),) if i else ()
        stages.append((f"stage{i + 1}", partial(Chain, parts=first + blocks)))
        done += count
    return Architecture(
        stages=(("stem", partial(Stem, width=widths[0], small_input=small_input)), *stages),
        feat_dim=widths[-1],
        names=NAMES,
        pooled_norm=partial(_layer_norm, jnp.float32),
    )
