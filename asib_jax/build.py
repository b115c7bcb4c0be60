"""A recipe's data and networks, as they are before anything is trained."""

import dataclasses
import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asib_jax import copies, models
from asib_jax.data import classes, folds, overlap, sources, splits, statistics
from asib_jax.data.parts import Data, Rows
from asib_jax.data.sources import Split
from asib_jax.engine import devices
from asib_jax.engine.feed import Feed
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks, Variables, init_fusion, init_network
from asib_jax.models.kd_model import KDModel
from asib_jax.objectives import freezing
from asib_jax.recipe import Recipe, told_by_data
from asib_jax.weights.reading import Imported, read_weights

logger = logging.getLogger("asib_jax")


def make_feed(recipe: Recipe) -> Feed:
    """What brings examples to the recipe's devices. UserError for devices that are not here."""
    return Feed(
        tuple(devices.run_devices(recipe.num_devices)),
        recipe.device_data_gb,
        recipe.steps_per_call,
        recipe.dataset.eval_batch_size,
    )


class Inputs(NamedTuple):
    """What a run is made of, before any variable. recipe: with what the data tell."""

    feed: Feed
    data: Data
    nets: Networks
    recipe: Recipe


def load_data(recipe: Recipe) -> Data:
    """The splits of SPEC 7, fixed by the seed. UserError for what `sources.load` and `divide` raise."""
    options = recipe.dataset
    try:
        dataset = sources.load(
            options.name, path=options.path, data_dir=options.data_dir, image_size=options.image_size
        )
    except (UserError, OSError) as error:  # OSError: of a file that cannot be opened or read
        told = UserError(str(error))
        told.add_note(
            f"the images are those of dataset.name={options.name!r}, dataset.path={options.path!r}, "
            f"dataset.data_dir={options.data_dir!r}"
        )
        raise told from error
    own = dataset.validation
    digests = digests_of(recipe, dataset.train, own)
    rows = divide(recipe, dataset.train.label, len(own.label) if own else 0, dataset.class_names, digests)
    train, teacher_train = dataset.train.take(rows.train), dataset.train.take(rows.teacher_train)
    validation = own or dataset.train.take(rows.validation)
    return Data(train, teacher_train, validation, dataset.test, dataset.class_names, dataset.origin, rows.sees)


def complete(recipe: Recipe, data: Data) -> Recipe:
    """The recipe with all that it leaves to the data."""
    return told_by_data.complete(
        recipe,
        data.num_classes,
        lambda: statistics.PUBLISHED.get(recipe.dataset.name) or statistics.of_images(data.teacher_train.image),
        data.class_names,
    )


def digests_of(recipe: Recipe, train: Split | None, own_validation: Split | None) -> np.ndarray | None:
    """What `divide` takes, of the images where they are read; None where it does without."""
    if train is None or not (recipe.folds or recipe.teacher_holdout):
        return None
    return np.concatenate([overlap.image_digests(part) for part in (train, own_validation) if part is not None])


