"""The networks that stand for a teacher, one or a copy for each fold: what each starts and learns from (SPEC 13)."""

from typing import Any

import numpy as np

from asib_jax.data.sources import Split
from asib_jax.models.ensemble import Networks, fold_name, init_network
from asib_jax.models.kd_model import known
from asib_jax.recipe import Recipe
from asib_jax.weights import teacher_store
from asib_jax.weights.teacher_store import Copy


def rows_of(
    recipe: Recipe, nets: Networks, sees: np.ndarray | None, labels: np.ndarray
) -> dict[str, np.ndarray | None]:
    """Of every network that stands for a teacher, by name, the rows of `teacher_train` that it learns from, of classes
    that it knows; None: all.

    sees: as of `Data`; labels: of `teacher_train`.
    """
    found: dict[str, np.ndarray | None] = {}
    for copy in teacher_store.copies(recipe) if nets.teachers else ():
        own = known(nets.teachers[copy.k])[labels]
        if sees is not None and not (recipe.folds and copy.fold is None):
            own = own & sees[copy.fold or 0]
        found[copy.name] = None if own.all() else np.flatnonzero(own)
    return found


def taken(split: Split, rows: np.ndarray | None) -> Split:
    """These rows of a split; None: all."""
    return split if rows is None else split.take(rows)


def initial(recipe: Recipe, nets: Networks, copy: Copy, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """The variables that a teacher starts from, a copy's without the adapter that all of them share."""
    model = nets.teachers[copy.k] if copy.fold is None else nets.teachers[copy.k].clone(adapter_dim=0)
    return init_network(model, recipe.seed, teacher_store.streams_name(recipe, *copy), image_shape)


def adapter_alone(variables: dict[str, Any]) -> dict[str, Any]:
    """What is left of a teacher that copies stand for: the adapter that they share."""
    params = {child: leaves for child, leaves in variables["params"].items() if child == "distill_adapter"}
    return {"params": params, "batch_stats": {}}


def of_teachers(nets: Networks, teachers: dict[str, Any]) -> dict[str, Any]:
    """Of these teachers the variables of their copies, and what is left of a teacher that copies stand for."""
    found: dict[str, Any] = {}
    for name, own in teachers.items() if nets.folds else ():
        backbone, adapter = (
            {child: leaves for child, leaves in own["params"].items() if (child == "distill_adapter") == adapters}
            for adapters in (False, True)
        )
        found |= {fold_name(name, fold): {**own, "params": backbone} for fold in range(nets.folds)}
        found |= {} if nets.deploys_all else {name: {"params": adapter, "batch_stats": {}}}
    return found
