"""What every part of a run shares, and how far it has come."""
import collections
import dataclasses
import functools
import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
from clu.parameter_overview import count_parameters

from asib_jax import loop, parallel, schedules, state, steps, stored_views, streams
from asib_jax.build import Data
from asib_jax.data.batches import training_rows
from asib_jax.evaluate import Evaluator
from asib_jax.experiment import Record
from asib_jax.feed import Call, Examples, Feed, Steps
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.nonfinite import Watch
from asib_jax.recipe import Recipe
from asib_jax.reporting import Reporter
from asib_jax.state import TrainState
from asib_jax.steps import Training
from asib_jax.stored_views import StoredViews

logger = logging.getLogger("asib_jax")


@dataclasses.dataclass
class Progress:
    """How far a run has come; all that its schedules and choices depend on."""

    a_steps: int = 0  # optimizer steps so far
    b_steps: int = 0
    ib_epochs: int = 0  # A-epochs with the bottleneck active: the n of SPEC 3's beta
    epochs: int = 0  # A- and B-epochs together
    b_epochs: int = 0
    synergy_acc: float | None = None  # `last_synergy_acc`, an exponential average; None before any measurement
    a_opt_state: Any = None
    b_opt_state: Any = None
    best_acc: float = -1.0  # of the student on validation, over the run
    best_epoch: str = ""
    best_student: dict | None = None  # its variables on the host
    last_student: dict | None = None  # at the end of the stage before
    distilled_steps: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by target used

    def gate(self, threshold: float) -> bool:
        """Whether synergy has been measured and is good enough to distil from (SPEC 4 and 5)."""
        return self.synergy_acc is not None and self.synergy_acc >= threshold


@dataclasses.dataclass
class Run:
    """One run's recipe, networks, data, devices and record. `prefix` sets the control's metric keys apart."""

    recipe: Recipe
    nets: Networks
    data: Data
    feed: Feed
    record: Record
    reporter: Reporter
    validation: Evaluator
    images: Examples  # of the training split
    labels: Examples  # and their indices
    stored: StoredViews
    prefix: str = ""
    _compiled: dict = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def watch(self) -> Watch:
        """Of all the steps of the run."""
        return Watch(self.recipe.max_nonfinite_steps)

    def compiled(self, key: Hashable, make_step: Callable[[], Callable], *, trains_convolutions: bool) -> Steps:
        """The compiled training step under `key`, made and compiled once in a run."""
        if key not in self._compiled:
            self._compiled[key] = self.feed.compile(make_step(), trains_convolutions=trains_convolutions,
                                                    donate_carry=True)
        return self._compiled[key]

    def begin(self, kind: str, training: Training, variables: Variables, opt_state: Any
              ) -> tuple[TrainState, Variables, Steps]:
        """Before the epochs of a `kind` of training: what it trains, what stands still, the step for its mask."""
        current, frozen = state.begin(variables, training.mask, training.trained_stats, training.tx, opt_state,
                                      self.recipe.compute_dtype)
        step = self.compiled((kind, str(training.mask)), lambda: steps.make_train_step(
            training.loss, training.tx, axis_name=self.feed.axis_name), trains_convolutions=bool(training.trained_stats))
        # Moments begin on one device; the step would compile twice.
        return parallel.replicate(current, self.feed.devices), frozen, step

    def log_parameters(self, title: str, params: dict, trained: dict) -> None:
        """One line: trainable / total parameters of every network in a step."""
        counts = [f"{name} {count_parameters(trained.get(name, {})):,}/{count_parameters(branch):,}"
                  for name, branch in params.items()]
        logger.info("%s%s: trainable/total parameters: %s", self.prefix, title, ", ".join(counts))

    @property
    def steps_per_epoch(self) -> int:
        return len(self.data.train.label) // self.recipe.dataset.batch_size

    def log_epoch(self, step: str, stage: int, epoch: int, values: dict[str, float], *, seconds: float,
                  total: int) -> None:
        """Record an epoch's scalars under `stage1/a/epoch01/name`, its duration under `time/`; draw them at `total`."""
        key = f"stage{stage + 1}/{step}/epoch{epoch + 1:02d}"
        self.log_scalars(key, values)
        self.record.log(f"time/{self.prefix}{key}/seconds", seconds)
        self.record.save()
        self.reporter.scalars({f"{self.prefix}{step}/{name}": value for name, value in values.items()}, total)
        shown = [f"{name} {value:.4g}" for name, value in values.items() if name == "loss" or name.startswith("val_")]
        logger.info("%s%s  %s  %.1f s", self.prefix, key, "  ".join(shown), seconds)

    def log_scalars(self, key: str, values: dict[str, float]) -> None:
        """Record scalars under `key`/name."""
        for name, value in values.items():
            self.record.log(f"{self.prefix}{key}/{name}", value)

    def augment_key(self, step: str, stage: int, epoch: int) -> jax.Array:
        """The augmentation stream of an epoch of `step`; that of a stage and epoch is one for A- and B-Step."""
        return streams.key(self.recipe.seed, "augment", *stored_views.view(self.recipe, step, stage, epoch))

    def calls(self, steps: Steps, step: str, stage: int, epoch: int) -> Iterator[Call]:
        """One epoch of the student's training images in an order of its own, with stored outputs if any."""
        order = streams.rng(self.recipe.seed, f"order/{step}", stage, epoch)
        rows = training_rows(len(self.data.train.label), self.recipe.dataset.batch_size, order)
        stored = self.stored.of(step, stage, epoch)
        images = [] if stored and step == "a" else [self.images]  # every network that the A-Step runs has read them
        return self.feed.calls(steps, rows, self.labels, *images, *stored)

    def epoch(self, title: str, step: Steps, state, frozen: Variables, calls: Iterator[Call], **options):
        """`loop.run_epoch` under a progress bar."""
        with self.reporter.epoch_bar(self.steps_per_epoch * self.recipe.dataset.batch_size, title) as bar:
            return loop.run_epoch(step, state, frozen, calls, on_images=bar.update, watch=self.watch, phase=title,
                                  **options)


def learning_rate(recipe: Recipe, *, base: float, steps_per_epoch: int, epochs: int, warmup_epochs: int, devices: int
                  ) -> Callable[[int], float]:
    """The recipe's schedule from `base`, for an optimizer that sees `epochs` epochs over the run.

    With `scale_lr_with_devices` base is multiplied by `devices` (Goyal et al. 2017 scale it with the batch, which here
    is the configuration's whatever the devices).
    """
    schedule = recipe.schedule
    base *= devices if recipe.scale_lr_with_devices else 1
    return lambda step: schedules.learning_rate(
        step, base=base, steps_per_epoch=steps_per_epoch, epochs=epochs, warmup_epochs=warmup_epochs,
        kind=schedule.type, min_lr=schedule.min_lr, step_size=schedule.step_size, gamma=schedule.gamma,
        milestones=schedule.milestones)
