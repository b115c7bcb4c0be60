"""Ready teachers: kept from an earlier run, imported, fine-tuned or trained from scratch."""
import dataclasses
import functools
import logging
import pathlib
import time
from typing import Any

import jax
from clu.parameter_overview import count_parameters

from asib_jax import build, streams
from asib_jax.engine import hosts, parallel
from asib_jax.objectives import freezing, state, steps
from asib_jax.weights import checkpoint, files as weights, pretrained, teacher_store
from asib_jax.data.batches import training_rows
from asib_jax.errors import UserError
from asib_jax.engine.evaluate import Evaluator
from asib_jax.record.experiment import Record
from asib_jax.engine.feed import Feed
from asib_jax.engine.loop import Part, run_part
from asib_jax.models.ensemble import Mode, Networks, Variables
from asib_jax.models.kd_model import KDModel, stage_names
from asib_jax.weights.pretrained import Imported
from asib_jax.recipe.recipe import Recipe, TeacherRecipe
from asib_jax.record.reporting import Reporter
from asib_jax.run import learning_rate
from asib_jax.record.snapshots import Snapshot, Snapshots
from asib_jax.objectives.state import TrainState
from asib_jax.objectives.steps import BTerms, Training
from asib_jax.weights.teacher_store import Place

logger = logging.getLogger("asib_jax")


def ready(recipe: Recipe, nets: Networks, data: build.Data, feed: Feed, record: Record, reporter: Reporter,
          snapshots: Snapshots) -> Variables:
    """Variables of every teacher, by name. Adapters start at random, keyed by the run's seed.

    Where a teacher comes from, the first of these that the configuration allows:
      1. for one that is trained here (`finetune_epochs` of given weights, or `train_epochs` from scratch): the
         checkpoint that an earlier run with the same key left in `teacher_store`;
      2. `weights`, fine-tuned for `finetune_epochs` if that is positive;
      3. training from scratch for `train_epochs`.
    A run that goes on trains those that it trained, or was about to train, when it was interrupted.
    Training uses the whole training split but never the validation images.

    Raises UserError for weights that do not fit, that fit only once fine-tuned, or that differ between hosts, and for
    a teacher that is not what the run began with.
    """
    start, done, places, train_now = {}, {}, {}, _train_now(snapshots)
    for k, (name, options) in enumerate(zip(nets.teacher_names, recipe.teachers)):
        model = nets.teachers[k]
        start[name] = build.init_network(model, recipe.seed, teacher_store.streams_name(recipe, k), data.image_shape)
        places[name] = _place(recipe, k, name, record)
        if snapshots.resumed and f"kept/{name}" in record.metrics:
            places[name] = teacher_store.moved(places[name], record.metrics[f"kept/{name}"])
        hosts.same_everywhere({f"the SHA-256 of {name}.weights": places[name].key["teacher"]["weights"]})
        looks = options.epochs and name not in train_now
        kept = teacher_store.load(places[name], data.teacher_train) if looks else None
        if kept is not None:
            done[name] = _whole(pretrained.fit_variables(kept, start[name], model.architecture), places[name].folder)
            logger.info("%s: %s, trained by an earlier run, from %s", name, options.name, places[name].folder)
        elif options.weights:
            start[name], fresh = given(options, name, model, start[name])
            logger.info("%s: %s from %s%s", name, options.name, options.weights,
                        f"; at random, because shapes differ: {'; '.join(fresh)}" if fresh else "")
    if not snapshots.resumed:
        snapshots.trained = train_now = [name for k, name in enumerate(nets.teacher_names)
                                         if recipe.teachers[k].epochs and name not in done]
    for k, name in enumerate(nets.teacher_names):  # after every file has been read: their errors come early
        if name in train_now:
            done[name] = train(recipe, nets, k, places[name], start[name], data, feed, record, reporter, snapshots)
        elif recipe.teachers[k].epochs and name not in done:
            raise UserError(f"{name} is no longer in {places[name].folder}, where this run found or left it: put it "
                            "back, or set the results_dir that it is in")
        if recipe.teachers[k].epochs and hosts.is_first():  # which alone has it on disk for certain
            record.confirm(f"kept/{name}", checkpoint.digest(places[name].folder / "checkpoint"),
                           f"{name} in {places[name].folder}")
    done = {name: done.get(name, start[name]) for name in nets.teacher_names}
    return Variables({name: variables["params"] for name, variables in done.items()},
                     {name: variables["batch_stats"] for name, variables in done.items()})


def _train_now(snapshots: Snapshots) -> list[str]:
    """Of a run that goes on, the teachers whose training is not over."""
    trained = snapshots.trained
    if snapshots.ahead in trained:
        return trained[trained.index(snapshots.ahead) :]
    return []


