"""How examples reach compiled steps: from the devices where they fit there, else from the host, one call ahead."""
import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from asib_jax.engine import hosts, parallel

_CALL_BYTES = 2 ** 28  # of one call's examples; two calls' are on the devices at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Named leaves of `count` examples: on the devices as `parallel.spread` has them, or [N, ...] on the host."""

    count: int
    bytes_each: float
    resident: dict[str, Any]
    host: dict[str, Any]


def on_host(**leaves: Any) -> Examples:
    """Examples of the given leaves ([N, ...], trees of them allowed) that wait in host memory."""
    (count,) = {len(leaf) for leaf in jax.tree.leaves(leaves)}
    return Examples(count, example_bytes(leaves) / count, {}, leaves)


class Call(NamedTuple):
    """What one call takes besides carry, fixed arguments and controls; the first `steps` of its rows are to be done."""

    resident: dict[str, Any]
    streamed: dict[str, Any]
    rows: np.ndarray
    steps: int


class Steps(NamedTuple):
    """A compiled step of which one call does up to `at_once`."""

    compiled: Callable
    at_once: int

    def run(self, carry: Any, fixed: Any, controls: dict, call: Call, each: dict) -> tuple[Any, Any]:
        """The carry and the steps' outputs, [S, ...] leaves. each: controls that differ between steps, [steps]."""
        each = {name: _padded(values, len(call.rows)) for name, values in each.items()}
        return self.compiled(carry, fixed, controls, call.resident, call.streamed, call.rows, each,
                             np.int32(call.steps))


@dataclasses.dataclass(frozen=True)
class Feed:
    """The devices, and the room on each that examples may take.

    room_gb: GiB a device. steps: of one compiled call; 0: as `parallel.steps_per_call` chooses.
    """

    devices: tuple[jax.Device, ...]
    room_gb: float
    steps: int = 0
    _taken: list[int] = dataclasses.field(default_factory=lambda: [0], compare=False)  # bytes on each device

    @property
    def axis_name(self) -> str | None:
        return parallel.axis_name(self.devices)

    def place(self, **leaves: Any) -> Examples:
        """Examples of the given leaves ([N, ...], trees of them allowed), which leave their room when dropped."""
        return self.place_alike([leaves])[0]

    def place_alike(self, many: Sequence[dict[str, Any]]) -> list[Examples]:
        """The same of several, all on the devices or all on the host, so that one program serves them."""
        waiting = [on_host(**leaves) for leaves in many]
        sizes = [-(-example_bytes(leaves) // len(self.devices)) for leaves in many]
        # Agreed upon: what is still taken depends on when a host's garbage was collected.
        (fits,) = hosts.everywhere([self._taken[0] + sum(sizes) <= self.room_gb * 2 ** 30])
        if not fits:
            return waiting
        placed = []
        for examples, size in zip(waiting, sizes):
            resident = parallel.spread(examples.host, self.devices)
            placed.append(dataclasses.replace(examples, resident=resident, host={}))
            self._take(size)
            weakref.finalize(placed[-1], self._take, -size)
        return placed

    def _take(self, size: int) -> None:
        self._taken[0] += size

    def compile(self, step: Callable, *, trains_convolutions: bool = False, donate_carry: bool = False) -> Steps:
        """`parallel.compile_steps` for these devices."""
        at_once = parallel.steps_per_call(self.steps, self.devices, trains_convolutions=trains_convolutions)
        return Steps(parallel.compile_steps(step, self.devices, donate_carry=donate_carry), at_once)

    def calls(self, steps: Steps, rows: np.ndarray, *parts: Examples) -> Iterator[Call]:
        """The calls of `steps` on the batches `rows` [S, B] of all parts. Rows beyond them stand for no example.

        Raises ValueError for parts of unequal length.
        """
        if len({part.count for part in parts}) != 1:
            raise ValueError(f"parts of {[part.count for part in parts]} examples are no batch together")
        resident = {name: leaf for part in parts for name, leaf in part.resident.items()}
        host = {name: leaf for part in parts for name, leaf in part.host.items()}
        one_step = rows.shape[1] * sum(part.bytes_each for part in parts)
        size = max(1, min(steps.at_once, int(_CALL_BYTES / one_step)))
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            whole = np.int32(_padded(part, size))
            yield Call(resident, parallel.place_steps(host, whole, self.devices), whole, len(part))


def example_bytes(leaves: Any) -> int:
    """Bytes of all leaves, which are arrays, what behaves like one, or their shapes."""
    return sum(int(np.prod(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(leaves))


def _padded(values: np.ndarray, size: int) -> np.ndarray:
    """[size, ...], the last entry repeated."""
    return values if len(values) == size else np.concatenate([values, values[-1:].repeat(size - len(values), axis=0)])
