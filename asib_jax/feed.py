"""How examples reach compiled steps: from the devices where they fit there, else from the host, one call ahead."""
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from asib_jax import hosts, parallel

_STREAMED_BYTES = 2 ** 28  # of one call's examples that come from the host; two calls' are on the devices at a time


@dataclasses.dataclass(frozen=True, eq=False)
class Examples:
    """Named leaves of one length N: on the devices, as `parallel.spread` has them, or arrays [N, ...] on the host."""

    resident: dict[str, Any]
    host: dict[str, Any]


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
        """The examples of the given leaves ([N, ...], trees of them allowed), which leave their room when dropped."""
        size = -(-example_bytes(leaves) // len(self.devices))
        # Agreed upon: what is still taken depends on when a host's garbage was collected.
        (fits,) = hosts.everywhere([self._taken[0] + size <= self.room_gb * 2 ** 30])
        if not fits:
            return Examples({}, leaves)
        examples = Examples(parallel.spread(leaves, self.devices), {})
        self._take(size)
        weakref.finalize(examples, self._take, -size)
        return examples

    def _take(self, size: int) -> None:
        self._taken[0] += size

    def compile(self, step: Callable, *, trains_convolutions: bool = False, donate_carry: bool = False) -> Steps:
        """`parallel.compile_steps` for these devices."""
        at_once = parallel.steps_per_call(self.steps, self.devices, trains_convolutions=trains_convolutions)
        return Steps(parallel.compile_steps(step, self.devices, donate_carry=donate_carry), at_once)

    def calls(self, steps: Steps, rows: np.ndarray, *parts: Examples) -> Iterator[Call]:
        """The calls of `steps` on the batches `rows` [S, B] of all parts, which are of one length.

        Rows beyond it stand for no example.
        """
        resident = functools.reduce(dict.__or__, (part.resident for part in parts), {})
        host = functools.reduce(dict.__or__, (part.host for part in parts), {})
        size = steps.at_once
        if host:
            one_step = rows.shape[1] * sum(example_bytes(leaf) / len(leaf) for leaf in jax.tree.leaves(host))
            size = max(1, min(size, int(_STREAMED_BYTES / one_step)))
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
