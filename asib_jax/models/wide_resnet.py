"""Wide ResNets for small images (Zagoruyko & Komodakis 2016), in the form that Tian et al. (2020) distil."""

from functools import partial

import flax.linen as nn
import jax

from asib_jax.models.layers import Architecture, Part, batch_norm, chain, conv

# Of the weights of Tian et al. (2020).
NAMES = (
    ("stem/conv", "conv1"),
    (r"layer(\d)/block(\d+)/((?:conv|bn)\d)", r"block\1.layer.\2.\3"),
    (r"layer(\d)/block(\d+)/shortcut_conv", r"block\1.layer.\2.convShortcut"),
    (r"layer\d/final/bn", "bn1"),
    ("classifier", "fc"),
)


class Stem(Part):
    """A 3x3 convolution; the first block normalises it."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        return conv(3, self.width, 1, dtype=self.dtype, name="conv")(x)


class Block(Part):
    """shortcut + conv(relu(bn(conv(relu(bn(x)))))), with 3x3 convolutions of which the first has the stride.

    The shortcut is x itself, or, where the number of channels changes, a 1x1 convolution of relu(bn(x)).
    """

    width: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        norm = partial(batch_norm, train, dtype=self.dtype, axis_name=self.axis_name)
        y = nn.relu(norm(name="bn1")(x))
        if x.shape[-1] != self.width:
            x = conv(1, self.width, self.stride, dtype=self.dtype, name="shortcut_conv")(y)
        y = conv(3, self.width, self.stride, dtype=self.dtype, name="conv1")(y)
        y = nn.relu(norm(name="bn2")(y))
        return x + conv(3, self.width, 1, dtype=self.dtype, name="conv2")(y)


class Norm(Part):
    """BatchNorm and relu, after the last block."""

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        return nn.relu(batch_norm(train, dtype=self.dtype, axis_name=self.axis_name, name="bn")(x))


def wide_resnet(depth: int, widen: int) -> Architecture:
    """WRN-depth-widen, of 6n + 4 layers: a 3x3 stem and stages "layer1" to "layer3" of n blocks, without dropout.

    feat_4d is what the final BatchNorm and relu give, which belong to the last stage.
    """

    def stage(i: int):
        blocks = (partial(Block, 2 ** (i + 3) * widen, 1 if j else min(i, 2)) for j in range((depth - 4) // 6))
        return f"layer{i}", chain(blocks, **({"final": Norm} if i == 3 else {}))

    return Architecture(
        stages=(("stem", partial(Stem, width=16)), *(stage(i) for i in (1, 2, 3))), feat_dim=64 * widen, names=(NAMES,)
    )
