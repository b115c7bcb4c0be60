"""Teachers: kept from an earlier run, imported, or to be fine-tuned or trained from scratch, each in a phase."""

import functools
import itertools
import logging
import pathlib
from typing import Any, NamedTuple

import numpy as np

from asib_jax import copies, streams
from asib_jax.context import Context
from asib_jax.data.parts import Data
from asib_jax.engine import devices, hosts
from asib_jax.engine.progress import Progress, of_network, overlay
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Mode, Networks, Variables
from asib_jax.models.kd_model import KDModel, known, stage_names
from asib_jax.objectives import freezing
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.optimizers import make_optimizer
from asib_jax.objectives.step import Training
from asib_jax.phases import Phase
from asib_jax.rates import learning_rate
from asib_jax.recipe import Recipe
from asib_jax.record.experiment import Record
from asib_jax.record.snapshots import Snapshots
from asib_jax.weights import checkpoint, origins, teacher_store
from asib_jax.weights.reading import Imported, fit_variables, read_weights
from asib_jax.weights.teacher_store import Copy, Place

logger = logging.getLogger("asib_jax")


class Collected(NamedTuple):
    """variables: of every teacher, ready or to be trained from there; places: where those are kept that are trained
    here; train: the names of those that are still to be trained."""

    variables: Variables
    places: dict[str, Place]
    train: list[str]


def collect(recipe: Recipe, nets: Networks, data: Data, record: Record, snapshots: Snapshots) -> Collected:
    """Where each teacher comes from. Adapters start at random, keyed by the run's seed.

    The first of these that the configuration allows:
      1. for one that is trained here (`finetune_epochs` of given weights, or `train_epochs` from scratch): the
         checkpoint that an earlier run with the same key left in `teacher_store`;
      2. `weights`, to be fine-tuned for `finetune_epochs` if that is positive;
      3. training from scratch for `train_epochs`.
    A run that goes on trains those that it trained, or was about to train, when it was interrupted.

    Raises UserError for weights that do not fit, that fit only once fine-tuned, or that differ between hosts, and for
    a teacher that is not what the run began with.
    """
    found, places, train = {}, {}, _still_to_train(snapshots)
    rows = copies.rows_of(recipe, nets, data.sees, data.teacher_train.label)
    for copy in teacher_store.copies(recipe) if nets.teachers else ():
        name, options, model = copy.name, recipe.teachers[copy.k], nets.teachers[copy.k]
        start = copies.initial(recipe, nets, copy, data.image_shape)
        place, seen = _place(recipe, copy, record), copies.taken(data.teacher_train, rows[name])
        if snapshots.resumed and f"kept/{name}" in record.metrics:
            place = teacher_store.moved(place, record.metrics[f"kept/{name}"])
        hosts.same_everywhere({f"the SHA-256 of {copy.teacher}.weights": place.key["teacher"]["weights"]})
        kept = teacher_store.load(place, seen) if options.epochs and name not in train else None
        if kept is not None:
            found[name] = _fitted(kept, start, model, place.folder)
            _confirm(record, name, place)
            logger.info("%s: %s, trained by an earlier run, from %s", name, options.name, place.folder)
            continue
        if options.epochs and snapshots.resumed and name not in train:
            raise UserError(
                f"{name} is no longer in {place.folder}, where this run found or left it: put it back, set the "
                "results_dir that it is in, or begin a new run without resume, which trains it again"
            )
        found[name] = start
        if options.weights:
            found[name], fresh = given(recipe, copy.k, model, start)
            logger.info(
                "%s: %s from %s%s",
                name,
                options.name,
                options.weights,
                f"; at random: {'; '.join(fresh.values())}" if fresh else "",
            )
        if options.epochs:
            places[name] = place
    for k, name in enumerate(nets.teacher_names):
        if name not in found:  # its copies share an adapter
            found[name] = copies.adapter_alone(copies.initial(recipe, nets, Copy(k), data.image_shape))
    if not snapshots.resumed:
        snapshots.trained = train = list(places)
    return Collected(
        Variables(
            {name: variables["params"] for name, variables in found.items()},
            {name: variables["batch_stats"] for name, variables in found.items()},
        ),
        places,
        train,
    )


def _still_to_train(snapshots: Snapshots) -> list[str]:
    """Of a run that goes on, the teachers whose training is not over."""
    trained = snapshots.trained
    return trained[trained.index(snapshots.ahead) :] if snapshots.ahead in trained else []


