"""What backbones are made of: the layers and parts that several families share, and how one is declared."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from asib_jax import streams

# From our module's path to PyTorch's name for it: pairs of a regular expression of the whole path and a template for
# `Match.expand`, or a function of the match. The first that matches counts.
Names = tuple[tuple[str, str | Callable], ...]

Stage = tuple[str, Callable[..., nn.Module]]  # name, factory

HE_NORMAL = nn.initializers.variance_scaling(2.0, "fan_out", "normal")


class Architecture(NamedTuple):
    """A backbone as data. The order of `stages` is the declaration that partial freezing works by (SPEC 6).

    stages: `factory(name=..., dtype=..., axis_name=...)` gives a `Part`.
    feat_dim: F, the number of channels the last stage gives.
    names: naming conventions of PyTorch weights that fit, most common first; export writes the first.
    pooled_norm: a factory (name=...) of the float32 normalisation between pooling and `feat_2d`; None: there is none.
    dropout: rate before the classifier.
    """

    stages: tuple[Stage, ...]
    feat_dim: int
    names: tuple[Names, ...] = ()
    pooled_norm: Callable[..., nn.Module] | None = None
    dropout: float = 0.0


class Part(nn.Module, kw_only=True):  # type: ignore[call-arg]  # an argument of flax
    """A part of a backbone, from one block to a whole stage, of that compute type.

    Its `__call__(x, *, train, dropout_keys)` maps [B, h, w, c] to the next part's input. train: BatchNorm uses and
    updates batch statistics, over `axis_name` if it is given; dropout_keys: [B] keys, one per example, or None for no
    dropout of any kind.
    """

    dtype: Any
    axis_name: str | None


def symmetric_uniform(bound: float) -> Callable[..., jax.Array]:
    """An initialiser drawing from U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(x: jax.Array, features: int, name: str, zero: bool = False) -> jax.Array:
    """A float32 dense layer [..., fan_in] -> [..., features], created in the calling compact method.

    Kernel and bias are drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch's `nn.Linear` does by default, or
    `zero`.
    """
    init = nn.initializers.zeros if zero else symmetric_uniform(x.shape[-1] ** -0.5)
    return nn.Dense(features, kernel_init=init, bias_init=init, dtype=jnp.float32, name=name)(x)


def conv(
    kernel: int, width: int, stride: int, *, dtype: Any, name: str, padding: int | str | None = None, **options
) -> nn.Conv:
    """A square convolution without bias that starts from He normal over fan-out; `options` are those of `nn.Conv`.

    padding: None is kernel // 2 on both sides. At stride 2 XLA's "SAME" pads only the far side, PyTorch and its weights
        do not. An even kernel is for patches and takes 0.
    """
    options = {"use_bias": False, "kernel_init": HE_NORMAL} | options
    padding = kernel // 2 if padding is None else padding
    return nn.Conv(width, (kernel, kernel), stride, padding, dtype=dtype, name=name, **options)


def batch_norm(train: bool, *, dtype: Any, axis_name: str | None, name: str, epsilon: float = 1e-5) -> nn.BatchNorm:
    """BatchNorm with float32 statistics, from scale 1, bias 0. In training they are of the global batch if `axis_name`
    is given, and the running ones keep 0.9 of what they are (PyTorch's `momentum` of 0.1)."""
    return nn.BatchNorm(
        use_running_average=not train, momentum=0.9, epsilon=epsilon, dtype=dtype, axis_name=axis_name, name=name
    )


def conv_norm(
    x: jax.Array,
    kernel: int,
    width: int,
    stride: int,
    *,
    train: bool,
    dtype: Any,
    axis_name: str | None,
    name: str,
    epsilon: float = 1e-5,
    **options,
) -> jax.Array:
    """A convolution and its BatchNorm, created in the calling compact method; `options` are those of `conv`.

    name: the convolution's, e.g. "conv1"; BatchNorm has "bn" there in place of "conv".
    """
    x = conv(kernel, width, stride, dtype=dtype, name=name, **options)(x)
    return batch_norm(train, dtype=dtype, axis_name=axis_name, name=name.replace("conv", "bn"), epsilon=epsilon)(x)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """x [B, ...] with entries zeroed at `rate` and the rest scaled up; as it is where `keys` [B] are None.

    One key per example, so that a mask depends on no batch and no device.
    """
    return _drop(x, rate, keys, x.shape[1:])


def stochastic_depth(branch: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """A residual branch [B, ...], zeroed for whole examples at `rate` and else scaled up (Huang et al. 2016)."""
    return _drop(branch, rate, keys, (1,) * (branch.ndim - 1))


def _drop(x: jax.Array, rate: float, keys: jax.Array | None, shape: tuple[int, ...]) -> jax.Array:
    if not rate or keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)


def keys_of(module: nn.Module, keys: jax.Array | None) -> jax.Array | None:
    """The per-example keys [B] of one module, by its place in the network; None stays None."""
    return None if keys is None else streams.branch(keys, "/".join(module.path))


class ConvNorm(Part):
    """A convolution, BatchNorm, an activation and, if `pool`, a 3x3 max-pool of stride 2: a stem, or a 1x1 head."""

    kernel: int
    width: int
    stride: int
    pool: bool = False
    activation: Callable[[jax.Array], jax.Array] = nn.relu
    padding: str | None = None
    epsilon: float = 1e-5

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        x = self.activation(
            conv_norm(
                x,
                self.kernel,
                self.width,
                self.stride,
                train=train,
                dtype=self.dtype,
                axis_name=self.axis_name,
                name="conv",
                padding=self.padding,
                epsilon=self.epsilon,
            )
        )
        return nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1))) if self.pool else x


class Chain(Part):
    """Parts (name, factory) one after another."""

    parts: tuple[Stage, ...]

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool, dropout_keys: jax.Array | None = None) -> jax.Array:
        for name, factory in self.parts:
            part = factory(name=name, dtype=self.dtype, axis_name=self.axis_name)
            x = part(x, train=train, dropout_keys=dropout_keys)
        return x


def chain(blocks: Iterable[Callable[..., nn.Module]], **others: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """A factory of `blocks`, named block0, block1, ..., followed by `others` under their names."""
    return partial(Chain, parts=(*((f"block{i}", block) for i, block in enumerate(blocks)), *others.items()))
