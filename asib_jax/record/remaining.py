"""How much of a run is left: its epochs, and a time from those that have been measured."""

import collections
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Part(NamedTuple):
    """A phase as far as it takes time. kind: phases of one kind take alike, "b" and "control/b" until the second has
    been measured itself; steps: of all its epochs together."""

    name: str
    kind: str
    epochs: int


class Remaining:
    """Told of every phase that begins and of every epoch that ends.

    parts: all phases, in their order; one that is not among them is added when it begins. clock: of seconds.
    """

    def __init__(self, parts: Sequence[Part] = (), clock: Callable[[], float] = time.monotonic):
        self._parts = {part.name: part for part in parts}
        self._left = {part.name: part.epochs for part in parts}
        self._took: dict[str, float] = {}  # seconds of the last epoch, by kind
        self._once: set[str] = set()  # kinds of which that is the first, with what was compiled
        self._clock, self._since = clock, clock()

    def begin(self, part: Part, done: int = 0) -> str:
        """The phase begins, or goes on after so many epochs; all before it are over. Its place, in words."""
        self._parts.setdefault(part.name, part)
        names = list(self._parts)
        place = names.index(part.name)
        self._left |= dict.fromkeys(names[:place], 0) | {part.name: part.epochs - done}
        self._since = self._clock()
        return f"phase {place + 1} of {len(names)}"

    def epoch(self, name: str) -> None:
        """An epoch of the phase is over, with all that belongs to it."""
        now = self._clock()
        self._left[name] -= 1
        kind = self._parts[name].kind
        self._once = self._once - {kind} if kind in self._took else self._once | {kind}
        self._took[kind] = now - self._since
        self._since = now

    def text(self) -> str:
        """E.g. "24 epochs left, about 40 s"; "over" where some kind of phase has not been measured yet, "at most" where
        one only with what was compiled, and no time where there is no bound."""
        left: collections.Counter[str] = collections.Counter()  # by kind
        for name, epochs in self._left.items():
            kind = self._parts[name].kind
            left[kind if kind in self._took else kind.rpartition("/")[2]] += epochs
        kinds = {kind for kind, epochs in left.items() if epochs}
        if not kinds:
            return "no epoch left"
        unknown, once = kinds - self._took.keys(), kinds & self._once
        if unknown and (once or unknown == kinds):
            return f"{left.total()} epochs left"
        bound = "over" if unknown else "at most" if once else "about"
        seconds = sum(epochs * self._took.get(kind, 0.0) for kind, epochs in left.items())
        return f"{left.total()} epochs left, {bound} {duration(seconds)}"


def duration(seconds: float) -> str:
    """In words with two figures at most: "40 s", "12 min", "3.5 h", "2.1 days"."""
    for limit, unit, name in ((90, 1, "s"), (5400, 60, "min"), (172_800, 3600, "h")):
        if seconds < limit:
            return f"{seconds / unit:.2g} {name}" if seconds / unit < 10 else f"{seconds / unit:.0f} {name}"
    return f"{seconds / 86_400:.2g} days"
