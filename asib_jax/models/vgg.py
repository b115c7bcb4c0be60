"""VGG (Simonyan & Zisserman 2015) with BatchNorm for small images, in the form that Tian et al. (2020) distil."""

from functools import partial

import flax.linen as nn
import jax

from asib_jax.models.layers import Architecture, Part, conv_norm


class Stage(Part):
    """3x3 convolutions with bias, each followed by BatchNorm and relu: conv0, bn0, conv1, ...

    With `pool` a 2x2 max-pool of stride 2 comes first where the map has more than 4 pixels on both sides.
    """

    widths: tuple[int, ...]
    pool: bool

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        if self.pool and min(x.shape[1:3]) > 4:
            x = nn.max_pool(x, (2, 2), (2, 2))
        for i, width in enumerate(self.widths):
            x = nn.relu(
                conv_norm(
                    x,
                    3,
                    width,
                    1,
                    use_bias=True,
                    train=train,
                    dtype=self.dtype,
                    axis_name=self.axis_name,
                    name=f"conv{i}",
                )
            )
        return x


def vgg(widths: tuple[tuple[int, ...], ...]) -> Architecture:
    """VGG: stages "stem", "layer1", "layer2", ... with convolutions of these widths, and one linear classifier.

    All stages but the first halve the resolution while both sides are above 4 pixels, so that no image size gives
    empty maps. Tian et al. halve three times, and four times on exactly 64 pixels: that is the same on 20 to 39 and on
    64 pixels. Below 20 they halve more often than this, on all other sizes less often. feat_4d is what the last relu
    gives.
    """
    stages = ["stem", *(f"layer{i}" for i in range(1, len(widths)))]
    names = [("classifier", "classifier")]
    for i, (stage, convolutions) in enumerate(zip(stages, widths, strict=True)):
        for j in range(len(convolutions)):
            names += [(f"{stage}/conv{j}", f"block{i}.{3 * j}"), (f"{stage}/bn{j}", f"block{i}.{3 * j + 1}")]
    return Architecture(
        stages=tuple(
            (stage, partial(Stage, widths=convolutions, pool=stage != "stem"))
            for stage, convolutions in zip(stages, widths, strict=True)
        ),
        feat_dim=widths[-1][-1],
        names=(tuple(names),),
    )