def _place(recipe: Recipe, k: int, name: str, record: Record) -> Place:
    """Where teacher `k` is kept. Its weights are downloaded for that, unless a kept teacher was made from them."""
    given = recipe.teachers[k].weights
    if not given:
        return teacher_store.place(recipe, k, "")
    if weights.cached(given) is None and (found := teacher_store.find(recipe, k)):
        return found
    digest = weights.digest(weights.locate(given, f"{name}.weights", recipe.teachers[k].weights_sha256))
    record.confirm(f"weights/{name}", digest, f"{name}.weights={given!r}")
    return teacher_store.place(recipe, k, digest)


def given(options: TeacherRecipe, name: str, model: KDModel, variables: dict[str, Any]) -> Imported:
    """The variables (or their shapes) with the teacher's given weights in their place.

    Raises UserError for weights that do not fit, or fit only once fine-tuned.
    """
    imported = build.read_weights(options.weights, f"{name}.weights", model, variables,
                                  options.finetune_freeze_level if options.finetune_epochs else -1,
                                  sha256=options.weights_sha256)
    if imported.fresh and not options.finetune_epochs:
        raise UserError(f"{name}.weights={options.weights!r} fit {options.name} only in part; at random, because "
                        f"shapes differ: {'; '.join(imported.fresh)}. Set {name}.finetune_epochs, or take weights "
                        "fitted to the classes and the size of these images")
    return imported


def _whole(imported: Imported, folder: pathlib.Path) -> dict[str, Any]:
    if imported.fresh:
        raise UserError(f"the teacher in {folder} is not this network: {'; '.join(imported.fresh)}")
    return imported.variables


def train(recipe: Recipe, nets: Networks, k: int, place: Place, variables: dict[str, Any], data: build.Data,
          feed: Feed, record: Record, reporter: Reporter, snapshots: Snapshots) -> dict[str, Any]:
    """Supervised training of teacher `k` with AdamW, kept at `place`: its best epoch on validation.

    It ends early after `early_stopping_patience` epochs of which none was better by `early_stopping_min_delta`.
    """
    options, model, name = recipe.teachers[k], nets.teachers[k], nets.teacher_names[k]
    split, batch_size, axis = data.teacher_train, recipe.dataset.batch_size, feed.axis_name
    training = make_training(recipe, k, model, variables["params"], axis)
    step = feed.compile(steps.make_train_step(training.loss, training.tx, axis_name=axis), trains_convolutions=True,
                        donate_carry=True)
    examples, snapshot = feed.place(**split._asdict()), snapshots.take(name)
    best = _resumed_best(snapshot) if snapshot else _Best()
    current, frozen = _begin(recipe, training, variables, snapshot, feed)
    logger.info("%s: %s %s, trainable/total parameters %s/%s", name, "fine-tuning" if options.weights else "training",
                options.name, f"{count_parameters(current.params):,}", f"{count_parameters(variables['params']):,}")
    validation = Evaluator(Networks(model.clone(adapter_dim=0)), Variables({}, {}), data.validation, name="validation",
                           batch_size=batch_size, feed=feed)
    steps_per_epoch, start = len(split.label) // batch_size, time.perf_counter()
    rate = learning_rate(recipe, base=options.lr, steps_per_epoch=steps_per_epoch, epochs=options.epochs,
                         warmup_epochs=options.warmup_epochs, devices=len(feed.devices))

    def calls(epoch: int, first: int):
        order = streams.rng(recipe.seed, f"order/{teacher_store.streams_name(recipe, k)}", epoch)
        return feed.calls(step, training_rows(len(split.label), batch_size, order)[first:], examples)

    def after(epoch: int, current: TrainState, controls: dict, metrics: dict, steps: int, seconds: float) -> bool:
        whole = state.join(current, frozen)
        accuracy = validation.accuracies(whole)["student"]
        _log_epoch(record, name, epoch, {**metrics, "lr": rate(best.steps + steps - 1), "val_acc": accuracy}, seconds)
        return best.over(options, accuracy, epoch, steps, whole.of("student"))

    run_part(Part(
        name=name, epochs=options.epochs, step=step, frozen=frozen, learning_rate=rate, calls=calls, after=after,
        controls=lambda epoch: controls_of(recipe, k, epoch), first_step=lambda: best.steps,
        bar=lambda epoch: reporter.epoch_bar(steps_per_epoch * batch_size, f"{name} {epoch + 1}/{options.epochs}"),
        content=lambda current: _content(current, frozen, best), max_nonfinite_steps=recipe.max_nonfinite_steps,
        snapshot_at_end=True), current, snapshots, snapshot)
    logger.info("%s: %s trained on %d images in %.0f s, best in epoch %d: %.2f %% on validation", name, options.name,
                len(split.label), time.perf_counter() - start, best.epoch + 1, 100 * best.accuracy)
    measured = {"validation_accuracy": best.accuracy, "epoch": best.epoch + 1}
    if teacher_store.save(place, options.weights, best.variables, split, measured):
        return best.variables
    logger.warning("%s was there already, of another run: this one goes on with that teacher", place.folder)
    kept = teacher_store.load(place, split)
    return _whole(pretrained.fit_variables(kept, variables, model.architecture), place.folder)


