"""Teachers that know only some classes: what is refused of them, and what is told (SPEC 11)."""

from collections.abc import Mapping, Sequence

import numpy as np

from asib_jax.data import classes
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks
from asib_jax.recipe import Recipe
from asib_jax.weights import teacher_store


def check(
    recipe: Recipe, nets: Networks, rows: Mapping[str, np.ndarray | None], validation: np.ndarray | None = None
) -> None:
    """UserError for teachers of a complete recipe that could not be trained or measured, or not teach what they are to.

    rows: of `copies.rows_of`; validation: the labels there, None where they are not known.
    """
    batch, asked = recipe.dataset.batch_size, not recipe.teachers_only and recipe.kd_alpha > 0
    for k, (name, own) in enumerate(zip(nets.teacher_names, nets.known)):
        told = f"{name}.classes={recipe.teachers[k].classes!r}"
        ours = [rows[copy.name] for copy in teacher_store.copies(recipe) if copy.k == k]
        count = min((len(part) for part in ours if part is not None), default=batch)
        if recipe.teachers[k].classes and recipe.teachers[k].epochs and count < batch:
            raise UserError(
                f"{told} have {count} training images, dataset.batch_size={batch} needs as many: set "
                f"--config.dataset.batch_size={count} or fewer, or give {name} more classes"
            )
        if validation is not None and not own[validation].any():
            raise UserError(f"{told}: validation has no image of these classes, by which {name} would be judged")
        if asked and recipe.kd_target == "teacher" and recipe.kd_teacher_index == k and not own.all():
            raise UserError(
                f"kd_target='teacher' with kd_teacher_index={k}: {name} knows {own.sum()} of {len(own)} classes and "
                "would teach that there are no others; take another kd_target, or a teacher of all classes"
            )
    unknown = unknown_of(nets)
    if unknown and not recipe.teachers_only and recipe.ce_alpha == 0:
        raise UserError(
            f"no teacher knows {classes.text_of(unknown)}, and with ce_alpha=0 nothing else teaches these classes: set "
            "ce_alpha, or give them to a teacher (teacherK.classes)"
        )


def unknown_of(nets: Networks) -> tuple[int, ...]:
    """The classes that no teacher knows; none where there is no teacher."""
    return tuple(np.flatnonzero(~nets.covered).tolist()) if nets.teachers else ()


def lines(recipe: Recipe, nets: Networks, names: Sequence[str] = ()) -> list[str]:
    """For a person: what each teacher that does not know all classes knows, and what none knows. names: of classes."""
    told = [
        f"{name} ({own.name}) knows {known.sum()} of {len(known)} classes: {own.classes}{_some(model.classes, names)}"
        for name, model, own, known in zip(nets.teacher_names, nets.teachers, recipe.teachers, nets.known)
        if not known.all()
    ]
    if unknown := unknown_of(nets):
        told.append(f"no teacher knows {classes.text_of(unknown)}{_some(unknown, names)}: labels alone teach these")
    return told


def _some(labels: Sequence[int], names: Sequence[str]) -> str:
    """The names of the first, where they say more than the numbers."""
    told = [names[label] for label in labels] if names else []
    if told == [str(label) for label in labels] or not told:
        return ""
    return f" ({', '.join(told[:5])}{', ...' * (len(told) > 5)})"
