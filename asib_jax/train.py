"""A whole run: what its phases are, in order, and what comes of them (SPEC 7)."""

import errno
import logging
import pathlib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from asib_jax import a_step, b_step, build, copies, memorisation, preparation, runner, specialists, teachers
from asib_jax.context import Context
from asib_jax.data import overlap
from asib_jax.data.sources import Split
from asib_jax.engine import hosts
from asib_jax.engine.compiled import keep_compiled
from asib_jax.engine.progress import Progress, overlay
from asib_jax.errors import UserError
from asib_jax.evaluation import evaluate_finished
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.phases import Phase
from asib_jax.recipe import Recipe, checks, keys, overrides, read_stored, told_by_data
from asib_jax.record import console, drawings, finished, provenance, reporting, results, resume, snapshots
from asib_jax.record.experiment import Record, read_about
from asib_jax.record.files import write
from asib_jax.record.remaining import Remaining
from asib_jax.record.reporting import Reporter
from asib_jax.record.signals import Interrupted, Stop
from asib_jax.record.snapshots import Snapshot, Snapshots, last_whole
from asib_jax.weights import origins

logger = logging.getLogger("asib_jax")

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def phases_of(
    recipe: Recipe,
    nets: Networks,
    params: dict[str, Any],
    images: Mapping[str, int],
    train: Mapping[str, Any],
    calibrate: bool = False,
    rows: Mapping[str, np.ndarray | None] | None = None,
) -> list[Phase]:
    """Everything that is trained, in order.

    params: of every network, arrays or their shapes; images: of each split; train: the teachers to be trained here, and
    where each is kept then (None where that does not matter); calibrate: whether the student's statistics fit nothing;
    rows: of `copies.rows_of`.
    """
    axis, count = nets.student.axis_name, images["train"]
    found = [
        teachers.phase(recipe, nets, name, params, images["teacher_train"], axis, place, (rows or {}).get(name))
        for name, place in train.items()
    ]
    if recipe.teachers_only:
        return found
    if calibrate:
        found.append(a_step.calibration(recipe, nets, count, axis))
    for stage in range(len(recipe.b_epochs)):
        if recipe.uses_fusion:
            found.append(a_step.phase(recipe, nets, params, stage, count, axis))
        found.append(b_step.phase(recipe, nets, params, stage, count, axis))
    if recipe.trains_control:
        alone = build.without_teachers(recipe)
        control = build.build_networks(alone, nets.student.num_classes, axis)
        found += [
            b_step.phase(alone, control, params, stage, count, axis, "control") for stage in range(len(recipe.b_epochs))
        ]
    return found


def start(config: Mapping[str, Any], name: str, defaults: Recipe, changed: Collection[str] = ()) -> pathlib.Path:
    """Begin the run of a configuration, or go on with the one that its `resume` finds; nothing where that has finished.

    The folder of the run. name: of the configuration and its profile; defaults: of that profile; changed: the keys
    that were set beside the configuration, by which the run's folder and row tell it apart. The outcome is recorded
    whatever it is: a failed or interrupted run is never a finished one. Raises UserError for what can be known before a
    run leaves a trace, and Interrupted after a signal, with a snapshot that holds all that was done.
    """
    logger.setLevel(logging.DEBUG)
    recipe = preparation.checked(config)
    found = resume.find(recipe, name)
    hosts.same_everywhere({"the run to go on with": str(found)})
    if found and read_about(found)["status"] == "finished":
        logger.info("%s has finished: there is nothing to go on with", found)
        return found
    logger.info("reading the data, and given weights that are here")
    inputs = preparation.prepare(recipe)  # and the last that fails without a trace
    plain = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    plain["dataset"] = {**plain["dataset"], "name": recipe.dataset.name}  # whatever becomes of its path
    told = overrides.text(recipe, changed)
    record = (
        Record.reopen(found, plain)
        if found
        else Record.create(recipe.results_dir, f"{name}_{recipe.seed}", recipe.exp_id, plain, overrides.digest(told))
    )
    record.about["overrides"] = told
    console.setup_logging(record.folder)
    last = last_whole(found) if found else None
    if found and not last:
        logger.warning("%s had come to no snapshot: it begins again, with the teachers that are kept", found)
    if warning := preparation.warning(recipe, defaults):
        logger.warning(warning)
    keep_compiled(recipe.compilation_cache)
    try:
        recorded(inputs.recipe, inputs, record, last)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in _FULL:
            raise UserError(_full(record.folder, error)) from error
        if hosts.is_first():
            error.add_note(f"see {record.folder / 'log.txt'}")
        raise
    return record.folder


