"""One function runs every phase: its epochs, snapshots, the watch for what is not finite, the log, the best state."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from clu.parameter_overview import count_parameters
from flax.serialization import to_state_dict

from asib_jax.context import Context
from asib_jax.data.splits import training_rows
from asib_jax.engine import devices
from asib_jax.engine.compiled import Call, most_in_flight
from asib_jax.engine.progress import BEFORE, Best, Held, Progress, Tally, overlay
from asib_jax.models.ensemble import Variables, with_narrow_teachers
from asib_jax.objectives import freezing, state
from asib_jax.objectives.step import make_train_step
from asib_jax.phases import Phase
from asib_jax.record.remaining import Part
from asib_jax.record.snapshots import Snapshot

logger = logging.getLogger("asib_jax")

_PATIENCE = 2.0  # seconds until a signal is heeded, where a call of one step does not take longer
_HOSTS_WINDOW = 64  # steps between two questions to the other hosts, where no clock decides


class Running:
    """A phase on its way: what trains, what stands still of the networks it uses, the compiled step, how far it is."""

    def __init__(
        self, context: Context, phase: Phase, variables: Variables, progress: Progress, begun: Snapshot | None = None
    ):
        self.context, self.phase, self.progress, self._others = context, phase, progress, variables
        training, own = phase.training, used(phase, variables)
        self.images = phase.images(len(getattr(context.data, phase.split).label))
        current, frozen = state.begin(
            own,
            training.mask,
            training.trained_stats,
            training.tx,
            progress.opt_states.get(phase.optimizer),
            context.recipe.compute_dtype,
        )
        self.frozen = devices.share(frozen, context.feed.devices)
        current = state.with_loss_scale(current, begun and begun.arrays)
        self.current = devices.replicate(current, context.feed.devices)  # moments, too, or the step compiles twice
        self.step = context.compiled(
            (phase.optimizer, str(training.mask)),
            lambda: make_train_step(training.loss, training.tx, axis_name=context.feed.axis_name),
            trains_convolutions=bool(training.trained_stats),
        )
        self._window = 1  # steps between two drains, grown while they are quick
        self.epoch, self.tally = (begun.epoch, Tally(**begun.tally)) if begun else (0, Tally())

    @property
    def whole(self) -> Variables:
        """All variables that the phase uses."""
        return state.join(self.current, self.frozen)

    def calls(self) -> Iterable[Call]:
        """What is left of the epoch, in an order of its own, with stored outputs if any."""
        context, phase = self.context, self.phase
        rows = training_rows(self.images, context.recipe.dataset.batch_size, phase.order(self.epoch))
        rows = (rows if phase.rows is None else phase.rows[rows])[self.tally.steps :]
        stored = [context.bank.of(who, phase.views[self.epoch]) for who in sorted(phase.reads)]
        stored = [] if None in stored else stored
        images, labels = context.examples(phase.split)
        needed = [] if stored and "student" in phase.reads else [images]  # every network that it runs has read them
        return context.feed.calls(self.step, rows, labels, *needed, *stored)

    def run_epoch(self, calls: Iterable[Call], controls: dict[str, Any], on_images: Callable[[int], Any] = int) -> None:
        """One pass over the calls, each prepared while the devices work on the one before.

        on_images: told how many images have been done. Raises FloatingPointError as `Watch` does.
        """
        before, several = self.progress.steps[self.phase.optimizer], jax.process_count() > 1
        most = min(
            most_in_flight(self.context.feed.devices),
            self.context.snapshots.steps or 1024,
            _HOSTS_WINDOW if several else 1024,
        )
        pending: list[tuple[dict[str, jax.Array], Call]] = []
        steps = offered = self.tally.steps
        since = time.monotonic()

        def collect() -> None:
            metrics, call = pending.pop(0)
            found = jax.device_get(metrics)
            limit = self.context.recipe.max_nonfinite_steps
            self.progress.watch.see(found, before + self.tally.steps, self.phase.name, self.epoch, limit)
            self.tally.add(found)
            on_images(call.rows.size)

        for call in calls:
            if pending and steps + len(call.rows) - offered > self._window:
                while pending:
                    collect()
                # On several hosts no clock decides: `offer` asks all of them, who come to it after the same steps.
                quick = several or time.monotonic() - since < _PATIENCE / 2
                self._window = min(2 * self._window if quick else max(1, self._window // 2), most)
                since = time.monotonic()
                self.offer(self.tally.steps - offered)
                offered = self.tally.steps
            numbers = range(before + steps, before + steps + len(call.rows))
            self.context.reporter.on_steps(self.phase.optimizer, numbers[0], numbers[-1])
            each = {
                "lr": np.array([self.phase.rate(number) for number in numbers], np.float32),
                "step": np.arange(steps, steps + len(numbers), dtype=np.int32),
            }
            self.current, metrics = self.step.run(self.current, self.frozen, controls, call, each)
            pending.append((metrics, call))
            steps += len(numbers)
            while call.streamed and len(pending) > 1:  # the examples of two calls are on the devices at a time
                collect()
        while pending:
            collect()
        self.offer(self.tally.steps - offered)

    def offer(self, steps: int, now: bool = False) -> None:
        """A snapshot, if it is time, where no step is under way. steps: since the last one was offered."""
        self.context.snapshots.offer(self.phase.name, self.epoch, {**vars(self.tally)}, steps, self.content, now)

    def content(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Of a snapshot, its arrays and values: how far the run has come, and what of its variables is nowhere else."""
        (arrays, values), nets = self.progress.content(), self.context.nets
        arrays["opt_states"] = {**arrays["opt_states"], self.phase.optimizer: self.current.opt_state}
        others = {*nets.teacher_names, *nets.backbone_names} - {self.phase.network}
        frozen = set() if self.context.recipe.trains_teachers else others
        params, stats = overlay(self._others, self.current._asdict())  # not `whole`, whose teachers may be narrow
        own = {
            name: {child: leaves for child, leaves in branch.items() if child == "distill_adapter"}
            if name in frozen
            else branch
            for name, branch in params.items()
        }
        variables = {"params": own, "batch_stats": {name: part for name, part in stats.items() if name not in frozen}}
        return {**arrays, "variables": variables, "loss_scale": self.current.loss_scale}, values

    def hold(self) -> Held:
        """On the host, what is kept and restored as one."""
        params, stats = self.whole
        chosen = self.phase.chosen
        kept = (
            self.current.params
            if chosen is None
            else freezing.split({name: params[name] for name in chosen}, chosen)[0]
        )
        held = {"params": kept, "batch_stats": {name: stats[name] for name in self.phase.training.trained_stats}}
        if self.phase.holds_moments:
            held["opt_state"] = to_state_dict(self.current.opt_state)
        return jax.tree.map(
            np.array, jax.device_get(held)
        )  # copied: the next step takes the memory of what it is given

    def measure(self) -> dict[str, float]:
        """Validation accuracies of all that the phase can tell; teachers that it trains are read anew."""
        if self.phase.changes_teachers:
            self.context.validation.read_teachers(self.whole)
        return self.context.validation.accuracies(self.phase.nets, self.whole, self.phase.network)