def divide(
    recipe: Recipe,
    labels: np.ndarray,
    own_validation: int = 0,
    class_names: Sequence[str] = (),
    digests: np.ndarray | None = None,
) -> Rows:
    """The training split by its labels [N]. Raises UserError for too few images; errors: of `splits` and `folds`.

    own_validation: images of the data's own validation split, if it has one; they count from N on. digests: of the
    images, these too, equal where they are; None: they are not known.
    """
    options = recipe.dataset
    if own_validation:
        logger.info(
            "validation is the data's own, %d images: dataset.val_fraction=%s has no effect",
            *(own_validation, options.val_fraction),
        )
        teacher_train, validation = np.arange(len(labels)), len(labels) + np.arange(own_validation)
    else:
        teacher_train, validation = splits.train_validation(labels, options.val_fraction, recipe.seed, class_names)
    train, sees = teacher_train, None
    if recipe.folds or recipe.teacher_holdout:
        own = None if digests is None else digests[teacher_train]
        sees = folds.sees(labels[teacher_train], own, recipe.folds, recipe.teacher_holdout, recipe.seed, class_names)
        train = train[~sees[0]] if recipe.student_images == "holdout" else train
        sees = sees if own is None else folds.without(sees, own, digests[validation])
    if options.train_subset and not recipe.teachers_only:
        if options.train_subset > len(train) < len(teacher_train):
            raise UserError(
                f"dataset.train_subset={options.train_subset} is more than the {len(train)} images that "
                f"teacher_holdout={recipe.teacher_holdout:g} leaves to student_images='holdout'"
            )
        train = train[splits.stratified_subset(labels[train], options.train_subset, recipe.seed)]
    fewest = min([len(train)] if sees is None else [len(train), *sees.sum(axis=1).tolist()])
    if fewest < options.batch_size:
        raise UserError(
            f"dataset.batch_size={options.batch_size} is larger than the {fewest} images to train on; set "
            f"--config.dataset.batch_size={fewest} or fewer"
        )
    return Rows(train, teacher_train, validation, sees)


def build_networks(recipe: Recipe, num_classes: int, axis_name: str | None = None) -> Networks:
    """Every network the recipe uses, without variables. UserError for an unknown name, or widths that cannot meet.

    axis_name: over which training-mode BatchNorm takes its statistics, see `KDModel`.
    """
    shared: dict[str, Any] = {
        "small_input": recipe.dataset.small_input,
        "dtype": jnp.dtype(recipe.compute_dtype),
        "axis_name": axis_name,
    }
    adapter: dict[str, Any] = {"adapter_dim": recipe.distill_out_dim, "adapter_hidden": recipe.distill_hidden_dim}
    student = recipe.model.student
    model = models.create_student_by_name(
        student.name,
        num_classes,
        mean=student.mean,
        std=student.std,
        residual_adapter=student.use_adapter,
        **shared,
        **(adapter if recipe.student_feature == "distill_feat" else {}),
    )
    if not recipe.uses_teachers:
        return Networks(model)
    joins = recipe.uses_fusion and recipe.kv == "feat_prob"
    teachers = tuple(
        models.create_teacher_by_name(
            teacher.name,
            num_classes,
            mean=teacher.mean,
            std=teacher.std,
            classes=classes.parse(teacher.classes, num_classes, f"teacher{k}.classes"),
            **shared,
            joins_probabilities=joins,
            **(adapter if recipe.uses_adapters else {}),
        )
        for k, teacher in enumerate(recipe.teachers, 1)
    )
    folds: dict[str, Any] = {"folds": recipe.folds, "deploys_all": recipe.teacher_deploy == "all"}
    if not recipe.uses_fusion:
        return Networks(model, teachers, **folds)
    ib_mbm, head = models.build_ib_mbm_from_teachers(
        teachers,
        dim=recipe.ib_mbm_out_dim,
        num_heads=recipe.ib_mbm_n_head,
        use_ib=recipe.use_ib,
        feature_norm=recipe.ib_mbm_feature_norm,
        residual=recipe.ib_mbm_residual,
        logvar_clip=recipe.ib_mbm_logvar_clip,
        min_std=recipe.ib_mbm_min_std,
        dropout=recipe.synergy_head_dropout,
        learnable_temperature=recipe.synergy_temp_learnable,
        base=recipe.base,
    )
    networks = Networks(model, teachers, ib_mbm, head, recipe.student_feature, **folds)
    if recipe.feat_kd_alpha and networks.query_dim != recipe.ib_mbm_out_dim:
        raise UserError(
            f"feature KD compares {recipe.student_feature} of width {networks.query_dim} with "
            f"ib_mbm_out_dim={recipe.ib_mbm_out_dim}; make them equal or set feat_kd_alpha=0"
        )
    return networks