def _full(folder: pathlib.Path, error: OSError) -> str:
    """What a disk or a quota that is full leaves of the run in `folder`."""
    found = snapshots.paths(folder)
    left = f"goes on from {found[-1]}" if found else "had come to no snapshot and begins again"
    return (
        f"{error.filename or folder} cannot be written: {error.strerror}. Make room: with --resume the run {folder} "
        f"{left}, and teachers that are kept are not trained again; its log.txt has more"
    )


def recorded(recipe: Recipe, inputs: build.Inputs, record: Record, last: Snapshot | None = None) -> None:
    """`train`, its outcome written down. last: the snapshot to go on from."""
    with Stop() as stop:
        described = provenance.describe(recipe, inputs.data, inputs.feed.devices)
        if last:
            provenance.note_changes(record, described)
        record.about |= described
        try:
            record.go_on_from(last.metrics if last else {})
            hosts.same_everywhere({"the snapshot to go on from": last.number if last else 0})
            with Reporter(
                record.folder,
                tensorboard=recipe.tensorboard,
                wandb=recipe.wandb,
                profile_steps=recipe.profile_steps,
                config=record.config,
                earlier=last.metrics if last else {},
            ) as reporter:
                taken = Snapshots(
                    record, stop, minutes=recipe.checkpoint_minutes, steps=recipe.checkpoint_steps, last=last
                )
                try:
                    summary = train(Context(recipe, inputs.data, inputs.nets, inputs.feed, record, reporter, taken))
                finally:
                    taken.close()
        except BaseException as error:
            _record_end(record, error)
            raise
        record.finish("finished", summary)
        taken.remove()


def _record_end(record: Record, error: BaseException) -> None:
    status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
    logger.debug("%s: %s", status, error, exc_info=True)  # into log.txt; the console has it of the command line
    try:
        record.finish(status, {}, f"{type(error).__name__}: {error}")
    except OSError as another:  # a full disk, perhaps the very one
        logger.warning("that the run was %s could not be recorded: %s", status, another)


def train(context: Context) -> dict[str, object]:
    """All phases of a run; its row for `summary.csv`. The table goes to the log, checkpoints and metrics to the record.

    Raises UserError, before any training, where hosts differ in their configuration, data or initial values.
    """
    recipe, snapshots = context.recipe, context.snapshots
    variables, todo = begin(context)
    context.remaining = Remaining([runner.part(phase) for phase in todo])
    progress, main = Progress(), [phase for phase in todo if phase.network == "student"]
    for phase in todo:
        if snapshots.over(phase.name):
            continue
        if begun := snapshots.take(phase.name):
            progress = Progress.restored(begun.arrays, begun.values)
            variables = overlay(variables, begun.arrays["variables"])
        if phase.nets.teachers and not context.validation.teacher_counts:
            _read_teachers(context, todo, variables, progress)
        variables = runner.run_phase(context, phase, variables, progress, begun)
        if main and phase is main[-1]:  # before the control: it is on disk whatever becomes of that
            done = finished.of(variables, progress, context.record.metrics)
            finished.save(context.record, recipe, context.nets, done)
    if snapshots.ahead:
        raise UserError(
            f"the snapshot to go on from is of {snapshots.ahead!r}, which this run does not have: begin a new one"
        )
    if recipe.teachers_only:
        _measure_teachers(context, variables, progress)
    done = finished.of(variables, progress, context.record.metrics)
    if recipe.teachers_only:
        finished.save(context.record, recipe, context.nets, done)
    if recipe.trains_control:
        finished.save_control(context.record, done)
    found = evaluate_finished(recipe, context.nets, context.data, context.feed, done, context.validation)
    minutes = snapshots.seconds / 60
    context.log("final", found.summary)
    if found.training_free:
        context.record.log("final/training_free", found.training_free)
    context.record.log("time/total_minutes", minutes)
    if hosts.is_first():
        write(context.record.folder / "table.txt", results.render(recipe, found, width=1000) + "\n")
    table = results.render(recipe, found, reporting.width())
    logger.info("\n%s\n\nrecord: %s (%.1f minutes)", table, context.record.folder, minutes)
    context.reporter.final(keys.flat(recipe), found.summary)
    if recipe.pictures and hosts.is_first():
        drawings.draw(
            context.record.folder, context.record.metrics, context.data, found.logits, found.named, found.known
        )
    return {**found.summary, "minutes": minutes}


