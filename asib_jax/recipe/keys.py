"""What is told of a configuration key where it is declared, and everything that is read from there.

A group of keys is a frozen dataclass whose fields `key` makes:

    tau: float = key(4.0, "distillation temperature", above=0, when=TEACHERS)

The annotation is the type. That is all a key needs beside the code that uses it: its value in a configuration, its
checks, the warning where it has no effect, what a resumed run may change and its line in docs/configuration.md are read
from the field. A field that holds a group is a group of keys, one that holds a tuple of them (`teachers`) the groups
teacher1, teacher2, ...
"""

import dataclasses
import functools
import math
import re
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from asib_jax.errors import UserError

_INT_LIMIT = 2**31  # steps, rows and seeds are 32 bits wide on devices


@dataclasses.dataclass(frozen=True)
class When:
    """A condition under which keys act: in words, what they act with; `holds` takes the recipe, and before it, for keys
    of a numbered group, that group."""

    words: str
    holds: Callable[..., bool]

    def __and__(self, other: "When") -> "When":
        words = ", ".join(filter(None, (self.words, other.words)))
        return When(words, lambda *groups: self.holds(*groups) and other.holds(*groups))


ALWAYS = When("", lambda *groups: True)


@dataclasses.dataclass(frozen=True)
class Key:
    """What is told of a key beside its name, type and default.

    at_least, above, at_most, below: the range of a number, or of each in a tuple. choices: the only values. lengths:
    of a tuple. when: it acts; elsewhere it has no effect. free: a resumed run may have another value. of_data: where it
    is empty the data tell it (`told_by_data.py`).
    """

    meaning: str
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    choices: tuple = ()
    lengths: tuple[int, ...] = ()
    when: When = ALWAYS
    free: bool = False
    of_data: bool = False

    def range(self) -> str:
        """In words, e.g. "at least 1", "positive" or "in [0, 1)"; "" where there is none."""
        if self.at_most is None and self.below is None:
            lower = "positive" if self.above == 0 else f"above {self.above}"
            return lower if self.above is not None else "" if self.at_least is None else f"at least {self.at_least:g}"
        lower = f"({self.above:g}" if self.at_least is None else f"[{self.at_least:g}"
        return f"in {lower}, {self.below:g})" if self.at_most is None else f"in {lower}, {self.at_most:g}]"

    def check(self, name: str, value: Any) -> None:
        """UserError for a value that the key called `name` cannot have."""
        if self.choices and value not in self.choices:
            raise UserError(f"{name}={value!r}; valid: {', '.join(map(repr, self.choices))}")
        if self.lengths and len(value) not in self.lengths:
            raise UserError(f"{name}={value} needs {self.lengths[-1]} entries, or none")
        for number in value if isinstance(value, tuple) else (value,):
            # Comparisons with nan are false, and what is too large wraps around.
            if isinstance(number, float) and not math.isfinite(number):
                raise UserError(f"{name}={value} must be finite")
            if isinstance(number, int) and abs(number) >= _INT_LIMIT:
                raise UserError(f"{name}={value} must be less than 2**31 = {_INT_LIMIT}")
            if number is not None and not self._holds(number):
                raise UserError(f"{name}={value} must be {self.range()}")

    def _holds(self, number: float) -> bool:
        return (
            (self.at_least is None or number >= self.at_least)
            and (self.above is None or number > self.above)
            and (self.at_most is None or number <= self.at_most)
            and (self.below is None or number < self.below)
        )


def key(default: Any, meaning: str, **told: Any) -> Any:
    """The field of a key or of a group of keys; told: the other fields of `Key`."""
    return dataclasses.field(default=default, metadata={"key": Key(meaning, **told)})


def numbered(hint: Any) -> bool:
    """Whether a field of this type holds groups that are numbered from 1: a tuple of them."""
    return typing.get_origin(hint) is tuple and dataclasses.is_dataclass(typing.get_args(hint)[0])


class Held(NamedTuple):
    """A key as a recipe holds it, under its full name ("tau", "dataset.name", "teacher1.weights"). `when` is asked
    without arguments: `when.holds()`."""

    name: str
    value: Any
    key: Key
    when: When


def walk(recipe: Any) -> Iterator[Held]:
    """Every key of a recipe, in the order of the fields. A group's `when` is one of each of its keys."""
    return _walk(recipe, (recipe,), "", ALWAYS)


def _walk(group: Any, groups: tuple, prefix: str, outer: When) -> Iterator[Held]:
    for field in dataclasses.fields(group):
        told, value, name = field.metadata["key"], getattr(group, field.name), prefix + field.name
        when = outer & When(told.when.words, functools.partial(told.when.holds, *groups))
        if numbered(field.type):
            for number, item in enumerate(value, 1):
                yield from _walk(item, (item, *groups), f"{name.removesuffix('s')}{number}.", when)
        elif dataclasses.is_dataclass(value):
            yield from _walk(value, groups, f"{name}.", when)
        else:
            yield Held(name, value, told, when)


def flat(recipe: Any) -> dict[str, Any]:
    """Every value under its full name: {"tau": 4.0, "dataset.name": ..., "teacher1.name": ..., ...}."""
    return {held.name: held.value for held in walk(recipe)}


def check(recipe: Any) -> None:
    """UserError, naming key, value and what is allowed, for a value outside its key's range or choices."""
    for held in walk(recipe):
        held.key.check(held.name, held.value)


def idle(recipe: Any) -> set[str]:
    """Every key that no code acts on under this recipe."""
    return {held.name for held in walk(recipe) if not held.when.holds()}


def without_effect(recipe: Any, defaults: Any) -> list[str]:
    """Keys set away from `defaults` that have no effect in this run, sorted; a teacher's where both have it."""
    ours, theirs = flat(recipe), flat(defaults)
    return sorted(name for name in idle(recipe) & theirs.keys() if ours[name] != theirs[name])


def that_matter(recipe: Any) -> dict[str, Any]:
    """Every value that a resumed run must share, under its full name."""
    return {held.name: held.value for held in walk(recipe) if not held.key.free}


def table(defaults: Any) -> str:
    """All keys as a Markdown table; those of teacher1, teacher2, ... once, as `teacherK`."""
    lines = ["| key | default | meaning | values | acts with | resume |", "|---|---|---|---|---|---|"]
    rows: dict[str, list[Held]] = {}
    for held in walk(defaults):
        rows.setdefault(re.sub(r"\d+\.", "K.", held.name), []).append(held)
    for name, helds in rows.items():
        told = helds[0].key
        cells = (
            ", ".join(dict.fromkeys(f"`{held.value!r}`" for held in helds)),
            told.meaning,
            values(told),
            helds[0].when.words,
            "free" if told.free else "",
        )
        lines.append(f"| `{name}` | {' | '.join(cells)} |".replace("|  |", "| |").replace("|  |", "| |"))
    return "\n".join(lines) + "\n"


def values(told: Key) -> str:
    """What a key can be, in words; "" where its type says it all."""
    if told.choices:
        return ", ".join(f"`{choice!r}`" for choice in told.choices)
    lengths = f"{told.lengths[-1]} or none" if told.lengths else ""
    return ", ".join(filter(None, (lengths, told.range())))
