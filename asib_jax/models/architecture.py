"""What every network here is made of: an ordered list of named stages, and one linear layer."""
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp


class Architecture(NamedTuple):
    """A backbone as data. The order of `stages` is the declaration that partial freezing works by (SPEC 6).

    stages: (name, factory) pairs; `factory(name=..., dtype=..., axis_name=...)` gives a module whose
        `__call__(x, *, train)` maps [B, h, w, c] to the next stage's input.
    feat_dim: F, the number of channels the last stage gives.
    """

    stages: tuple[tuple[str, Callable[..., nn.Module]], ...]
    feat_dim: int


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