def begin(context: Context) -> tuple[Variables, list[Phase]]:
    """All variables, which wait on the host for who uses them, and what is to be trained; the log says of what."""
    recipe, data, nets, record = context.recipe, context.data, context.nets, context.record
    given = read_stored(record.config)
    hosts.same_everywhere(
        vars(given)
        | {"the versions": str(provenance.versions()), "the kind of devices": jax.local_devices()[0].device_kind}
    )
    hosts.same_everywhere(
        {
            f"the {name} data": split._replace(image=split.image[:: len(split.label) // 64 or 1])
            for name, split in data._asdict().items()
            if isinstance(split, Split)
        }
    )  # some of the images
    hosts.same_everywhere({"what each copy of a teacher sees": data.sees})
    hosts.same_everywhere({"what the data tell": told_by_data.values_of(recipe)})  # of all of them
    reporting.describe(recipe, data, context.feed.devices)
    reporting.describe_told(recipe, given, data)
    for line in specialists.lines(recipe, nets, data.class_names):
        logger.info(line)
    for key, count in overlap.check(data).items():
        record.log(key, count)
    if warning := recipe.uses_fusion and checks.check_gate(recipe.gate, data.num_classes):
        logger.warning(warning)
    if (weights := recipe.model.student.weights) and not recipe.teachers_only:
        path = origins.locate(weights, "model.student.weights", recipe.model.student.weights_sha256)
        record.confirm("weights/student", origins.digest(path), f"model.student.weights={weights!r}")
    logger.info("networks: initial values")
    own, random_stem = build.initial(recipe, nets, data.image_shape)  # before teachers: its errors come early
    collected = teachers.collect(recipe, nets, data, record, context.snapshots)
    variables = Variables(own.params | collected.variables.params, own.batch_stats | collected.variables.batch_stats)
    hosts.same_everywhere({"the networks' initial values": variables})
    images = {name: len(split.label) for name, split in data._asdict().items() if isinstance(split, Split)}
    todo = phases_of(
        recipe,
        nets,
        variables.params,
        images,
        {name: collected.places[name] for name in collected.train},
        calibrate=recipe.uses_fusion and (not weights or bool(random_stem)),
        rows=copies.rows_of(recipe, nets, data.sees, data.teacher_train.label),
    )
    return jax.device_get(variables), todo


def _read_teachers(context: Context, todo: Sequence[Phase], variables: Variables, progress: Progress) -> None:
    """Once they are ready. Where A-Steps train them the table has them as those leave them, the record as they were."""
    changed = "before/test_acc_teacher1" in context.record.metrics  # by A-Steps, of a run that goes on
    _measure_teachers(context, variables, progress, changed)
    if context.recipe.trains_teachers and not changed:
        test = context.evaluator("test")
        test.read_teachers(variables)
        context.log(
            "before",
            {f"test_acc_{name}": test.teacher_counts[name] / test.count for name in context.nets.teacher_names},
        )
    context.read_teachers(variables, todo)


def _measure_teachers(context: Context, variables: Variables, progress: Progress, changed: bool = False) -> None:
    """What validation says of teachers that are ready, and how they do on what they teach, unless this is known."""
    recipe, validation = context.recipe, context.validation
    validation.read_teachers(variables)
    if not (changed or recipe.teachers_only):
        teachers.check(context)
    if not (changed or progress.temperatures):
        progress.temperatures = memorisation.measure(context, variables)
    validation.divide(build.temperatures(recipe, progress.temperatures))
