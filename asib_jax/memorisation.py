"""What is measured of teachers that are ready: the memorisation gap, and the temperatures that follow (SPEC 13)."""

import logging

import numpy as np

from asib_jax.context import Context
from asib_jax.engine.banks import Bank
from asib_jax.engine.memorisation import answers, equal_temperature, mean_entropy
from asib_jax.models.ensemble import Variables
from asib_jax.recipe import Recipe

logger = logging.getLogger("asib_jax")

_MOST = 2000  # training images that are asked for: 1.1 points of standard error at the most
_WIDE = 0.2  # gap from which there is a warning
_NEAR_ALL = 0.9  # accuracy on the training images from which there is one where validation was seen, too


def measure(context: Context, variables: Variables) -> list[float]:
    """How right and how sure each teacher is of the images that it teaches, as they are, against validation, which it
    has read: recorded and told, with a warning where it has memorised them. Returns the teachers' temperatures.
    """
    recipe, nets, train, validation = context.recipe, context.nets, context.data.train, context.validation
    count = min(len(train.label), _MOST)
    rows = np.linspace(0, len(train.label) - 1, count).round().astype(int)
    part, copy = train.take(rows), context.data.copy_to_ask
    cache = "" if recipe.trains_teachers else recipe.teacher_cache
    own = None if copy is None else copy[rows]
    bank = Bank(nets, part, context.feed, name="training images as they are", cache=cache, copy=own)
    (outputs,) = bank.read("teachers", variables)
    tau = recipe.first_tau
    temperatures = []
    for k, (name, options) in enumerate(zip(nets.teacher_names, recipe.teachers, strict=True)):
        known = nets.known[k]
        train_acc, taught = answers(np.asarray(outputs.logits)[:, k], part.label, known)
        val_acc, others = answers(validation.teacher_logits[:, k], validation.split.label, known)
        temperature = options.temperature or _found(name, equal_temperature(taught, others))
        entropies = [mean_entropy(logits, tau * temperature) for logits in (taught, others)]
        found = {"train_acc": train_acc, "val_acc": val_acc, "temperature": temperature}
        context.log(name, found | dict(zip(("train_entropy", "val_entropy"), entropies)))
        logger.info(
            "%s: %.1f %% of %d images that it teaches, %.1f %% of validation%s; mean entropy at tau=%g: %.3f and %.3f "
            "nats%s",
            *(name, 100 * train_acc, int(known[part.label].sum()), 100 * val_acc),
            *(", which its weights have seen, too" if options.saw_validation else "", tau, *entropies),
            f", its logits divided by {temperature:.4g}" if temperature != 1 else "",
        )
        if recipe.kd_alpha > 0 and not recipe.teachers_only:
            _warn(recipe, k, train_acc, val_acc)
        temperatures.append(temperature)
    return temperatures


def _found(name: str, temperature: float | None) -> float:
    if temperature is None:
        logger.warning(
            "%s.temperature=0: at no temperature allowed is its mean entropy on training images that on validation, "
            "so it is 1, its logits as they are",
            name,
        )
    return temperature or 1.0


def _warn(recipe: Recipe, k: int, train_acc: float, val_acc: float) -> None:
    """Where teacher `k` (from 0) says of the images that it teaches hardly more than their labels."""
    options, name = recipe.teachers[k], f"teacher{k + 1}"
    if options.epochs:
        ways = [f"fewer {name}.{'finetune' if options.weights else 'train'}_epochs", "teacher_folds", "teacher_holdout"]
    else:
        ways = ["a teacher trained here for few epochs", "a larger tau"]
    if options.temperature == 1:
        ways.append(f"{name}.temperature{' above 1' if options.saw_validation else '=0'}")
    if options.saw_validation and train_acc >= _NEAR_ALL:
        logger.warning(
            "%s is right on %.1f %% of the images that it teaches; %s.saw_val says that validation images were seen, "
            "too, so that how much of this is memory cannot be told before test. Of images that it has memorised a "
            "teacher tells little beyond their labels; ways out: %s (docs/models.md)",
            *(name, 100 * train_acc, name, ", ".join(ways)),
        )
    elif not options.saw_validation and train_acc - val_acc > _WIDE:
        logger.warning(
            "%s is right on %.1f %% of the images that it teaches and on %.1f %% of validation, a gap of %.0f points. "
            "Of images that it has memorised a teacher tells little beyond their labels; ways out: %s (docs/models.md)",
            *(name, 100 * train_acc, 100 * val_acc, 100 * (train_acc - val_acc), ", ".join(ways)),
        )
