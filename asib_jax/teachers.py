"""Ready teachers: kept from an earlier run, imported, fine-tuned or trained from scratch."""
import functools
import logging
import time
from typing import Any

import jax

from asib_jax import build, freezing, parallel, state, steps, streams, teacher_store, weights
from asib_jax.data.batches import training_batches
from asib_jax.evaluate import Evaluator
from asib_jax.experiment import Record
from asib_jax.loop import run_epoch
from asib_jax.models.ensemble import Mode, Networks, Variables
from asib_jax.models.kd_model import KDModel, stage_names
from asib_jax.recipe import Recipe
from asib_jax.reporting import Reporter
from asib_jax.run import learning_rate
from asib_jax.steps import BTerms, Training

logger = logging.getLogger("asib_jax")


def ready(recipe: Recipe, nets: Networks, data: build.Data, devices: list[jax.Device], record: Record,
          reporter: Reporter) -> Variables:
    """Variables of every teacher, by name. Adapters start at random, keyed by the run's seed.

    Where a teacher comes from, the first of these that the configuration allows:
      1. for one that is trained here (`finetune_epochs` of given weights, or `train_epochs` from scratch): the
         checkpoint that an earlier run with the same key left in `teacher_store`;
      2. `weights`, fine-tuned for `finetune_epochs` if that is positive;
      3. training from scratch for `train_epochs`.
    Training uses the whole training split but never the validation images.

    Raises ValueError for weights that do not fit, or that fit only once fine-tuned.
    """
    start, done = {}, {}
    for k, (name, options) in enumerate(zip(nets.teacher_names, recipe.teachers)):
        if options.weights:
            weights.locate(options.weights, f"{name}.weights")  # downloaded first: the store's key is of what it holds
        path = teacher_store.folder(recipe, k) if options.epochs else None
        kept = teacher_store.load(path, data.teacher_train) if path else None
        start[name] = _initial(recipe, nets, k, data.image_shape, imported=kept is None)
        if kept is not None:
            logger.info("%s: %s, trained by an earlier run, from %s", name, options.name, path)
            params = {**start[name]["params"], **kept["params"]}
            done[name] = {"params": params, "batch_stats": kept["batch_stats"]}
    for k, name in enumerate(nets.teacher_names):  # after every file has been read: their errors come early
        if name not in done:
            done[name] = start[name]
            if recipe.teachers[k].epochs:
                done[name] = train(recipe, nets, k, start[name], data, devices, record, reporter)
    return Variables({name: variables["params"] for name, variables in done.items()},
                     {name: variables["batch_stats"] for name, variables in done.items()})


def _initial(recipe: Recipe, nets: Networks, k: int, image_shape: tuple[int, ...], imported: bool) -> dict[str, Any]:
    """Teacher `k` at random or, where `imported`, with the weights it is given."""
    options, model, name = recipe.teachers[k], nets.teachers[k], nets.teacher_names[k]
    variables = build.init_network(model, recipe.seed, teacher_store.streams_name(recipe, k), image_shape)
    if not options.weights or not imported:
        return variables
    variables, fresh = build.read_weights(options.weights, f"{name}.weights", model, variables)
    if fresh and not options.finetune_epochs:
        raise ValueError(f"{name}.weights={options.weights!r} fit {options.name} only in part: {'; '.join(fresh)}. "
                         f"What differs would stay random; set {name}.finetune_epochs, or take weights fitted to the "
                         "classes and the size of these images")
    return variables


def train(recipe: Recipe, nets: Networks, k: int, variables: dict[str, Any], data: build.Data,
          devices: list[jax.Device], record: Record, reporter: Reporter) -> dict[str, Any]:
    """Supervised training of teacher `k` with AdamW, kept in `teacher_store`: its best epoch on validation.

    It ends early after `early_stopping_patience` epochs of which none was better by `early_stopping_min_delta`.
    """
    options, model, name = recipe.teachers[k], nets.teachers[k], nets.teacher_names[k]
    split, batch_size = data.teacher_train, recipe.dataset.batch_size
    axis = parallel.axis_name(devices)
    training = make_training(recipe, k, model, variables["params"], axis)
    step = parallel.compile_step(steps.make_train_step(training.loss, training.tx, axis_name=axis), devices,
                                 arguments=4, donate_first=True)
    whole = Variables({"student": variables["params"]}, {"student": variables["batch_stats"]})
    current, frozen = parallel.replicate(state.begin(whole, training.mask, training.trained_stats, training.tx, None,
                                                     recipe.compute_dtype), devices)
    validation = Evaluator(Networks(model.clone(adapter_dim=0)), Variables({}, {}), data.validation, name="validation",
                           batch_size=batch_size, devices=devices)
    steps_per_epoch = len(split.label) // batch_size
    rate = learning_rate(recipe, base=options.lr, steps_per_epoch=steps_per_epoch, epochs=options.epochs,
                         warmup_epochs=options.warmup_epochs)
    own, start, done = teacher_store.streams_name(recipe, k), time.perf_counter(), 0
    best_acc, best, waited_from, waited = -1.0, None, -1.0, 0
    for epoch in range(options.epochs):
        key, dropout_key = (streams.key(recipe.seed, f"{stream}/{own}", epoch) for stream in ("augment", "dropout"))
        order = streams.rng(recipe.seed, f"order/{own}", epoch)
        with reporter.epoch_bar(steps_per_epoch * batch_size, f"{name} {epoch + 1}/{options.epochs}") as bar:
            current, metrics, count = run_epoch(
                step, current, frozen, training_batches(split, batch_size, order), learning_rate=rate, first_step=done,
                controls={"augment_key": key, "mix_key": key, "dropout_key": dropout_key}, devices=devices,
                on_images=bar.update)
        done += count
        whole = state.join(current, frozen)
        accuracy = validation.accuracies(whole)["student"]
        for metric, value in {**metrics, "val_acc": accuracy}.items():
            record.log(f"{name}/epoch{epoch + 1:02d}/{metric}", value)
        logger.info("%s epoch %d/%d: loss %.4f, training accuracy %.2f %%, validation accuracy %.2f %%", name,
                    epoch + 1, options.epochs, metrics["loss"], 100 * metrics["acc"], 100 * accuracy)
        if accuracy > best_acc:
            best_acc, best, best_epoch = accuracy, jax.device_get(whole.of("student")), epoch + 1
        better = accuracy > waited_from + options.early_stopping_min_delta
        waited_from, waited = (accuracy, 0) if better else (waited_from, waited + 1)
        if options.early_stopping_patience and waited >= options.early_stopping_patience:
            logger.info("%s: stopped early, %d epochs without a better validation accuracy", name, waited)
            break
    record.log(f"time/{name}/seconds", time.perf_counter() - start)
    record.save()
    logger.info("%s: %s trained on %d images in %.0f s, best in epoch %d: %.2f %% on validation", name, options.name,
                len(split.label), time.perf_counter() - start, best_epoch, 100 * best_acc)
    teacher_store.save(recipe, k, best, split, {"validation_accuracy": best_acc, "epoch": best_epoch})
    return best


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
