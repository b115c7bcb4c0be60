"""Steps compiled for a run's devices, several to a call.

pmap is the engine for several devices. The state has no device axis: arguments enter replicated (`in_axes=None`), only
examples have one, and every output is the same on all devices (`out_axes=None`), which a step guarantees by reducing
over the axis before anything nonlinear.
"""

import logging
import os
import pathlib
import tempfile
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.backend import get_compile_options

from asib_jax.engine.devices import axis_name
from asib_jax.errors import UserError

logger = logging.getLogger("asib_jax")

PRECISION = "highest"  # of float32 matrix products and convolutions: on GPUs float32 too, not TF32


class Call(NamedTuple):
    """What one call takes besides carry, fixed arguments and controls: examples, and their rows [S, B]."""

    resident: dict[str, Any]
    streamed: dict[str, Any]
    rows: np.ndarray


@jax.tree_util.register_pytree_node_class
class Unnamed:
    """A tree as a program returns it, which else holds the names within: one compiled for networks of other names would
    not be found where compiled programs are kept."""

    def __init__(self, tree: Any):
        self.tree = tree

    def tree_flatten(self) -> tuple[Any, Any]:
        return jax.tree.flatten(self.tree)

    @classmethod
    def tree_unflatten(cls, structure: Any, leaves: Any) -> "Unnamed":
        return cls(jax.tree.unflatten(structure, leaves))


class Steps(NamedTuple):
    """A compiled step of which one call does one or `at_once`: two programs, of which each is as short as it can be."""

    compiled: Callable
    at_once: int

    def run(self, carry: Any, fixed: Any, controls: dict, call: Call, each: dict) -> tuple[Any, Any]:
        """The carry and the steps' outputs, [S, ...] leaves. each: controls that differ between steps, [S]."""
        return self.compiled(carry, fixed, controls, call.resident, call.streamed, call.rows, each).tree


def compile_steps(step: Callable, devices: Sequence[jax.Device], *, donate_carry: bool = False) -> Callable:
    """Compile `call(carry, fixed, controls, resident, streamed, rows, each) -> Unnamed((carry, outputs))`.

    step: `(carry, fixed, controls, batch) -> (carry, outputs)`, made with `axis_name(devices)`; on several devices its
    results are equal on all. rows: [S, B], row i of which is the batch's "row" in step i; resident: examples as
    `devices.spread` places them, of which it takes these rows; streamed: those that `devices.place_steps` has placed
    for it; each: [S] leaves, controls of one step. outputs: of each step, [S, ...] leaves.
    """
    axis = axis_name(devices)

    def call(carry, fixed, controls, resident, streamed, rows, each):
        # Gathered before the loop: one exchange between devices, and no copy of all examples for the loop to hold.
        batches = {"row": _own(rows, axis), **jax.tree.map(lambda x: _take(x, rows, axis), resident), **streamed}

        with jax.default_matmul_precision(PRECISION):
            if len(rows) == 1:
                batch, own = jax.tree.map(lambda x: x[0], (batches, each))
                carry, outputs = step(carry, fixed, {**controls, **own}, batch)
                return Unnamed((carry, jax.tree.map(lambda x: x[None], outputs)))
            return Unnamed(
                jax.lax.scan(lambda carry, x: step(carry, fixed, {**controls, **x[1]}, x[0]), carry, (batches, each))
            )

    donate = (0,) if donate_carry else ()
    axes = (None, None, None, 0, 0, None, None)
    if axis is None:
        return jax.jit(call, donate_argnums=donate)
    return jax.pmap(call, axis, in_axes=axes, out_axes=None, donate_argnums=donate, devices=devices)


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
    into its fast form outside loops only), so that a step that needs them is no part of one there.
    """
    on_cpu = devices[0].platform == "cpu"
    return min(configured or (1 if on_cpu and trains_convolutions else 32), most_in_flight(devices))


def most_in_flight(devices: Sequence[jax.Device]) -> int:
    """How many steps may be under way at once: collectives of several simulated devices stall beyond 32."""
    return 32 if len(devices) > 1 and devices[0].platform == "cpu" else 1024


def be_deterministic() -> None:
    """Have XLA take only kernels for GPUs that give the same bits every time, and choose them without measuring.

    Call it before any device is used. Raises UserError where XLA has read its flags already.
    """
    flag = "xla_gpu_deterministic_ops"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{flag}=true".strip()  # the last one counts
    options = get_compile_options(num_replicas=1, num_partitions=1)  # held: its parts are views of it
    if f"{flag}: true" not in str(options.executable_build_options.debug_options):
        raise UserError(
            f"deterministic=True comes too late, XLA has read its flags: set XLA_FLAGS=--{flag}=true in the environment"
        )


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