def part(phase: Phase) -> Part:
    """The phase as far as it takes time."""
    return Part(phase.name, phase.optimizer, phase.epochs)


def used(phase: Phase, variables: Variables) -> Variables:
    """The variables that its step takes; teachers that stand still in the type that they compute in."""
    own = variables.only(phase.uses)
    return own if phase.changes_teachers else with_narrow_teachers(phase.nets, own)


def run_phase(
    context: Context, phase: Phase, variables: Variables, progress: Progress, begun: Snapshot | None = None
) -> Variables:
    """All epochs of a phase, or those that a snapshot leaves to do, to which `variables` and `progress` have been set.

    Returns all variables, with the best state in place where the phase says so. Raises FloatingPointError where steps
    break as `Watch` says: too many in a row of the run, or of the phase; it names the last snapshot.
    """
    place = context.remaining.begin(part(phase), begun.epoch if begun else 0)
    logger.info("%s (%s, %d epochs)", phase.title, place, phase.epochs)
    running = Running(context, phase, variables, progress, begun)
    _tell_parameters(running, variables)
    if phase.score == "synergy":  # the fusion network trains, the student stands still
        context.read_student(variables, phase.views)
    if phase.score and not begun:
        progress.best.setdefault(phase.best, Best())
        if phase.watch:
            _watch_incoming(running)
    try:
        _run_epochs(running)
    except FloatingPointError as error:
        context.snapshots.close()
        raise FloatingPointError(f"{error}. Last snapshot: {context.snapshots.newest() or 'none yet'}") from error
    if skipped := progress.watch.skipped[phase.name]:
        context.record.log(f"skipped_steps/{phase.name}", skipped)
    if phase.snapshot_at_end:
        running.offer(0, now=True)
    variables = phase.finish(context, _end(running, variables), progress)
    if phase.best == phase.name:
        progress.best.pop(phase.best)  # nothing later asks for it
    return variables


