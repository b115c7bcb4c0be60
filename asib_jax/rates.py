"""The learning rates of a recipe's phases."""

from collections.abc import Callable

from asib_jax.objectives import schedules
from asib_jax.recipe import Recipe


def learning_rate(recipe: Recipe, base: float, images: int, epochs: int, warmup_epochs: int) -> Callable[[int], float]:
    """The recipe's schedule from `base`, for an optimizer that sees `epochs` epochs of so many images over the run."""
    schedule = recipe.schedule
    return lambda step: schedules.learning_rate(
        step,
        base=base,
        steps_per_epoch=images // recipe.dataset.batch_size,
        epochs=epochs,
        warmup_epochs=warmup_epochs,
        kind=schedule.type,
        min_lr=schedule.min_lr,
        step_size=schedule.step_size,
        gamma=schedule.gamma,
        milestones=schedule.milestones,
    )
