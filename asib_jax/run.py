"""What every part of a run shares, and how far it has come."""
import collections
import dataclasses
import logging
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import jax
from clu.parameter_overview import count_parameters
from tqdm import tqdm

from asib_jax import streams
from asib_jax.engine import parallel, stored_views
from asib_jax.objectives import schedules, state, steps
from asib_jax.build import Data
from asib_jax.data.batches import training_rows
from asib_jax.engine.evaluate import Evaluator
from asib_jax.record.experiment import Record
from asib_jax.engine.feed import Call, Examples, Feed, Steps
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.recipe.recipe import Recipe
from asib_jax.record.reporting import Reporter
from asib_jax.record.snapshots import Snapshot, Snapshots
from asib_jax.objectives.state import TrainState
from asib_jax.objectives.steps import Training
from asib_jax.engine.stored_views import StoredViews

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

    def content(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """All of it for a snapshot: its arrays, by name, and its plain values."""
        held = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return ({name: held[name] for name in _ARRAYS if held[name] is not None},
                {name: value for name, value in held.items() if name not in _ARRAYS})

    def restore(self, arrays: dict[str, Any], values: dict[str, Any]) -> None:
        """Become what `content` told."""
        for name in _ARRAYS:
            setattr(self, name, arrays.get(name))
        for name in ("best_student", "last_student"):
            if name in arrays:
                setattr(self, name, {"batch_stats": {}, **arrays[name]})  # a network without BatchNorm
        for name, value in values.items():
            setattr(self, name, collections.Counter(value) if name == "distilled_steps" else value)


_ARRAYS = ("a_opt_state", "b_opt_state", "best_student", "last_student")  # of Progress


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
    snapshots: Snapshots
    prefix: str = ""
    _compiled: dict = dataclasses.field(default_factory=dict)

    def compiled(self, key: Hashable, make_step: Callable[[], Callable], *, trains_convolutions: bool) -> Steps:
        """The compiled training step under `key`, made and compiled once in a run."""
        if key not in self._compiled:
            self._compiled[key] = self.feed.compile(make_step(), trains_convolutions=trains_convolutions,
                                                    donate_carry=True)
        return self._compiled[key]

    def begin(self, kind: str, training: Training, variables: Variables, opt_state: Any,
              snapshot: Snapshot | None = None) -> tuple[TrainState, Variables, Steps]:
        """Before the epochs of a `kind` of training: what it trains, what stands still, the step for its mask."""
        current, frozen = state.begin(variables, training.mask, training.trained_stats, training.tx, opt_state,
                                      self.recipe.compute_dtype)
        current = state.with_loss_scale(current, snapshot and snapshot.arrays)
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

    def part(self, step: str, stage: int) -> str:
        """What `Snapshots` calls the A- or B-Step of a stage, and the metrics too."""
        return f"{self.prefix}stage{stage + 1}/{step}"

    def calls(self, steps: Steps, step: str, stage: int, epoch: int, first: int = 0) -> Iterator[Call]:
        """One epoch of the student's training images in an order of its own, from its step `first` on, with stored
        outputs if any."""
        order = streams.rng(self.recipe.seed, f"order/{step}", stage, epoch)
        rows = training_rows(len(self.data.train.label), self.recipe.dataset.batch_size, order)[first:]
        stored = self.stored.of(step, stage, epoch)
        images = [] if stored and step == "a" else [self.images]  # every network that the A-Step runs has read them
        return self.feed.calls(steps, rows, self.labels, *images, *stored)

    def bar(self, title: str) -> tqdm:
        """A progress bar over an epoch's images."""
        return self.reporter.epoch_bar(self.steps_per_epoch * self.recipe.dataset.batch_size, title)

    def snapshot(self, step: str, progress: Progress, whole: Variables, state: TrainState
                 ) -> tuple[dict[str, Any], dict[str, Any]]:
        """What `loop.Part.content` gives of an A- or B-Step, "a" or "b": all variables that this run has changed or
        drawn, and how far it has come."""
        own = {name: whole.of(name) for name in whole.params}
        if not self.recipe.trains_teachers:
            for name in self.nets.teacher_names:  # given or kept elsewhere
                own[name] = {"params": {child: leaves for child, leaves in whole.params[name].items()
                                        if child == "distill_adapter"}}
        arrays, values = progress.content()
        arrays[f"{step}_opt_state"] = state.opt_state
        return {"progress": arrays, "variables": own, "loss_scale": state.loss_scale}, values

    def resume(self, snapshot: Snapshot, progress: Progress, variables: Variables) -> Variables:
        """The variables of such a snapshot, whose `progress` then goes on."""
        progress.restore(snapshot.arrays["progress"], snapshot.values)
        params, stats = dict(variables.params), dict(variables.batch_stats)
        for name, branch in snapshot.arrays["variables"].items():
            params[name] = {**params[name], **branch.get("params", {})}
            stats |= {name: branch["batch_stats"]} if "batch_stats" in branch else {}
        return parallel.replicate(Variables(params, stats), self.feed.devices)


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