def _tell_parameters(running: Running, variables: Variables) -> None:
    """Trainable of all parameters, by which a reader verifies what stands still."""
    counts = {
        name: (count_parameters(running.current.params.get(name, {})), count_parameters(variables.params[name]))
        for name in running.phase.uses
    }
    told = [f"{name} {trained:,}/{total:,}" for name, (trained, total) in counts.items() if trained]
    frozen = ", ".join(name for name, (trained, _) in counts.items() if not trained)
    logger.info("trainable parameters: %s", "; ".join(filter(None, (", ".join(told), frozen and f"none of {frozen}"))))


def _run_epochs(running: Running) -> None:
    """Those that are left, as long as enough of the phase's steps count."""
    context, phase, progress = running.context, running.phase, running.progress
    recipe = context.recipe
    each, dtype = running.images // recipe.dataset.batch_size, recipe.compute_dtype
    while running.epoch < phase.epochs and not _waited(running):
        start, controls = time.perf_counter(), phase.controls(progress, running.epoch)
        with context.bar(running.images, f"{phase.title} {running.epoch + 1}/{phase.epochs}") as bar:
            running.run_epoch(running.calls(), controls, bar.update)
        _end_epoch(running, controls, time.perf_counter() - start)
        running.epoch, running.tally = running.epoch + 1, Tally()
        progress.watch.judge(phase.name, each * phase.epochs, dtype)  # as soon as it is known
    progress.watch.judge(phase.name, each * running.epoch, dtype)


def _waited(running: Running) -> bool:
    """Whether the phase ends early."""
    best = running.progress.best.get(running.phase.best)
    if best is None or not best.waited == running.phase.patience > 0:
        return False
    logger.info("%s: stopped early, %d epochs without a better validation accuracy", running.phase.title, best.waited)
    return True


def _watch_incoming(running: Running) -> None:
    """Before the first epoch: measured, and where the phase says so in competition. It opens no gate."""
    context, phase = running.context, running.phase
    measured = context.validation.accuracies(phase.nets, running.whole, phase.network)
    context.log(f"{phase.name}/before", {f"val_{name}": value for name, value in measured.items()})
    if phase.incoming:
        score = measured[phase.score]
        running.progress.best[phase.best] = Best(score, BEFORE, running.hold(), began=score)
        logger.info("%s: validation accuracy %.2f %% before its first epoch", phase.title, 100 * score)


def _end_epoch(running: Running, controls: dict[str, Any], seconds: float) -> None:
    """Count, measure and log an epoch that is over, and hold its state if it is the best."""
    context, phase, progress, epoch = running.context, running.phase, running.progress, running.epoch
    progress.steps[phase.optimizer] += running.tally.steps
    progress.epochs[phase.optimizer] += 1
    phase.counts(progress, controls, running.tally.steps)
    measured = running.measure() if phase.score else {}
    context.remaining.epoch(phase.name)
    if not phase.score:
        return
    if "synergy" in measured:
        progress.measured_synergy(measured["synergy"], context.recipe.synergy_ema_alpha)
    values = running.tally.means | {
        name: float(value) for name, value in controls.items() if np.ndim(value) == 0 and not name.endswith("_key")
    }
    values |= {f"val_{name}": value for name, value in measured.items()}
    key = f"{phase.name}/epoch{epoch + 1:02d}"
    context.log_epoch(key, values, seconds, phase.optimizer, progress.epochs[phase.optimizer])
    own = {name: values[name] for name in ("loss", f"val_{phase.network}", "val_synergy") if name in values}
    own |= {"skipped": values["skipped"]} if values["skipped"] else {}
    context.tell_epoch(key, own, seconds, last=epoch + 1 == phase.epochs or "skipped" in own)
    if progress.best[phase.best].see(measured[phase.score], f"{phase.title}, epoch {epoch + 1}", phase.margin):
        progress.best[phase.best].held = running.hold()


def _end(running: Running, variables: Variables) -> Variables:
    """All variables after the last epoch, the best state in its place where the phase restores it."""
    context, phase, progress = running.context, running.phase, running.progress
    held: Mapping[str, Any] = running.current._asdict()
    if phase.score:
        best = progress.best[phase.best]
        logger.info("%s: best validation accuracy %.2f %% (%s)", phase.title, 100 * best.score, best.when)
        if phase.best != phase.name:  # it is the best over several phases
            progress.last[phase.best] = running.hold()
        if phase.restore:
            held = best.held
    if phase.score == "synergy":
        context.forget_student()
        progress.synergy_acc = best.score
    progress.opt_states[phase.optimizer] = held.get("opt_state")
    variables = overlay(overlay(variables, running.current._asdict()), held)
    if phase.changes_teachers:
        context.validation.read_teachers(variables)
    return variables
