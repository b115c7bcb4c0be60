"""Every random stream of a run, derived from its seed, a name and a position.

Nothing random is ever carried from step to step: what is drawn at (seed, name, position) is the same in every
configuration and on any number of devices (SPEC 7).
"""

import zlib

import jax
import numpy as np


def _identity(name: str) -> int:
    return zlib.crc32(name.encode())  # `hash` differs between processes


def key(seed: int, name: str, *position: int) -> jax.Array:
    """A typed PRNG key for the stream `name` at `position`, e.g. `key(seed, "augment", stage, epoch)`."""
    out = jax.random.fold_in(jax.random.key(seed), _identity(name))
    for coordinate in position:
        out = jax.random.fold_in(out, coordinate)
    return out


def rng(seed: int, name: str, *position: int) -> np.random.Generator:
    """The same on the host: a numpy generator for splits and permutations."""
    return np.random.default_rng([seed, _identity(name), *position])


def per_example(stream: jax.Array, index: jax.Array) -> jax.Array:
    """One key per data-set index ([B] integers), so that what an example draws depends on no batch and no device."""
    return jax.vmap(lambda i: jax.random.fold_in(stream, i))(index)


def branch(keys: jax.Array, name: str) -> jax.Array:
    """The streams called `name` below these keys ([B] typed keys), one for each."""
    return jax.vmap(lambda key: jax.random.fold_in(key, _identity(name)))(keys)
