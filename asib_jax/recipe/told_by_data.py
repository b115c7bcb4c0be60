"""What a configuration may leave to the data: each network's mean and std, the gate, the classes of each teacher."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax.traverse_util import unflatten_dict

from asib_jax.data import classes
from asib_jax.data.statistics import Statistics
from asib_jax.errors import UserError
from asib_jax.recipe import keys
from asib_jax.recipe.reading import read_stored
from asib_jax.recipe.recipe import Recipe


def gate(num_classes: int) -> float:
    """From which accuracy synergy is distilled where nothing is said: the geometric mean of chance and 1."""
    return 1 / math.sqrt(num_classes)


def empty(recipe: Recipe) -> list[str]:
    """The keys that are left to the data, under their full names."""
    divided = recipe.specialists.overlap is not None

    def left(value: Any) -> bool:
        if isinstance(value, str):  # classes
            return divided if not value else not classes.plain(value)
        return value in ((), None)

    return [held.name for held in keys.walk(recipe) if held.key.of_data and left(held.value)]


def complete(
    recipe: Recipe, num_classes: int, statistics: Callable[[], Statistics], class_names: Sequence[str] = ()
) -> Recipe:
    """The recipe with no such key empty. statistics: of the images that teachers train on, asked for where needed.

    Raises UserError for classes of a teacher that are not some of the data's.
    """
    wanted = empty(recipe)
    values: dict[str, Any] = {}
    if pixels := [name for name in wanted if name.endswith((".mean", ".std"))]:
        found = statistics()
        values = {name: getattr(found, name.rpartition(".")[2]) for name in pixels}
    if "enable_kd_after_syn_acc" in wanted:
        values["enable_kd_after_syn_acc"] = gate(num_classes)
    if recipe.uses_teachers:
        values |= _classes(recipe, num_classes, class_names)
    return with_values(recipe, values)


def _classes(recipe: Recipe, count: int, names: Sequence[str]) -> dict[str, str]:
    """Each teacher's, as label numbers in one form, so that the same teacher is found again however they were named."""
    found, overlap = {}, recipe.specialists.overlap
    told = None if overlap is None else classes.windows(count, len(recipe.teachers), overlap)
    for k, teacher in enumerate(recipe.teachers):
        key = f"teacher{k + 1}.classes"
        window = classes.parse(classes.text_of(told[k]), count, key) if told else ()
        own = classes.parse(teacher.classes, count, key, names) if teacher.classes else window
        if told and own != window and not all(other.classes for other in recipe.teachers):
            raise UserError(
                f"specialists.overlap={overlap:g} divides the classes among the teachers, but {key}="
                f"{teacher.classes!r}: name the classes of every teacher, or leave them all empty"
            )
        found[key] = classes.text_of(own)
    return found


def values_of(recipe: Recipe) -> dict[str, Any]:
    """The values of all such keys, given or told, as plain values; without the classes of those that know all."""
    return {
        held.name: list(held.value) if isinstance(held.value, tuple) else held.value
        for held in keys.walk(recipe)
        if held.key.of_data and held.value != ""
    }


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with these values, by full names, in the place of its own. UserError for one of the wrong type."""
    return read_stored(unflatten_dict({**keys.flat(recipe), **values}, sep="."))