def _place(recipe: Recipe, copy: Copy, record: Record) -> Place:
    """Where a teacher is kept. Its weights are downloaded for that, unless a kept teacher was made from them."""
    k, name, given = copy.k, copy.teacher, recipe.teachers[copy.k].weights
    if not given:
        return teacher_store.place(recipe, k, "", copy.fold)
    if origins.cached(given) is None and (found := teacher_store.find(recipe, *copy)):
        return found
    digest = origins.digest(origins.locate(given, f"{name}.weights", recipe.teachers[k].weights_sha256))
    record.confirm(f"weights/{name}", digest, f"{name}.weights={given!r}")
    return teacher_store.place(recipe, k, digest, copy.fold)


def _confirm(record: Record, name: str, place: Place) -> None:
    if hosts.is_first():  # which alone has it on disk for certain
        record.confirm(f"kept/{name}", checkpoint.digest(place.folder / "checkpoint"), f"{name} in {place.folder}")


def given(recipe: Recipe, k: int, model: KDModel, variables: dict[str, Any]) -> Imported:
    """The variables (or their shapes) of teacher `k` (from 0) with its given weights in their place.

    Raises UserError for weights that do not fit, or fit only once fine-tuned.
    """
    options, name = recipe.teachers[k], f"teacher{k + 1}"
    imported = read_weights(
        options.weights,
        f"{name}.weights",
        model,
        variables,
        options.finetune_freeze_level if options.finetune_epochs else -1,
        sha256=options.weights_sha256,
        dataset=recipe.dataset.name,
    )
    if imported.fresh and not options.finetune_epochs:
        raise UserError(
            f"{name}.weights={options.weights!r} fit {options.name} only in part; at random: "
            f"{'; '.join(imported.fresh.values())}. Set {name}.finetune_epochs, or take weights fitted to "
            "the classes and the size of these images"
        )
    return imported


def _fitted(kept: dict[str, Any], variables: dict[str, Any], model: KDModel, folder: pathlib.Path) -> dict[str, Any]:
    """A kept teacher in the place of the variables of `model`. UserError, naming its folder, if it is no such one."""
    try:
        imported = fit_variables(kept, variables, model.architecture)
    except UserError as error:
        raise UserError(f"the teacher in {folder}: {error}") from error
    if imported.fresh:
        raise UserError(f"the teacher in {folder} is not this network: {'; '.join(imported.fresh.values())}")
    return imported.variables


def check(context: Context) -> None:
    """What validation says of teachers that are ready, before anything learns from them.

    Warns of logits that are not finite and of teachers that say the same. Raises UserError for one that is used as its
    given weights are and is not above chance, unless that is allowed: for so many right ones or more, each class drawn
    with 1 / classes that it knows, the exact binomial probability is above 5 %.
    """
    from scipy.stats import binomtest  # takes a second

    recipe, nets, validation = context.recipe, context.nets, context.validation
    logits = validation.teacher_logits
    for k, (name, options) in enumerate(zip(nets.teacher_names, recipe.teachers, strict=True)):
        own = known(nets.teachers[k])
        broken = int((~np.isfinite(logits[:, k, own])).any(axis=-1).sum())
        if broken:
            logger.warning("%s: logits that are not finite on %d of %d validation images", name, broken, len(logits))
        right, count, chance = validation.teacher_counts[name], validation.images_of(own), 1 / own.sum()
        at_chance = binomtest(right, count, chance, alternative="greater").pvalue > 0.05
        if at_chance and options.weights and not options.epochs and not recipe.allow_teachers_at_chance:
            raise UserError(
                f"{name} ({options.name}, {name}.weights={options.weights!r}) is right on {right} of {count} "
                f"validation images{' of its classes' * bool(options.classes)}, {100 * right / count:.2f} %, which is "
                f"not above chance, {100 * chance:g} %: "
                f"{name}.mean and {name}.std are not those of its training, its classes have another order, or it is "
                f"the wrong file. Correct that, fine-tune it ({name}.finetune_epochs), or set "
                "allow_teachers_at_chance=True"
            )
    for one, other in itertools.combinations(range(logits.shape[1]), 2):
        if np.array_equal(logits[:, one], logits[:, other]):
            logger.warning(
                "%s and %s say the same of every validation image, as one network twice: they never disagree, their "
                "average is either of them, and synergy has nothing to combine",
                nets.teacher_names[one],
                nets.teacher_names[other],
            )


