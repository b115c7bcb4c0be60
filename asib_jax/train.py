"""A whole run: teachers ready, stages of A-Step and B-Step, the final table (SPEC 7)."""
import collections
import dataclasses
import logging
import pathlib
from collections.abc import Sequence

import jax

from asib_jax import a_step, b_step, build, teachers
from asib_jax.data import overlap
from asib_jax.engine import hosts, parallel
from asib_jax.recipe import checks
from asib_jax.record import finished, provenance
from asib_jax.tools import device_check
from asib_jax.weights import checkpoint, files as weights
from asib_jax.data.sources import Split
from asib_jax.errors import UserError
from asib_jax.engine.evaluate import Evaluator
from asib_jax.record.experiment import Record, read_about
from asib_jax.engine.feed import Feed
from asib_jax.record.finished import Finished
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.recipe.recipe import Recipe
from asib_jax.record.reporting import Reporter
from asib_jax.record.results import Results, final_results, render
from asib_jax.run import Progress, Run
from asib_jax.record.signals import Interrupted, Stop
from asib_jax.record.snapshots import Snapshot, Snapshots
from asib_jax.engine.stored_views import StoredViews

logger = logging.getLogger("asib_jax")


def recorded(recipe: Recipe, inputs: build.Inputs, record: Record, last: Snapshot | None = None) -> None:
    """`train`, its outcome written down whatever it is: a failed or interrupted run is never a finished one.

    last: the snapshot to go on from. Raises Interrupted after a signal, with a snapshot that holds all that was done.
    """
    with Stop() as stop:
        described = provenance.describe(recipe, inputs.data, inputs.feed.devices)
        if last:
            note_changes(recipe, record, described)
        record.about |= described
        try:
            record.go_on_from(last.metrics if last else {})
            hosts.same_everywhere({"the snapshot to go on from": last.number if last else 0})
            with Reporter(record.folder, tensorboard=recipe.tensorboard, wandb=recipe.wandb,
                          profile_steps=recipe.profile_steps, config=record.config,
                          purge_from=last.values.get("epochs", 0) + 1 if last else 0) as reporter:
                snapshots = Snapshots(record, stop, minutes=recipe.checkpoint_minutes, steps=recipe.checkpoint_steps,
                                      last=last)
                try:
                    summary = train(recipe, inputs, record, reporter, snapshots)
                finally:
                    snapshots.close()
        except BaseException as error:
            _record_end(record, error)
            raise
        record.finish("finished", summary)
        snapshots.remove()


def _record_end(record: Record, error: BaseException) -> None:
    status = "interrupted" if isinstance(error, Interrupted | KeyboardInterrupt) else "failed"
    logger.debug("%s: %s", status, error, exc_info=True)  # into log.txt; the console has it of the command line
    try:
        record.finish(status, {}, f"{type(error).__name__}: {error}")
    except OSError as another:  # a full disk, perhaps the very one
        logger.error("that the run was %s could not be recorded: %s", status, another)


def note_changes(recipe: Recipe, record: Record, now: dict[str, object]) -> None:
    """Warn where a run goes on with other code, packages or devices, and keep in its record what they were before.

    Raises UserError for other data, or as many devices as make other learning rates.
    """
    before = {key: record.about.get(key) for key in now}
    changed = [key for key in now if before[key] != now[key] and key != "data"]  # which is a path
    if "data_sha256" in changed:
        raise UserError(f"{now['data']} is not the data that the run {record.folder} began with ({before['data']}): the "
                        "SHA-256 of its splits differ")
    if "devices" in changed and recipe.scale_lr_with_devices:
        raise UserError(f"scale_lr_with_devices: the run {record.folder} began with {before['devices']} devices, here "
                        f"are {now['devices']}, and every learning rate would be another; see num_devices")
    if changed:
        logger.warning("going on with another %s than before: bits may differ",
                       ", ".join(key.replace("_", " ") for key in changed))
        record.about["before"] = [*record.about.get("before", []), {key: before[key] for key in changed}]


