"""What a configuration may leave empty for the data to tell: each network's mean and std, and the gate."""

import math
from collections.abc import Callable, Mapping
from typing import Any

from flax.traverse_util import unflatten_dict

from asib_jax.data.statistics import Statistics
from asib_jax.recipe import keys
from asib_jax.recipe.reading import read_stored
from asib_jax.recipe.recipe import Recipe


def gate(num_classes: int) -> float:
    """From which accuracy synergy is distilled where nothing is said: the geometric mean of chance and 1."""
    return 1 / math.sqrt(num_classes)


def empty(recipe: Recipe) -> list[str]:
    """The keys that are left to the data, under their full names."""
    return [held.name for held in keys.walk(recipe) if held.key.of_data and held.value in ((), None)]


def complete(recipe: Recipe, num_classes: int, statistics: Callable[[], Statistics]) -> Recipe:
    """The recipe with no such key empty. statistics: of the images that teachers train on, asked for where needed."""
    wanted = empty(recipe)
    values: dict[str, Any] = {}
    if any(name.endswith((".mean", ".std")) for name in wanted):
        found = statistics()
        values = {name: getattr(found, name.rpartition(".")[2]) for name in wanted if "." in name}
    if "enable_kd_after_syn_acc" in wanted:
        values["enable_kd_after_syn_acc"] = gate(num_classes)
    return with_values(recipe, values)


def values_of(recipe: Recipe) -> dict[str, Any]:
    """The values of all such keys, given or told, as plain values."""
    return {
        held.name: list(held.value) if isinstance(held.value, tuple) else held.value
        for held in keys.walk(recipe)
        if held.key.of_data
    }


def with_values(recipe: Recipe, values: Mapping[str, Any]) -> Recipe:
    """The recipe with these values, by full names, in the place of its own. UserError for one of the wrong type."""
    return read_stored(unflatten_dict({**keys.flat(recipe), **values}, sep="."))