def phase(
    recipe: Recipe,
    nets: Networks,
    name: str,
    params: dict[str, Any],
    images: int,
    axis_name: str | None = None,
    place: Place | None = None,
    rows: np.ndarray | None = None,
) -> Phase:
    """Supervised training of a teacher or copy, by name, with AdamW over so many images, never those of validation.

    It ends at its best epoch on validation, early after `early_stopping_patience` epochs of which none was better by
    `early_stopping_min_delta`. params: arrays or their shapes. place: where it is kept then. rows: of
    them those that it sees; None: all.
    """
    (copy,) = (copy for copy in teacher_store.copies(recipe) if copy.name == name)
    k, images = copy.k, images if rows is None else len(rows)
    options, stream = recipe.teachers[k], teacher_store.streams_name(recipe, *copy)

    def controls(progress: Progress, epoch: int) -> dict[str, Any]:
        return {
            f"{draw}_key": streams.key(recipe.seed, f"{draw}/{stream}", epoch) for draw in ("augment", "mix", "dropout")
        }

    return Phase(
        name=name,
        title=name,
        epochs=options.epochs,
        network=name,
        nets=Networks(nets.teachers[k].clone(adapter_dim=0)),
        training=make_training(recipe, nets, k, params, axis_name, copy.fold),
        optimizer=name,
        controls=controls,
        rate=learning_rate(recipe, options.lr, images, options.epochs, options.warmup_epochs),
        split="teacher_train",
        rows=rows,
        order=lambda epoch: streams.rng(recipe.seed, f"order/{stream}", epoch),
        score=name,
        best=name,
        chosen={name: True},
        patience=options.early_stopping_patience,
        margin=options.early_stopping_min_delta,
        snapshot_at_end=True,
        finish=functools.partial(_keep, k, name, place, rows) if place else Phase.finish,
    )


def make_training(
    recipe: Recipe,
    nets: Networks,
    k: int,
    params: dict[str, Any],
    axis_name: str | None = None,
    fold: int | None = None,
) -> Training:
    """What the training of teacher `k` (from 0), or its copy without that fold, trains, by which loss and optimizer: a
    student of labels alone."""
    options, model, teacher = recipe.teachers[k], nets.teachers[k], Copy(k, fold).name
    model = model if fold is None else model.clone(adapter_dim=0)
    names, level = stage_names(model), options.finetune_freeze_level if options.weights else -1
    mode = Mode(train=True, frozen_stages=freezing.frozen_stages(level, len(names), "finetune_freeze_level"))
    mask = freezing.trainable(params[teacher], names, level)
    if "distill_adapter" in mask:  # no label reaches it
        mask["distill_adapter"] = False
    terms = BTerms(
        recipe.dataset.data_aug,
        label_smoothing=options.label_smoothing,
        cutmix_alpha=options.finetune_cutmix_alpha if options.finetune_use_cutmix else 0.0,
    )
    tx = make_optimizer("adamw", weight_decay=options.weight_decay, grad_clip_norm=recipe.grad_clip_norm)
    loss = functools.partial(b_loss, nets=Networks(model), terms=terms, mode=mode, axis_name=axis_name, student=teacher)
    return Training(loss, {teacher: mask}, (teacher,), tx)


def _keep(
    k: int, name: str, place: Place, rows: np.ndarray | None, context: Context, variables: Variables, progress: Progress
) -> Variables:
    """All variables, once the trained teacher is kept, or with the one that another run has kept meanwhile."""
    recipe, split, best = context.recipe, copies.taken(context.data.teacher_train, rows), progress.best[name]
    own, options = of_network(best.held, name), recipe.teachers[k]
    measured: dict[str, Any] = {"validation_accuracy": best.score, "when": best.when}
    if not teacher_store.save(place, options.weights, own, split, measured):
        logger.warning("%s was there already, of another run: this one goes on with that teacher", place.folder)
        own = _fitted(teacher_store.load(place, split), own, context.nets.teachers[k], place.folder)
        held = {part: {name: leaves} for part, leaves in own.items()}
        variables = devices.share(overlay(variables, held), context.feed.devices)
    _confirm(context.record, name, place)
    return variables
