"""Ready teachers: kept from an earlier run, imported, fine-tuned or trained from scratch."""
import functools
import logging
import pathlib
import shutil
import time
from typing import Any

import jax
from clu.parameter_overview import count_parameters

from asib_jax import (build, checkpoint, freezing, hosts, parallel, pretrained, state, steps, streams, teacher_store,
                      weights)
from asib_jax.data.batches import training_rows
from asib_jax.errors import UserError
from asib_jax.evaluate import Evaluator
from asib_jax.experiment import Record
from asib_jax.feed import Feed
from asib_jax.loop import run_epoch
from asib_jax.models.ensemble import Mode, Networks, Variables
from asib_jax.models.kd_model import KDModel, stage_names
from asib_jax.pretrained import Imported
from asib_jax.recipe import Recipe, TeacherRecipe
from asib_jax.reporting import Reporter
from asib_jax.run import learning_rate
from asib_jax.steps import BTerms, Training
from asib_jax.teacher_store import Place

logger = logging.getLogger("asib_jax")


def ready(recipe: Recipe, nets: Networks, data: build.Data, feed: Feed, record: Record, reporter: Reporter
          ) -> Variables:
    """Variables of every teacher, by name. Adapters start at random, keyed by the run's seed.

    Where a teacher comes from, the first of these that the configuration allows:
      1. for one that is trained here (`finetune_epochs` of given weights, or `train_epochs` from scratch): the
         checkpoint that an earlier run with the same key left in `teacher_store`;
      2. `weights`, fine-tuned for `finetune_epochs` if that is positive;
      3. training from scratch for `train_epochs`.
    Training uses the whole training split but never the validation images.

    Raises UserError for weights that do not fit, that fit only once fine-tuned, or that differ between hosts.
    """
    start, done, places = {}, {}, {}
    for k, (name, options) in enumerate(zip(nets.teacher_names, recipe.teachers)):
        model = nets.teachers[k]
        start[name] = build.init_network(model, recipe.seed, teacher_store.streams_name(recipe, k), data.image_shape)
        places[name] = _place(recipe, k, name, record)
        hosts.same_everywhere({f"the SHA-256 of {name}.weights": places[name].key["teacher"]["weights"]})
        kept = teacher_store.load(places[name], data.teacher_train) if options.epochs else None
        if kept is not None:
            done[name] = _whole(pretrained.fit_variables(kept, start[name], model.architecture), places[name].folder)
            logger.info("%s: %s, trained by an earlier run, from %s", name, options.name, places[name].folder)
        elif options.weights:
            start[name], fresh = given(options, name, model, start[name])
            logger.info("%s: %s from %s%s", name, options.name, options.weights,
                        f"; at random, because shapes differ: {'; '.join(fresh)}" if fresh else "")
    for k, name in enumerate(nets.teacher_names):  # after every file has been read: their errors come early
        if name not in done:
            done[name] = start[name]
            if recipe.teachers[k].epochs:
                done[name] = train(recipe, nets, k, places[name], start[name], data, feed, record, reporter)
    return Variables({name: variables["params"] for name, variables in done.items()},
                     {name: variables["batch_stats"] for name, variables in done.items()})


def _place(recipe: Recipe, k: int, name: str, record: Record) -> Place:
    """Where teacher `k` is kept. Its weights are downloaded for that, unless a kept teacher was made from them."""
    given = recipe.teachers[k].weights
    if not given:
        return teacher_store.place(recipe, k, "")
    if weights.cached(given) is None and (found := teacher_store.find(recipe, k)):
        return found
    digest = weights.digest(weights.locate(given, f"{name}.weights"))
    record.log(f"weights/{name}", digest)
    return teacher_store.place(recipe, k, digest)


