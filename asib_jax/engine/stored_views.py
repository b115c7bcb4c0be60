"""Which views of the training images frozen networks read once, where their outputs wait, and what that saves.

With `a_step_views` or `b_step_views` = V an epoch of that step uses the augmentation of the run's epoch of its number
modulo V (`schedules.view_of`). Whether outputs are stored changes nothing but time, memory and
rounding.
"""
import logging
from typing import NamedTuple

import jax.numpy as jnp

from asib_jax import streams
from asib_jax.engine import feature_bank
from asib_jax.objectives import schedules
from asib_jax.data.sources import Split
from asib_jax.engine.feed import Examples, Feed
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.recipe.recipe import Recipe

logger = logging.getLogger("asib_jax")

View = tuple[int, int]  # the stage and the epoch whose augmentation it is
_GIB = 2 ** 30


def view(recipe: Recipe, step: str, stage: int, epoch: int) -> View:
    """The view that an epoch of `step`, "a" or "b", uses."""
    return schedules.view_of(_lengths(recipe, step), stage, epoch, _count(recipe, step))


def _lengths(recipe: Recipe, step: str) -> tuple[int, ...]:
    return recipe.b_epochs if step == "b" else (recipe.a_epochs,) * len(recipe.b_epochs)


def _count(recipe: Recipe, step: str) -> int:
    return recipe.b_step_views if step == "b" else recipe.a_step_views


class Decision(NamedTuple):
    """The steps, of "a" and "b", whose networks are read from stored outputs, and why, in lines for a person."""

    steps: frozenset[str]
    lines: tuple[str, ...]


def decide(recipe: Recipe, nets: Networks, images: int) -> Decision:
    """What a run over that many training images stores: teachers for both steps, the student for the A-Step."""
    uses = {"a": recipe.uses_fusion, "b": recipe.reads_teachers_in_b}
    steps = [step for step, used in uses.items() if used and nets.teachers]
    reasons = {step: _reason_against(recipe, step) for step in steps}
    wanted = frozenset(step for step in steps if not reasons[step])
    size = {choice: _bytes(recipe, nets, images, choice) for choice in (wanted, wanted & {"b"}, wanted & {"a"})}
    fitting = (choice for choice in size if size[choice] <= recipe.bank_memory_gb * _GIB)
    chosen = next(fitting, frozenset())
    for step in wanted - chosen:
        reasons[step] = f"with it {size[wanted] / _GIB:.3g} GiB exceed bank_memory_gb={recipe.bank_memory_gb:g}"
    lines = [f"the {step.upper()}-Step runs the teachers at every step: {reasons[step]}" for step in steps
             if reasons[step]]
    if chosen:
        views = len(_teacher_views(recipe, chosen))
        epochs = sum(sum(_lengths(recipe, step)) for step in chosen)
        also = ", and the student's for each A-Step" if "a" in chosen else ""
        lines.insert(0, f"stored: the teachers' outputs on {views} view(s) of {images:,} training images{also}, "
                        f"{size[chosen] / _GIB:.3g} GiB; teachers read {views * images:,} images instead of "
                        f"{epochs * images:,}")
    return Decision(chosen, tuple(lines))


def _reason_against(recipe: Recipe, step: str) -> str:
    if not _count(recipe, step):
        return f"{step}_step_views=0 asks for new views in every epoch"
    if recipe.trains_teachers:
        return "use_teacher_finetuning changes them"
    if step == "b" and recipe.mixes:
        return "they have to see the images that mixup_alpha or cutmix_alpha_distill mixes"
    return ""


def _teacher_views(recipe: Recipe, steps: frozenset[str]) -> list[View]:
    return sorted({view for step in steps for view in schedules.views_of(_lengths(recipe, step), _count(recipe, step))})


def _student_views(recipe: Recipe, stage: int) -> list[View]:
    return schedules.views_of(_lengths(recipe, "a"), recipe.a_step_views, stage)


def _bytes(recipe: Recipe, nets: Networks, images: int, steps: frozenset[str]) -> int:
    itemsize, classes = jnp.dtype(recipe.compute_dtype).itemsize, nets.student.num_classes

    def of(*models):
        return images * sum(itemsize * model.architecture.feat_dim + 4 * classes for model in models)

    students = max(len(_student_views(recipe, stage)) for stage in range(len(recipe.b_epochs))) if "a" in steps else 0
    return len(_teacher_views(recipe, steps)) * of(*nets.teachers) + students * of(nets.student)


class StoredViews:
    """The stored outputs of a run; what is not stored is no part of what `of` gives."""

    def __init__(self, recipe: Recipe, nets: Networks, split: Split, feed: Feed, variables: Variables):
        """Runs the teachers."""
        self._recipe, self._nets, self._split, self._feed = recipe, nets, split, feed
        decision = decide(recipe, nets, len(split.label))
        for line in decision.lines:
            logger.info("%s", line)
        self.steps = decision.steps
        self._student: dict[View, Examples] = {}
        views = _teacher_views(recipe, self.steps)
        outputs = feature_bank.read_teachers(nets, variables, split, cache=recipe.teacher_cache,
                                             title="the training images", **self._reading(views)) if views else []
        self._teachers = dict(zip(views, feed.place_alike([{"teachers": stored} for stored in outputs])))
        if any(examples.host for examples in self._teachers.values()):
            logger.info("stored outputs: on the host, more than the room of device_data_gb=%g", recipe.device_data_gb)

    def _reading(self, views: list[View]) -> dict:
        options = self._recipe.dataset
        keys = [streams.key(self._recipe.seed, "augment", *view) for view in views]
        return {"keys": keys, "data_aug": options.data_aug, "batch_size": options.batch_size, "feed": self._feed}

    def read_student(self, variables: Variables, stage: int) -> None:
        """Run the student for the A-Step of a stage, if that reads stored outputs."""
        if "a" in self.steps:
            views = _student_views(self._recipe, stage)
            outputs = feature_bank.read_student(self._nets, variables, self._split, **self._reading(views))
            self._student = dict(zip(views, self._feed.place_alike([{"student": stored} for stored in outputs])))

    def drop_student(self) -> None:
        """Free what `read_student` has stored."""
        self._student = {}

    def of(self, step: str, stage: int, epoch: int) -> list[Examples]:
        """What is stored for an epoch of `step`."""
        if step not in self.steps:
            return []
        chosen = view(self._recipe, step, stage, epoch)
        return [self._teachers[chosen]] + ([self._student[chosen]] if step == "a" else [])
