"""How examples reach compiled steps: from the devices where they fit there, else from the host, one call ahead."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from asib_jax.engine import devices as devices_
from asib_jax.engine.compiled import Call, Steps, compile_steps, steps_per_call

GIB = 2**30
_CALL_BYTES = 2**28  # of one call's examples; two calls' are on the devices at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Named leaves of `count` examples: on the devices as `devices.spread` has them, or [N, ...] on the host."""

    count: int
    bytes_each: float
    resident: dict[str, Any]
    host: dict[str, Any]


def on_host(**leaves: Any) -> Examples:
    """Examples of the given leaves ([N, ...], trees of them allowed) that wait in host memory."""
    (count,) = {len(leaf) for leaf in jax.tree.leaves(leaves)}
    return Examples(count, tree_bytes(leaves) / count, {}, leaves)


@dataclasses.dataclass(frozen=True)
class Feed:
    """The devices, and the room on each that examples may take.

    room_gb: GiB a device. steps: of one compiled call; 0: as `compiled.steps_per_call` chooses. eval_batch: images of
    a batch that is not trained on, over all devices; 0: as `eval_batch_size` chooses.
    """

    devices: tuple[jax.Device, ...]
    room_gb: float
    steps: int = 0
    eval_batch: int = 0

    @property
    def axis_name(self) -> str | None:
        return devices_.axis_name(self.devices)

    @property
    def room(self) -> float:
        """Bytes that examples may take on all devices together."""
        return self.room_gb * GIB * len(self.devices)

    @property
    def eval_batch_size(self) -> int:
        """Images of a batch of evaluation and of reading: a multiple of the devices."""
        each = 256 if self.devices[0].platform != "cpu" else 32
        wanted = self.eval_batch or each * len(self.devices)
        return -(-wanted // len(self.devices)) * len(self.devices)

    def place(self, **leaves: Any) -> Examples:
        """Examples of the given leaves on the devices, spread over them; on the host where they exceed the room."""
        waiting = on_host(**leaves)
        if tree_bytes(leaves) > self.room:
            return waiting
        return dataclasses.replace(waiting, resident=devices_.spread(leaves, self.devices), host={})

    def compile(self, step: Callable, *, trains_convolutions: bool = False, donate_carry: bool = False) -> Steps:
        """`compiled.compile_steps` for these devices."""
        at_once = steps_per_call(self.steps, self.devices, trains_convolutions=trains_convolutions)
        return Steps(compile_steps(step, self.devices, donate_carry=donate_carry), at_once)

    def calls(self, steps: Steps, rows: np.ndarray, *parts: Examples) -> Iterator[Call]:
        """The calls of `steps` on the batches `rows` [S, B] of all parts: whole ones, then the rest one by one.

        Who goes on after a call finds the calls that were to come, so that the same programs do the same steps. Rows
        beyond the examples stand for none. Raises ValueError for parts of unequal length.
        """
        if len({part.count for part in parts}) != 1:
            raise ValueError(f"parts of {[part.count for part in parts]} examples are no batch together")
        resident = {name: leaf for part in parts for name, leaf in part.resident.items()}
        host = {name: leaf for part in parts for name, leaf in part.host.items()}
        one_step = rows.shape[1] * sum(part.bytes_each for part in parts)
        size, start = max(1, min(steps.at_once, int(_CALL_BYTES / one_step))), 0
        while start < len(rows):
            count = size if start + size <= len(rows) else 1
            part = rows[start : start + count].astype(np.int32)
            yield Call(resident, devices_.place_steps(host, part, self.devices), part)
            start += count


def tree_bytes(leaves: Any) -> int:
    """Bytes of all leaves, which are arrays, what behaves like one, or their shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))