def _begin(recipe: Recipe, training: Training, variables: dict[str, Any], snapshot: Snapshot | None, feed: Feed
           ) -> tuple[TrainState, Variables]:
    """What trains and what stands still, as the snapshot has it if there is one."""
    own = {"batch_stats": {}, **snapshot.arrays["variables"]} if snapshot else variables
    whole = Variables({"student": own["params"]}, {"student": own["batch_stats"]})
    current, frozen = state.begin(whole, training.mask, training.trained_stats, training.tx,
                                  snapshot.arrays["opt_state"] if snapshot else None, recipe.compute_dtype)
    return parallel.replicate((state.with_loss_scale(current, snapshot and snapshot.arrays), frozen), feed.devices)


def _resumed_best(snapshot: Snapshot) -> "_Best":
    held = snapshot.arrays.get("best")
    return _Best(**snapshot.values["best"], variables=held and {"batch_stats": {}, **held})  # {}: without BatchNorm


def _content(current: TrainState, frozen: Variables, best: "_Best") -> tuple[dict[str, Any], dict[str, Any]]:
    """As `loop.Part` has it."""
    arrays = {"variables": state.join(current, frozen).of("student"), "opt_state": current.opt_state,
              "loss_scale": current.loss_scale, "best": best.variables}
    return arrays, {"best": {field.name: getattr(best, field.name) for field in dataclasses.fields(best)
                             if field.name != "variables"}}


def controls_of(recipe: Recipe, k: int, epoch: int) -> dict[str, jax.Array]:
    """The random streams of an epoch of teacher `k` (from 0)."""
    name = teacher_store.streams_name(recipe, k)
    return {f"{stream}_key": streams.key(recipe.seed, f"{stream}/{name}", epoch)
            for stream in ("augment", "mix", "dropout")}


def _log_epoch(record: Record, name: str, epoch: int, metrics: dict[str, float], seconds: float) -> None:
    """Record an epoch's scalars under `teacher1/epoch01/name`, and write the record."""
    for metric, value in metrics.items():
        record.log(f"{name}/epoch{epoch + 1:02d}/{metric}", value)
    record.log(f"time/{name}/epoch{epoch + 1:02d}/seconds", seconds)
    record.save()
    logger.info("%s epoch %d: loss %.4f, training accuracy %.2f %%, validation accuracy %.2f %%  %.1f s", name,
                epoch + 1, metrics["loss"], 100 * metrics["acc"], 100 * metrics["val_acc"], seconds)


@dataclasses.dataclass
class _Best:
    """The best epoch on validation so far, on the host; how many steps there were, and when it was clearly better."""

    accuracy: float = -1.0
    epoch: int = -1
    variables: dict[str, Any] | None = None
    steps: int = 0
    mark: float = -1.0  # the last accuracy that was better by more than early_stopping_min_delta
    waited: int = 0  # epochs since

    def over(self, options: TeacherRecipe, accuracy: float, epoch: int, steps: int, variables: dict[str, Any]) -> bool:
        """Take note of an epoch; whether training ends early."""
        self.steps += steps
        if accuracy > self.accuracy:
            self.accuracy, self.epoch, self.variables = accuracy, epoch, jax.device_get(variables)
        better = accuracy > self.mark + options.early_stopping_min_delta
        self.mark, self.waited = (accuracy, 0) if better else (self.mark, self.waited + 1)
        early = self.waited == options.early_stopping_patience > 0
        if early:
            logger.info("stopped early, %d epochs without a better validation accuracy", self.waited)
        return early


def make_training(recipe: Recipe, k: int, model: KDModel, params: dict[str, Any], axis_name: str | None = None
                  ) -> Training:
    """The supervised training of teacher `k` (from 0), which is its own "student" of labels alone."""
    options, names = recipe.teachers[k], stage_names(model)
    level = options.finetune_freeze_level if options.weights else -1
    mode = Mode(train=True, frozen_stages=freezing.frozen_stages(level, len(names), "finetune_freeze_level"))
    mask = freezing.trainable(params, names, level)
    if "distill_adapter" in mask:  # no label reaches it
        mask["distill_adapter"] = False
    terms = BTerms(recipe.dataset.data_aug, label_smoothing=options.label_smoothing,
                   cutmix_alpha=options.finetune_cutmix_alpha if options.finetune_use_cutmix else 0.0)
    tx = state.make_optimizer("adamw", weight_decay=options.weight_decay, grad_clip_norm=recipe.grad_clip_norm)
    loss = functools.partial(steps.b_loss, nets=Networks(model), terms=terms, mode=mode, axis_name=axis_name)
    return Training(loss, {"student": mask}, ("student",), tx)
