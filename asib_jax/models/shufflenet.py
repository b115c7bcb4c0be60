"""ShuffleNetV2 (Ma et al. 2018) as torchvision has it."""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from asib_jax.models.layers import Architecture, ConvNorm, Part, Stage, chain, conv_norm

_PLACES = {
    "shortcut_depthwise_conv": "branch1.0",
    "shortcut_depthwise_bn": "branch1.1",
    "shortcut_conv": "branch1.2",
    "shortcut_bn": "branch1.3",
    "conv1": "branch2.0",
    "bn1": "branch2.1",
    "depthwise_conv": "branch2.3",
    "depthwise_bn": "branch2.4",
    "conv2": "branch2.5",
    "bn2": "branch2.6",
}
TORCHVISION = (
    ("stem/conv", "conv1.0"),
    ("stem/bn", "conv1.1"),
    *((rf"(stage\d)/block(\d+)/{part}", rf"\1.\2.{place}") for part, place in _PLACES.items()),
    (r"stage\d/head/conv", "conv5.0"),
    (r"stage\d/head/bn", "conv5.1"),
    ("classifier", "fc"),
)


def shuffle(left: jax.Array, right: jax.Array) -> jax.Array:
    """Two halves [B, h, w, c] with their channels interleaved, [B, h, w, 2c]: a channel shuffle in two groups."""
    return jnp.stack((left, right), axis=-1).reshape(*left.shape[:-1], -1)


class Block(Part):
    """Half of the output comes from 1x1, 3x3 depthwise, 1x1; the other half passes by. Both halves are shuffled.

    At stride 1 each half of the output has its half of the input; at stride 2 both have all of it, and a 3x3 depthwise
    and a 1x1 convolution bring the one that passes by to the shape. BatchNorm after each, relu after every 1x1.
    """

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        layer = partial(conv_norm, train=train, dtype=self.dtype, axis_name=self.axis_name)

        def pointwise(x: jax.Array, name: str) -> jax.Array:
            return nn.relu(layer(x, 1, self.width // 2, 1, name=name))

        def depthwise(x: jax.Array, name: str) -> jax.Array:
            return layer(x, 3, x.shape[-1], self.stride, feature_group_count=x.shape[-1], name=name)

        if self.stride == 1:
            left, right = jnp.split(x, 2, axis=-1)
        else:
            left, right = pointwise(depthwise(x, "shortcut_depthwise_conv"), "shortcut_conv"), x
        right = depthwise(pointwise(right, "conv1"), "depthwise_conv")
        return shuffle(left, pointwise(right, "conv2"))


def shufflenet_v2(counts: tuple[int, ...], widths: tuple[int, ...], small_input: bool) -> Architecture:
    """ShuffleNetV2 with a stem of 24 channels, stages "stage2", "stage3", "stage4", and 1024 features.

    counts, widths: blocks and channels of these stages; (4, 8, 4) and (116, 232, 464) are the paper's "1x". The 1x1
        convolution to 1024 channels belongs to the last stage. Convolutions start from He normal over fan-out, where
        torchvision leaves PyTorch's default.
    """
    stem = partial(ConvNorm, kernel=3, width=24, stride=1 if small_input else 2, pool=not small_input)
    stages: list[Stage] = [("stem", stem)]
    for i, (width, count) in enumerate(zip(widths, counts, strict=True), start=1):
        head = {"head": partial(ConvNorm, kernel=1, width=1024, stride=1)} if i == len(counts) else {}
        stages.append((f"stage{i + 1}", chain((partial(Block, width, 1 if j else 2) for j in range(count)), **head)))
    return Architecture(stages=tuple(stages), feat_dim=1024, names=(TORCHVISION,))