def make_inputs(recipe: Recipe) -> Inputs:
    """The recipe's devices, data and networks. Errors: those of the functions above."""
    feed, data = make_feed(recipe), load_data(recipe)
    recipe = complete(recipe, data)
    return Inputs(feed, data, build_networks(recipe, data.num_classes, feed.axis_name), recipe)


def without_teachers(recipe: Recipe) -> Recipe:
    """The same student, data and epochs, learning from labels alone."""
    return dataclasses.replace(
        recipe,
        ce_alpha=1.0,
        kd_alpha=0.0,
        feat_kd_alpha=0.0,
        kd_target="avg",
        teacher_adapt_epochs=0,
        train_control=False,
    )


class Initial(NamedTuple):
    """Variables of the student, its control's (as "control"), IB_MBM and head; random_stem: of a student whose given
    weights left the first stage to chance, why, else ""."""

    variables: Variables
    random_stem: str


def initial(recipe: Recipe, nets: Networks, image_shape: tuple[int, ...]) -> Initial:
    """What is drawn, or imported where `model.student.weights` says so, of all networks but the teachers."""
    if recipe.teachers_only:
        return Initial(Variables({}, {}), "")
    models_ = {"student": nets.student}
    if recipe.trains_control:
        models_["control"] = build_networks(
            without_teachers(recipe), nets.student.num_classes, nets.student.axis_name
        ).student
    found, stem = {}, ""
    for name, model in models_.items():
        found[name] = init_network(model, recipe.seed, "student", image_shape)
        if recipe.model.student.weights:
            imported = read_student(recipe, model, found[name])
            found[name], stem = imported.variables, imported.random_stem(model)
            logger.info(
                "%s: %s from %s%s",
                name,
                recipe.model.student.name,
                recipe.model.student.weights,
                f"; at random: {'; '.join(imported.fresh.values())}" if imported.fresh else "",
            )
    params = {name: variables["params"] for name, variables in found.items()}
    return Initial(
        Variables(
            params | init_fusion(nets, recipe.seed),
            {name: variables["batch_stats"] for name, variables in found.items()},
        ),
        stem,
    )


def read_student(recipe: Recipe, model: KDModel, variables: dict[str, Any]) -> Imported:
    """The student's given weights in the place of its variables, arrays or their shapes. Errors: of `read_weights`."""
    student = recipe.model.student
    level = freezing.level_for_stage(recipe.student_freeze_level, 0) if recipe.use_partial_freeze else -1
    return read_weights(
        student.weights,
        "model.student.weights",
        model,
        variables,
        level,
        sha256=student.weights_sha256,
        dataset=recipe.dataset.name,
    )


def variable_shapes(recipe: Recipe, nets: Networks, image_shape: tuple[int, ...]) -> Variables:
    """All variables of the run, as shapes; with teachers_only the teachers' alone. Nothing is compiled.

    Raises UserError for images that a network cannot read.
    """
    student = dataclasses.replace(recipe.model.student, weights="")  # given ones change no shape
    fresh = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, student=student))

    def drawn() -> Variables:
        own = initial(fresh, nets, image_shape).variables
        teachers = {
            name: init_network(model, recipe.seed, name, image_shape)
            for name, model in zip(nets.teacher_names, nets.teachers, strict=True)
        }
        teachers |= copies.of_teachers(nets, teachers)
        return Variables(
            own.params | {name: teacher["params"] for name, teacher in teachers.items()},
            own.batch_stats | {name: teacher["batch_stats"] for name, teacher in teachers.items()},
        )

    with jax.disable_jit():  # initialisers name options for a compiler, which jit takes outside a trace only
        return jax.eval_shape(drawn)


def temperatures(recipe: Recipe, found: Sequence[float] = ()) -> np.ndarray:
    """Of the teachers [T], float32: as they were found once these were ready, before that as they are given, 1 where
    that leaves it to be found."""
    return np.array(found or [teacher.temperature or 1.0 for teacher in recipe.teachers], np.float32)
