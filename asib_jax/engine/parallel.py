"""The only file that knows about devices: choose them, replicate, spread examples, compile steps.

pmap is the engine for several devices. The state has no device axis: arguments enter replicated (`in_axes=None`), only
examples have one, and every output is the same on all devices (`out_axes=None`), which a step guarantees by reducing
over the axis before anything nonlinear. Of several hosts each gives and gets the arrays of its own devices.
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
from jax.extend.backend import get_compile_options
from jax.extend.core import jaxpr_as_fun
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asib_jax.errors import UserError

logger = logging.getLogger("asib_jax")

AXIS = "devices"


def run_devices(count: int) -> list[jax.Device]:
    """The first `count` devices of each host, or all of them for 0, host by host.

    Raises UserError where there are fewer, or the hosts have not as many, which pmap asks for.
    """
    hosts = [jax.local_devices(process_index=host) for host in range(jax.process_count())]
    if len({len(devices) for devices in hosts}) > 1:
        raise UserError(f"the hosts have {[len(devices) for devices in hosts]} devices: give each as many, with "
                         "CUDA_VISIBLE_DEVICES")
    if not 0 <= count <= len(hosts[0]):
        raise UserError(f"num_devices={count}, but {len(hosts[0])} are here: {hosts[0]}; 0 takes all")
    return [device for devices in hosts for device in devices[: count or len(devices)]]


def _places_here(devices: Sequence[jax.Device]) -> slice:
    """The places of this host's devices among all. pmap takes and gives a host's arrays; none holds another's."""
    here = [place for place, device in enumerate(devices) if device.process_index == jax.process_index()]
    return slice(here[0], here[-1] + 1)


def check_batch(batch_size: int, devices: Sequence[jax.Device]) -> None:
    """UserError when the batch does not divide by the number of devices."""
    if batch_size % len(devices):
        raise UserError(f"dataset.batch_size={batch_size} does not divide by {len(devices)} devices; "
                         f"change it or set num_devices")


def axis_name(devices: Sequence[jax.Device]) -> str | None:
    """The name networks and steps reduce over, or None on one device."""
    return AXIS if len(devices) > 1 else None


def compile_steps(step: Callable, devices: Sequence[jax.Device], *, donate_carry: bool = False) -> Callable:
    """Compile `call(carry, fixed, controls, resident, streamed, rows, each, count) -> (carry, outputs)`.

    step: `(carry, fixed, controls, batch) -> (carry, outputs)`, made with `axis_name(devices)`; on several devices its
    results are equal on all. rows: [S, B], row i of which is the batch's "row" in step i; resident: examples as `spread`
    places them, of which it takes these rows; streamed: those that `place_steps` has placed for it; each: [S] leaves,
    controls of one step; count: how many steps, at most S. outputs: of each step, [S, ...] leaves.
    """
    axis = axis_name(devices)

    def call(carry, fixed, controls, resident, streamed, rows, each, count):
        # Gathered before the loop: one exchange between devices, and no copy of all examples for the loop to hold.
        batches = {"row": _own(rows, axis), **jax.tree.map(lambda x: _take(x, rows, axis), resident), **streamed}

        def one(carry, fixed, controls, batches, each, i):
            batch, own = jax.tree.map(lambda x: x[i], (batches, each))
            return step(carry, fixed, {**controls, **own}, batch)

        given = fixed, controls, batches, each
        if len(rows) == 1:
            carry, outputs = one(carry, *given, jnp.int32(0))
            return carry, jax.tree.map(lambda x: x[None], outputs)
        # Traced once, before the loop, which has to begin with outputs of their shapes.
        traced, shapes = jax.make_jaxpr(one, return_shape=True)(carry, *given, jnp.int32(0))

        def body(i, held):
            leaves = jaxpr_as_fun(traced)(*jax.tree.leaves((held[0], *given, i)))
            carry, outputs = jax.tree.unflatten(jax.tree.structure(shapes), leaves)
            return carry, jax.tree.map(lambda all, x: all.at[i].set(x), held[1], outputs)

        empty = jax.tree.map(lambda x: jnp.zeros((len(rows), *x.shape), x.dtype), shapes[1])
        return jax.lax.fori_loop(0, count, body, (carry, empty))

    donate = (0,) if donate_carry else ()
    if axis is None:
        return jax.jit(call, donate_argnums=donate)
    return jax.pmap(call, axis, in_axes=(None, None, None, 0, 0, None, None, None), out_axes=None,
                    donate_argnums=donate, devices=devices)


def _take(x: jax.Array, rows: jax.Array, axis: str | None) -> jax.Array:
    """The rows [S, B] of examples that lie on one device ([N, ...]) or, n each, on all: of those this device's
    [S, B / D].

    Every device brings the rows it has and zero for the others: their sum is exact.
    """
    here = rows if axis is None else rows - jax.lax.axis_index(axis) * len(x)
    inside = jnp.clip(here, 0, len(x) - 1)
    taken = x.at[inside].get(mode="promise_in_bounds")  # 20 times as fast on CPUs as where XLA has to look after bounds
    if axis is None:
        return taken
    mine = (here == inside).reshape(*rows.shape, *[1] * (x.ndim - 1))
    brought = jnp.where(mine, taken, jnp.zeros((), x.dtype))
    return jax.lax.psum_scatter(brought, axis, scatter_dimension=1, tiled=True)


