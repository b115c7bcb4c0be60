"""Which of a data set's classes a network knows: label numbers, from and to text (SPEC 11)."""

import math
import re
from collections.abc import Sequence
from fractions import Fraction

from asib_jax.errors import UserError

_NUMBERS = re.compile("([0-9]{1,9})\\s*(?:-\\s*([0-9]{1,9}))?")


def parse(text: str, count: int, key: str, names: Sequence[str] = ()) -> tuple[int, ...]:
    """The labels that `text` lists, in its order: "0-59,70"; (): all `count` classes, which is what "" means.

    A part is a label number, a range of them with its end, or one of the data's class `names`; what reads as numbers is
    numbers. Raises UserError, naming the configuration `key`, for a part that is none of these, a label or name out of
    range or given twice, a range that runs backwards, and for fewer than two classes.
    """
    labels: list[int] = []
    for part in (part.strip() for part in text.split(",")) if text else ():
        match = _NUMBERS.fullmatch(part)
        if match:
            first, last = int(match[1]), int(match[2] or match[1])
        elif part in names:
            first = last = list(names).index(part)
        else:
            known = f", or a class's name: {', '.join(names[:5])}{', ...' * (len(names) > 5)}" if names else ""
            known += " (one with a comma or spaces around it goes by its number)" * any(
                "," in name or name != name.strip() for name in names
            )
            _refuse(key, text, f"{part!r} is neither a label number nor a range as 3-5{known}", count)
        if last < first:
            _refuse(key, text, f"the range {part} runs backwards", count)
        if last >= count:
            _refuse(key, text, f"there is no label {last}", count)
        labels += range(first, last + 1)
    if twice := sorted({label for label in labels if labels.count(label) > 1}):
        _refuse(key, text, f"label {twice[0]} is named twice", count)
    if text and len(labels) < 2:
        _refuse(key, text, "a teacher needs two classes to tell apart", count)
    return () if labels == list(range(count)) else tuple(labels)


def _refuse(key: str, text: str, why: str, count: int) -> None:
    raise UserError(
        f"{key}={text!r}: {why}; labels are 0..{count - 1}, e.g. --config.{key}=0-{count // 2}, and empty means all"
    )


def text_of(labels: Sequence[int]) -> str:
    """The shortest text that `parse` reads as these labels: (0, 1, 2, 7) is "0-2,7"."""
    runs: list[list[int]] = []
    for label in labels:
        if runs and label == runs[-1][-1] + 1:
            runs[-1].append(label)
        else:
            runs.append([label])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)


def plain(text: str) -> bool:
    """Whether it can be read without the names of classes."""
    return all(_NUMBERS.fullmatch(part.strip()) for part in text.split(",")) if text else True


def windows(count: int, teachers: int, overlap: float) -> list[tuple[int, ...]]:
    """For each of so many teachers a range of the `count` classes, all of one width before rounding and evenly spread.

    Neighbours share `overlap` percent of all classes: with 2 teachers of 10 classes 20 gives 0-5 and 4-9, 0 halves, 100
    all classes to each. Together they are all of them. Raises UserError naming `specialists.overlap` where one would
    have fewer than two classes.
    """
    shared = Fraction(overlap) * count / 100  # exact: rounding must leave no class out
    width = (count + (teachers - 1) * shared) / teachers
    step = (count - width) / (teachers - 1) if teachers > 1 else Fraction(0)
    edges = [(_rounded(k * step), _rounded(k * step + width)) for k in range(teachers)]
    if (narrow := min(last - first for first, last in edges)) < 2:
        raise UserError(
            f"specialists.overlap={overlap:g} leaves one of {teachers} teachers {narrow} of {count} classes: raise it, "
            "take fewer teachers, or name teacherK.classes"
        )
    return [tuple(range(first, last)) for first, last in edges]


def _rounded(value: Fraction) -> int:
    return math.floor(value + Fraction(1, 2))