def train(recipe: Recipe, inputs: build.Inputs, record: Record, reporter: Reporter, snapshots: Snapshots
          ) -> dict[str, object]:
    """Run the recipe and return its row for `summary.csv`. The table goes to the log, checkpoints and metrics to the
    record's folder.

    Raises UserError, before any training, where hosts differ in their configuration, data or initial values.
    """
    hosts.same_everywhere(vars(recipe) | {"the versions": str(device_check.versions()),
                                          "the kind of devices": jax.local_devices()[0].device_kind})
    feed, data, nets = inputs
    hosts.same_everywhere({f"the {name} data": split._replace(image=split.image[:: len(split.label) // 64 or 1])
                           for name, split in data._asdict().items() if isinstance(split, Split)})  # some of the images
    describe(recipe, data, feed.devices)
    for key, count in overlap.check(data).items():
        record.log(key, count)
    if warning := recipe.uses_fusion and checks.check_gate(recipe.enable_kd_after_syn_acc, data.num_classes):
        logger.warning(warning)
    if recipe.teachers_only:
        ready, validation = teachers.ready(recipe, nets, data, feed, record, reporter, snapshots), None
        done = Finished(ready, {}, collections.Counter())
        finished.save(record, recipe, nets, done)
    else:
        done, validation = distil(recipe, nets, data, feed, record, reporter, snapshots)
    results = evaluate_finished(recipe, nets, data, feed, done, validation)
    minutes = snapshots.seconds / 60
    for key, value in results.summary.items():
        record.log(f"final/{key}", value)
    record.log("time/total_minutes", minutes)
    logger.info("\n%s\n\nrecord: %s (%.1f minutes)", render(recipe, results), record.folder, minutes)
    return {**results.summary, "minutes": minutes}


def distil(recipe: Recipe, nets: Networks, data: build.Data, feed: Feed, record: Record, reporter: Reporter,
           snapshots: Snapshots) -> tuple[Finished, Evaluator]:
    """Teachers ready, every stage, the control: what is finished then, and saved, and the evaluator of validation."""
    if given := recipe.model.student.weights:
        path = weights.locate(given, "model.student.weights", recipe.model.student.weights_sha256)
        record.confirm("weights/student", weights.digest(path), f"model.student.weights={given!r}")
    student = build.init_student_and_fusion(recipe, nets, data.image_shape)  # before teachers: its errors come early
    ready = teachers.ready(recipe, nets, data, feed, record, reporter, snapshots)
    variables = Variables({**student.params, **ready.params}, {**student.batch_stats, **ready.batch_stats})
    run, variables = prepare(recipe, nets, data, feed, record, reporter, snapshots, variables)
    if snapshots.ahead.startswith("control/"):
        done = finished.load(record.folder, recipe, nets, data.image_shape)
        if recipe.trains_teachers:
            run.validation.read_teachers(parallel.replicate(done.variables, feed.devices))
    else:
        done = distilled(run, variables)
    if recipe.train_control and recipe.uses_teachers:
        control = train_control(run)
        finished.save_control(record, control)
        done = dataclasses.replace(done, students=done.students | control)
    return done, run.validation


def distilled(run: Run, variables: Variables) -> Finished:
    """What all stages come to, saved."""
    recipe, nets = run.recipe, run.nets
    if recipe.trains_teachers and not run.snapshots.ahead:  # the table has them as the A-Steps leave them
        before = evaluator(recipe, nets, variables, run.data.test, "test", run.feed)
        counts = before.teacher_counts()
        run.log_scalars("before", {f"test_acc_{name}": counts[name] / before.count for name in nets.teacher_names})
    variables, progress = run_stages(run, variables)
    students = {"last": progress.last_student, "best": progress.best_student}
    done = Finished(variables, students, progress.distilled_steps)
    finished.save(run.record, recipe, nets, done)  # before the control: it is on disk whatever becomes of that
    return done


def describe(recipe: Recipe, data: build.Data, devices: Sequence[jax.Device]) -> None:
    """Log lines by which a reader verifies an ablation: data, and the active KD, IB/CCCP and freezing settings."""
    logger.info("data: %s; %d training (student), %d training (teachers), %d validation, %d test images, %d classes",
                data.origin, len(data.train.label), len(data.teacher_train.label), len(data.validation.label),
                len(data.test.label), data.num_classes)
    logger.info("devices: %d x %s%s, %s", len(devices), devices[0].device_kind,
                f" on {jax.process_count()} hosts" if jax.process_count() > 1 else "", recipe.compute_dtype)
    if recipe.teachers_only:
        return
    logger.info("KD: target %s, ce_alpha %g, kd_alpha %g, tau %s, kd_max_ratio %g, feat_kd_alpha %g", recipe.kd_target,
                recipe.ce_alpha, recipe.kd_alpha, recipe.tau_schedule or recipe.tau, recipe.kd_max_ratio,
                recipe.feat_kd_alpha)
    logger.info("A-Step: %d epochs a stage, IB %s, CCCP %s, synergy_ce_alpha %g, synergy_kd_alpha %g, teachers' "
                "adapters %s, teachers %s", recipe.a_epochs,
                f"on (beta {recipe.ib_beta:g})" if recipe.use_ib else "off",
                f"on (alpha {recipe.cccp_alpha:g})" if recipe.use_cccp else "off", recipe.synergy_ce_alpha,
                recipe.synergy_kd_alpha, "trained" if recipe.train_distill_adapter_only else "fixed",
                "trained" if recipe.trains_teachers else "frozen")
    levels = recipe.student_freeze_level if recipe.use_partial_freeze else "off"
    logger.info("PPF: student freeze level %s, freeze_bn %s", levels, recipe.student_freeze_bn)


def prepare(recipe: Recipe, nets: Networks, data: build.Data, feed: Feed, record: Record, reporter: Reporter,
            snapshots: Snapshots, variables: Variables) -> tuple[Run, Variables]:
    """The run's shared parts, and all variables on its devices before the first stage."""
    hosts.same_everywhere({"the networks' initial values": variables})
    variables = parallel.replicate(variables, feed.devices)
    validation = evaluator(recipe, nets, variables, data.validation, "validation", feed)
    images, labels = feed.place(image=data.train.image), feed.place(label=data.train.label, index=data.train.index)
    logger.info("training images: %s", "on the devices" if images.resident else "on the host, sent ahead of each call: "
                f"more than the room of device_data_gb={recipe.device_data_gb:g}")
    stored = StoredViews(recipe, nets, data.train, feed, variables)
    return (Run(recipe, nets, data, feed, record, reporter, validation, images, labels, stored, snapshots), variables)


def run_stages(run: Run, variables: Variables, epochs_before: int = 0) -> tuple[Variables, Progress]:
    """Every stage's A-Step and B-Step. Each stage's last student, and the best of the run so far, are saved."""
    progress = Progress(epochs=epochs_before)
    if run.recipe.uses_fusion and not run.recipe.model.student.weights and not run.snapshots.ahead:
        variables = a_step.calibrate(run, variables)
    for stage in range(len(run.recipe.b_epochs)):
        if run.recipe.uses_fusion and not run.snapshots.over(run.part("a", stage)):
            variables = a_step.run_a_step(run, variables, progress, stage)
        if run.snapshots.over(run.part("b", stage)):
            continue
        variables = b_step.run_b_step(run, variables, progress, stage)
        folder, name = run.record.folder / "checkpoints", f"{run.prefix.replace('/', '_')}stage{stage + 1}"
        checkpoint.save(folder / f"{name}_last", progress.last_student)
        checkpoint.save(folder / f"{name}_best", progress.best_student)
    return variables, progress


def without_teachers(recipe: Recipe) -> Recipe:
    """The same student, data and epochs, learning from labels alone."""
    return dataclasses.replace(recipe, ce_alpha=1.0, kd_alpha=0.0, feat_kd_alpha=0.0, kd_target="avg",
                               teacher_adapt_epochs=0, train_control=False)


def train_control(run: Run) -> dict[str, dict]:
    """The last and best student of the same run without teachers, as `Finished.students` names them."""
    logger.info("control: the same student without teachers")
    recipe, stages = without_teachers(run.recipe), len(run.recipe.b_epochs)
    nets = build.build_networks(recipe, run.data.num_classes, run.feed.axis_name)
    student = build.init_student_and_fusion(recipe, nets, run.data.image_shape)
    variables = parallel.replicate(student, run.feed.devices)
    validation = evaluator(recipe, nets, variables, run.data.validation, "validation", run.feed)
    stored = StoredViews(recipe, nets, run.data.train, run.feed, variables)
    control = dataclasses.replace(run, recipe=recipe, nets=nets, validation=validation, stored=stored,
                                  prefix="control/", _compiled={})
    before = (run.recipe.a_epochs * stages if run.recipe.uses_fusion else 0) + sum(run.recipe.b_epochs)
    _, progress = run_stages(control, variables, before)
    return {"control_last": progress.last_student, "control_best": progress.best_student}


def evaluate_finished(recipe: Recipe, nets: Networks, data: build.Data, feed: Feed, done: Finished,
                      validation: Evaluator | None = None) -> Results:
    """Count correct predictions of everything on validation and, the only time, on test."""
    variables = parallel.replicate(done.variables, feed.devices)
    done = dataclasses.replace(done, variables=variables, students=parallel.replicate(done.students, feed.devices))
    if validation is None:
        validation = evaluator(recipe, nets, variables, data.validation, "validation", feed)
    return final_results(recipe, nets, done, validation, evaluator(recipe, nets, variables, data.test, "test", feed))


def evaluator(recipe: Recipe, nets: Networks, variables: Variables, split: Split, name: str, feed: Feed) -> Evaluator:
    """The evaluator of a split, with the teachers as they are now."""
    return Evaluator(nets, variables, split, name=name, batch_size=recipe.dataset.batch_size, feed=feed,
                     cache="" if recipe.trains_teachers else recipe.teacher_cache)


def evaluate_run(folder: pathlib.Path) -> str:
    """The final table of the finished run in `folder`, computed anew from disk.

    Raises UserError where the data are not those of the run, and the errors of `finished.load`.
    """
    recipe = finished.read_recipe(folder)
    feed = Feed(tuple(parallel.run_devices(1)), recipe.device_data_gb)  # whatever the run used: counts are the same
    data = build.load_data(recipe)
    theirs, ours = read_about(folder).get("data_sha256", {}), provenance.data_digests(data)
    if changed := [split for split in ours if theirs.get(split) != ours[split]]:
        raise UserError(f"{data.origin} is not the data of the run in {folder}: about.json there has another SHA-256 "
                        f"of {', '.join(changed)}, or none; dataset.path in its config.json says where they were")
    nets = build.build_networks(recipe, data.num_classes, feed.axis_name)
    done = finished.load(folder, recipe, nets, data.image_shape)
    return render(recipe, evaluate_finished(recipe, nets, data, feed, done))
