"""The only file that knows about devices: choose them, replicate, shard a batch, compile a step.

pmap is the engine for several devices. The state has no device axis: arguments enter replicated (`in_axes=None`), only
the batch is split over its leading axis, and every output is the same on all devices (`out_axes=None`), which a step
guarantees by reducing over the axis before anything nonlinear.
"""
import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

logger = logging.getLogger("asib_jax")

AXIS = "devices"


def local_devices(count: int) -> list[jax.Device]:
    """The first `count` local devices, or all of them for 0. ValueError when fewer exist."""
    available = jax.local_devices()
    if not 0 <= count <= len(available):
        raise ValueError(f"num_devices={count}, but {len(available)} are here: {available}; 0 takes all")
    return available[: count or len(available)]


def check_batch(batch_size: int, devices: Sequence[jax.Device]) -> None:
    """ValueError when the batch does not divide by the number of devices."""
    if batch_size % len(devices):
        raise ValueError(f"dataset.batch_size={batch_size} does not divide by {len(devices)} devices; "
                         f"change it or set num_devices")


def axis_name(devices: Sequence[jax.Device]) -> str | None:
    """The name networks and steps reduce over, or None on one device."""
    return AXIS if len(devices) > 1 else None


def compile_step(step: Callable, devices: Sequence[jax.Device], *, arguments: int, donate_first: bool = False) -> Callable:
    """Compile `step(*replicated, batch)`, whose last of `arguments` arguments is the batch.

    On several devices `step` must have been made with `axis_name(devices)`, and its outputs be equal on all.
    """
    donate = (0,) if donate_first else ()
    if len(devices) == 1:
        return jax.jit(step, donate_argnums=donate)
    return jax.pmap(step, AXIS, in_axes=(None,) * (arguments - 1) + (0,), out_axes=None, donate_argnums=donate,
                    devices=devices)


def keep_compiled(folder: str) -> None:
    """Keep what took 0.3 s or more to compile in `folder`, and take it from there in later runs; "": neither.

    Where JAX_COMPILATION_CACHE_DIR is set, jax's own variables decide instead. Warns where `folder` cannot be written;
    every program is then compiled anew.
    """
    if not folder or "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    try:
        path = pathlib.Path(folder).expanduser()
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    except (OSError, RuntimeError) as error:  # RuntimeError: nobody knows where ~ is
        logger.warning("compilation_cache=%r cannot be written, so nothing compiled is kept: %s", folder, error)
        return
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)  # jax's 1 misses some; 0 gains no more


def replicate(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """A copy of every leaf on every device, placed once. Copied, so that a donated result never deletes its source."""
    mesh = Mesh(np.array(devices), (AXIS,))
    return jax.device_put(jax.tree.map(jnp.copy, tree), NamedSharding(mesh, PartitionSpec()))


def shard(batch: Any, devices: Sequence[jax.Device]) -> Any:
    """Split every [B, ...] leaf into [devices, B / devices, ...]; unchanged on one device."""
    if len(devices) == 1:
        return batch
    return jax.tree.map(lambda x: x.reshape(len(devices), -1, *x.shape[1:]), batch)


def batch_mean(axis: str | None) -> Callable[[jax.Array], jax.Array]:
    """The mean over the global batch of a [B / devices] array, inside a step that reduces over `axis`.

    For values without gradient only: a loss is averaged locally and its gradients are reduced afterwards.
    """
    def mean(x: jax.Array) -> jax.Array:
        return jnp.mean(x) if axis is None else jax.lax.pmean(jnp.mean(x), axis)
    return mean
