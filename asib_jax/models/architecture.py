"""What every network here is made of: an ordered list of named stages, and the layers that several families share."""
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from asib_jax import streams

# From our module's path to PyTorch's name for it: (regular expression of the whole path, replacement as of `re.sub`)
# pairs, of which the first that matches counts.
Names = tuple[tuple[str, str | Callable], ...]


class Architecture(NamedTuple):
    """A backbone as data. The order of `stages` is the declaration that partial freezing works by (SPEC 6).

    stages: (name, factory) pairs; `factory(name=..., dtype=..., axis_name=...)` gives a module whose
        `__call__(x, *, train, dropout_keys)` maps [B, h, w, c] to the next stage's input. train: BatchNorm uses and
        updates batch statistics; dropout_keys: [B] keys, one per example, or None for no dropout of any kind.
    feat_dim: F, the number of channels the last stage gives.
    names: naming conventions of PyTorch weights that fit, most common first; export writes the first.
    pooled_norm: a factory (name=...) of the float32 normalisation between pooling and `feat_2d`; None: there is none.
    dropout: rate before the classifier.
    """

    stages: tuple[tuple[str, Callable[..., nn.Module]], ...]
    feat_dim: int
    names: tuple[Names, ...] = ()
    pooled_norm: Callable[..., nn.Module] | None = None
    dropout: float = 0.0


def symmetric_uniform(bound: float) -> Callable[..., jax.Array]:
    """An initialiser drawing from U(-bound, bound)."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype=jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def linear(x: jax.Array, features: int, name: str) -> jax.Array:
    """A float32 dense layer [..., fan_in] -> [..., features], created in the calling compact method.

    Kernel and bias are drawn from U(-1/sqrt(fan_in), 1/sqrt(fan_in)), as PyTorch's `nn.Linear` does by default.
    """
    init = symmetric_uniform(x.shape[-1] ** -0.5)
    return nn.Dense(features, kernel_init=init, bias_init=init, dtype=jnp.float32, name=name)(x)


def conv(kernel: int, width: int, stride: int, *, dtype: Any, name: str, **options) -> nn.Conv:
    """A square convolution without bias that starts from He normal over fan-out; `options` are those of `nn.Conv`.

    Both sides are padded by kernel // 2: at stride 2 XLA's "SAME" pads only the far side, PyTorch and its weights do
    not. An even kernel is for patches and takes no padding: pass `padding=0`.
    """
    options = {"padding": kernel // 2, "use_bias": False,
               "kernel_init": nn.initializers.variance_scaling(2.0, "fan_out", "normal")} | options
    return nn.Conv(width, (kernel, kernel), stride, dtype=dtype, name=name, **options)


def batch_norm(train: bool, *, dtype: Any, axis_name: str | None, name: str, momentum: float = 0.9,
               epsilon: float = 1e-5) -> nn.BatchNorm:
    """BatchNorm with float32 statistics, from scale 1, bias 0. In training they are of the global batch if `axis_name`
    is given. momentum: the share that the running statistics keep (PyTorch's `momentum` is one minus this)."""
    return nn.BatchNorm(use_running_average=not train, momentum=momentum, epsilon=epsilon, dtype=dtype,
                        axis_name=axis_name, name=name)


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