def _own(rows: jax.Array, axis: str | None) -> jax.Array:
    """This device's [S, B / D] of the rows [S, B]."""
    if axis is None:
        return rows
    return rows.reshape(len(rows), jax.lax.axis_size(axis), -1)[:, jax.lax.axis_index(axis)]


def steps_per_call(configured: int, devices: Sequence[jax.Device], *, trains_convolutions: bool) -> int:
    """How many steps one compiled call does; 0 chooses.

    XLA compiles loops for CPUs whose convolution gradients are 40 times slower than outside (it brings convolutions
    into its fast form outside loops only), so that a step that needs them is no part of one there. Collectives of
    several simulated devices stall beyond 32 steps.
    """
    on_cpu = devices[0].platform == "cpu"
    chosen = configured or (1 if on_cpu and trains_convolutions else 32)
    return min(chosen, 32) if on_cpu and len(devices) > 1 else chosen


def be_deterministic() -> None:
    """Have XLA take only kernels for GPUs that give the same bits every time, and choose them without measuring.

    Call it before any device is used. Raises UserError where XLA has read its flags already.
    """
    flag = "xla_gpu_deterministic_ops"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}=true".strip()  # the last one counts
    options = get_compile_options(num_replicas=1, num_partitions=1)  # held: its parts are views of it
    if f"{flag}: true" not in str(options.executable_build_options.debug_options):
        raise UserError("deterministic=True comes too late, XLA has read its flags: set "
                        f"XLA_FLAGS=--{flag}=true in the environment")


def keep_compiled(folder: str) -> None:
    """Keep what took 0.3 s or more to compile in `folder`, and take it from there in later runs; "": neither.

    Where JAX_COMPILATION_CACHE_DIR is set, jax's own variables decide instead. Warns where `folder` cannot be written;
    every program is then compiled anew. Neither on several hosts: only the first would write, and a program that it
    alone finds is not compiled with the others, who wait for its share of the tuning.
    """
    if not folder or "JAX_COMPILATION_CACHE_DIR" in os.environ or jax.process_count() > 1:
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
    return jax.device_put(jax.tree.map(jnp.copy, tree), _sharding(devices, PartitionSpec()))


def share(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Every leaf on every device, copied to those only that have it not. Never donate what comes of it."""
    return jax.device_put(tree, _sharding(devices, PartitionSpec()))


def spread(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Examples, leaves [N, ...], on the devices: whole on one, else in parts [D, n, ...], the last one padded.

    Here and in `place_steps` a host reads and holds the parts of its own devices only.
    """
    places = _places_here(devices)

    def parts(leaf):
        size = -(-len(leaf) // len(devices))
        first, padded = places.start * size, _empty((places.stop - places.start) * size, leaf)
        for start in range(0, len(padded), 4096):  # a whole copy of selected images would take as much once more
            part = leaf[first + start : first + start + min(4096, len(padded) - start)]
            padded[start : start + len(part)] = part
            padded[start + len(part) : start + 4096] = 0
        return padded if len(devices) == 1 else padded.reshape(-1, size, *leaf.shape[1:])

    parts_of_all = jax.tree.map(parts, tree)
    return jax.device_put(parts_of_all, devices[0]) if len(devices) == 1 else _over_devices(parts_of_all, devices)


def _empty(length: int, like: np.ndarray) -> np.ndarray:
    """An array [length, ...] that begins at a multiple of 64 bytes: a CPU device takes it over without a copy."""
    size = length * int(np.prod(like.shape[1:])) * like.dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(like.dtype).reshape(length, *like.shape[1:])


def place_steps(leaves: Any, rows: np.ndarray, devices: Sequence[jax.Device]) -> Any:
    """The examples `rows` [S, B] of host leaves [N, ...] on the devices: [S, B, ...], or [D, S, B / D, ...].

    Rows beyond N - 1 stand for no example; they get the last one's values.
    """
    if len(devices) > 1:
        rows = rows.reshape(len(rows), len(devices), -1).swapaxes(0, 1)[_places_here(devices)]
    chosen = jax.tree.map(lambda leaf: leaf[np.minimum(rows, len(leaf) - 1)], leaves)
    return jax.device_put(chosen, devices[0]) if len(devices) == 1 else _over_devices(chosen, devices)


def _over_devices(tree: Any, devices: Sequence[jax.Device]) -> Any:
    return jax.device_put(tree, _sharding(devices, PartitionSpec(AXIS)))


def _sharding(devices: Sequence[jax.Device], spec: PartitionSpec) -> NamedSharding:
    """Over this host's devices, as pmap has it."""
    return NamedSharding(Mesh(np.array(devices[_places_here(devices)]), (AXIS,)), spec)


def batch_mean(axis: str | None) -> Callable[[jax.Array], jax.Array]:
    """The mean over the global batch of a [B / devices] array, inside a step that reduces over `axis`.

    For values without gradient only: a loss is averaged locally and its gradients are reduced afterwards.
    """
    def mean(x: jax.Array) -> jax.Array:
        return jnp.mean(x) if axis is None else jax.lax.pmean(jnp.mean(x), axis)
    return mean