def given(options: TeacherRecipe, name: str, model: KDModel, variables: dict[str, Any]) -> Imported:
    """The variables (or their shapes) with the teacher's given weights in their place.

    Raises UserError for weights that do not fit, or fit only once fine-tuned.
    """
    imported = build.read_weights(options.weights, f"{name}.weights", model, variables,
                                  options.finetune_freeze_level if options.finetune_epochs else -1)
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
          feed: Feed, record: Record, reporter: Reporter) -> dict[str, Any]:
    """Supervised training of teacher `k` with AdamW, kept at `place`: its best epoch on validation.

    It ends early after `early_stopping_patience` epochs of which none was better by `early_stopping_min_delta`. While
    it goes on, the best epoch so far is a checkpoint of the run.
    """
    options, model, name = recipe.teachers[k], nets.teachers[k], nets.teacher_names[k]
    split, batch_size, axis = data.teacher_train, recipe.dataset.batch_size, feed.axis_name
    training = make_training(recipe, k, model, variables["params"], axis)
    step = feed.compile(steps.make_train_step(training.loss, training.tx, axis_name=axis), trains_convolutions=True,
                        donate_carry=True)
    examples = feed.place(**split._asdict())
    whole = Variables({"student": variables["params"]}, {"student": variables["batch_stats"]})
    current, frozen = parallel.replicate(state.begin(whole, training.mask, training.trained_stats, training.tx, None,
                                                     recipe.compute_dtype), feed.devices)
    logger.info("%s: %s %s, trainable/total parameters %s/%s", name, "fine-tuning" if options.weights else "training",
                options.name, f"{count_parameters(current.params):,}", f"{count_parameters(variables['params']):,}")
    validation = Evaluator(Networks(model.clone(adapter_dim=0)), Variables({}, {}), data.validation, name="validation",
                           batch_size=batch_size, feed=feed)
    steps_per_epoch = len(split.label) // batch_size
    rate = learning_rate(recipe, base=options.lr, steps_per_epoch=steps_per_epoch, epochs=options.epochs,
                         warmup_epochs=options.warmup_epochs, devices=len(feed.devices))
    best, start, done = _Best(record.folder / "checkpoints" / f"{name}_best"), time.perf_counter(), 0
    for epoch in range(options.epochs):
        began = time.perf_counter()
        with reporter.epoch_bar(steps_per_epoch * batch_size, f"{name} {epoch + 1}/{options.epochs}") as bar:
            order = streams.rng(recipe.seed, f"order/{teacher_store.streams_name(recipe, k)}", epoch)
            rows = training_rows(len(split.label), batch_size, order)
            current, metrics, count = run_epoch(
                step, current, frozen, feed.calls(step, rows, examples), learning_rate=rate, first_step=done,
                controls=controls_of(recipe, k, epoch), on_images=bar.update)
        done += count
        whole = state.join(current, frozen)
        metrics |= {"lr": rate(done - 1), "val_acc": validation.accuracies(whole)["student"]}
        _log_epoch(record, name, epoch, metrics, time.perf_counter() - began)
        if metrics["val_acc"] > best.accuracy:
            best.keep(metrics["val_acc"], epoch, jax.device_get(whole.of("student")))
        if best.waited(metrics["val_acc"], options.early_stopping_min_delta) == options.early_stopping_patience > 0:
            logger.info("%s: stopped early, %d epochs without a better validation accuracy", name,
                        options.early_stopping_patience)
            break
    logger.info("%s: %s trained on %d images in %.0f s, best in epoch %d: %.2f %% on validation", name, options.name,
                len(split.label), time.perf_counter() - start, best.epoch + 1, 100 * best.accuracy)
    teacher_store.save(place, options.weights, best.variables, split,
                       {"validation_accuracy": best.accuracy, "epoch": best.epoch + 1})
    best.remove()
    return best.variables


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


class _Best:
    """The best epoch on validation so far, in memory and on disk, and how long ago it was clearly better."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.accuracy, self.epoch, self.variables = folder, -1.0, -1, None
        self._mark, self._waited = -1.0, 0

    def keep(self, accuracy: float, epoch: int, variables: dict[str, Any]) -> None:
        """Replace what was best; the checkpoint before is removed only once the new one is complete."""
        if hosts.is_first():
            earlier = [path for path in self.folder.iterdir()] if self.folder.exists() else []
            checkpoint.save(self.folder / f"epoch{epoch + 1:02d}", variables)
            for path in earlier:
                shutil.rmtree(path)
        self.accuracy, self.epoch, self.variables = accuracy, epoch, variables

    def remove(self) -> None:
        """From disk."""
        if hosts.is_first():
            shutil.rmtree(self.folder)

    def waited(self, accuracy: float, min_delta: float) -> int:
        """How many epochs have passed since one was better than the last of these by more than `min_delta`."""
        better = accuracy > self._mark + min_delta
        self._mark, self._waited = (accuracy, 0) if better else (self._mark, self._waited + 1)
        return self._waited


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
