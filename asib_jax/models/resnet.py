"""ResNets: He et al. (2016) for small images, with Tian et al.'s (2020) wider variants, and the ImageNet bottlenecks.

Where a block changes the shape its shortcut is a 1x1 convolution with BatchNorm (He et al.'s option B).
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax

from asib_jax.models.layers import Architecture, ConvNorm, Names, Part, chain, conv_norm

Convolutions = tuple[tuple[int, int, int], ...]  # (kernel, width, stride) of a block's convolutions in order


# torchvision's names, and those of common CIFAR ResNets, which call a shortcut "shortcut" and the classifier "linear".
def _names(shortcut: str, classifier: str) -> Names:
    return (
        (r"stem/(conv|bn)", r"\g<1>1"),
        (r"(layer\d)/block(\d+)/((?:conv|bn)\d)", r"\1.\2.\3"),
        (r"(layer\d)/block(\d+)/downsample_conv", rf"\1.\2.{shortcut}.0"),
        (r"(layer\d)/block(\d+)/downsample_bn", rf"\1.\2.{shortcut}.1"),
        (r"classifier", classifier),
    )


NAMES = (_names("downsample", "fc"), _names("shortcut", "linear"))


class Block(Part):
    """relu(shortcut(x) + conv-bn[-relu-conv-bn ...](x)): the basic block and the bottleneck alike."""

    convolutions: Convolutions

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        layer = partial(conv_norm, train=train, dtype=self.dtype, axis_name=self.axis_name)
        y, total_stride = x, 1
        for i, (kernel, width, stride) in enumerate(self.convolutions, start=1):
            y = layer(nn.relu(y) if i > 1 else y, kernel, width, stride, name=f"conv{i}")
            total_stride *= stride
        if total_stride > 1 or x.shape[-1] != y.shape[-1]:
            x = layer(x, 1, y.shape[-1], total_stride, name="downsample_conv")
        return nn.relu(x + y)


def _basic(width: int, stride: int) -> Convolutions:
    return (3, width, stride), (3, width, 1)


def _bottleneck(width: int, stride: int) -> Convolutions:
    """The stride is on the 3x3 convolution, as in torchvision ("ResNet V1.5")."""
    return (1, width, 1), (3, width, stride), (1, 4 * width, 1)


def _layers(convolutions: Callable[[int, int], Convolutions], widths: tuple[int, ...], counts: tuple[int, ...]):
    """Stages "layer1", "layer2", ... of `counts` blocks; every one but the first halves the resolution."""
    return tuple(
        (f"layer{i}", chain(partial(Block, convolutions(width, 1 if j else min(i, 2))) for j in range(count)))
        for i, (width, count) in enumerate(zip(widths, counts, strict=True), start=1)
    )


def cifar_resnet(depth: int, widths: tuple[int, ...] = (16, 32, 64), stem: int = 16) -> Architecture:
    """He et al.'s CIFAR ResNet of 6n + 2 layers: a 3x3 stem and three stages of n basic blocks.

    widths (64, 128, 256) with stem 32 are the "x4" networks of Tian et al. (2020).
    """
    return Architecture(
        stages=(
            ("stem", partial(ConvNorm, kernel=3, width=stem, stride=1)),
            *_layers(_basic, widths, (depth // 6,) * 3),
        ),
        feat_dim=widths[-1],
        names=NAMES,
    )


def imagenet_resnet(counts: tuple[int, ...], small_input: bool) -> Architecture:
    """torchvision's bottleneck ResNet with `counts` blocks in its four stages."""
    stem = dict(kernel=3, stride=1, pool=False) if small_input else dict(kernel=7, stride=2, pool=True)
    return Architecture(
        stages=(("stem", partial(ConvNorm, width=64, **stem)), *_layers(_bottleneck, (64, 128, 256, 512), counts)),
        feat_dim=4 * 512,
        names=NAMES,
    )
