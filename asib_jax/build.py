"""A recipe's data and networks, as they are before anything is trained."""
import dataclasses
import functools
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from asib_jax import models, streams
from asib_jax.engine import parallel
from asib_jax.objectives import freezing
from asib_jax.weights import checkpoint, files as weights, pretrained
from asib_jax.data import sources, splits
from asib_jax.data.sources import Split
from asib_jax.errors import UserError
from asib_jax.engine.feed import Feed
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.models.kd_model import KDModel, stage_names
from asib_jax.recipe.recipe import Recipe

logger = logging.getLogger("asib_jax")


class Data(NamedTuple):
    """teacher_train: the training split without validation; train: what the student sees of it (`train_subset`)."""

    train: Split
    teacher_train: Split
    validation: Split
    test: Split
    num_classes: int
    origin: str

    @property
    def image_shape(self) -> tuple[int, ...]:
        return self.test.image.shape[1:]


def make_feed(recipe: Recipe) -> Feed:
    """What brings examples to the recipe's devices. UserError for devices that are not here."""
    return Feed(tuple(parallel.run_devices(recipe.num_devices)), recipe.device_data_gb, recipe.steps_per_call)


class Inputs(NamedTuple):
    """What a run is made of, before any variable."""

    feed: Feed
    data: Data
    nets: Networks


class Rows(NamedTuple):
    """Which rows of the training split are which part of `Data`."""

    train: np.ndarray
    teacher_train: np.ndarray
    validation: np.ndarray


def load_data(recipe: Recipe) -> Data:
    """The splits of SPEC 7, fixed by the seed. UserError for what `sources.load` and `divide` raise."""
    options = recipe.dataset
    try:
        dataset = sources.load(options.name, path=options.path, data_dir=options.data_dir)
    except (UserError, OSError) as error:  # OSError: of a file that cannot be opened or read
        told = UserError(str(error))
        told.add_note(f"the images are those of dataset.name={options.name!r}, dataset.path={options.path!r}, "
                      f"dataset.data_dir={options.data_dir!r}")
        raise told from error
    parts = [dataset.train.take(rows) for rows in divide(recipe, dataset.train.label)]
    return Data(*parts, dataset.test, dataset.num_classes, dataset.origin)


def divide(recipe: Recipe, labels: np.ndarray) -> Rows:
    """The training split by its labels [N]. Raises UserError for too few images, and the errors of `splits`."""
    options = recipe.dataset
    teacher_train, validation = splits.train_validation(labels, options.val_fraction, recipe.seed)
    train = teacher_train
    if options.train_subset and not recipe.teachers_only:
        train = train[splits.stratified_subset(labels[train], options.train_subset, recipe.seed)]
    if len(train) < options.batch_size:
        raise UserError(f"dataset.batch_size={options.batch_size} is larger than the {len(train)} images to train on")
    return Rows(train, teacher_train, validation)


def build_networks(recipe: Recipe, num_classes: int, axis_name: str | None = None) -> Networks:
    """Every network the recipe uses, without variables. UserError for an unknown name, or widths that cannot meet.

    axis_name: over which training-mode BatchNorm takes its statistics, see `KDModel`.
    """
    shared = {"small_input": recipe.dataset.small_input, "dtype": jnp.dtype(recipe.compute_dtype),
              "axis_name": axis_name}
    adapter = {"adapter_dim": recipe.distill_out_dim, "adapter_hidden": recipe.distill_hidden_dim}
    student = recipe.model.student
    model = models.create_student_by_name(student.name, num_classes, mean=student.mean, std=student.std,
                                          residual_adapter=student.use_adapter, **shared,
                                          **(adapter if recipe.student_feature == "distill_feat" else {}))
    if not recipe.uses_teachers:
        return Networks(model)
    teachers = tuple(
        models.create_teacher_by_name(teacher.name, num_classes, mean=teacher.mean, std=teacher.std, **shared,
                                      **(adapter if recipe.uses_adapters else {}))
        for teacher in recipe.teachers)
    if not recipe.uses_fusion:
        return Networks(model, teachers)
    ib_mbm, head = models.build_ib_mbm_from_teachers(
        teachers, dim=recipe.ib_mbm_out_dim, num_heads=recipe.ib_mbm_n_head, use_ib=recipe.use_ib,
        feature_norm=recipe.ib_mbm_feature_norm, residual=recipe.ib_mbm_residual,
        logvar_clip=recipe.ib_mbm_logvar_clip, min_std=recipe.ib_mbm_min_std, dropout=recipe.synergy_head_dropout,
        learnable_temperature=recipe.synergy_temp_learnable)
    networks = Networks(model, teachers, ib_mbm, head, recipe.student_feature)
    if recipe.feat_kd_alpha and _query_dim(networks) != recipe.ib_mbm_out_dim:
        raise UserError(f"feature KD compares {recipe.student_feature} of width {_query_dim(networks)} with "
                         f"ib_mbm_out_dim={recipe.ib_mbm_out_dim}; make them equal or set feat_kd_alpha=0")
    return networks


def _query_dim(nets: Networks) -> int:
    student = nets.student
    return student.adapter_dim if nets.student_feature == "distill_feat" else student.architecture.feat_dim


def make_inputs(recipe: Recipe) -> Inputs:
    """The recipe's devices, data and networks. Errors: those of the three functions above."""
    feed, data = make_feed(recipe), load_data(recipe)
    return Inputs(feed, data, build_networks(recipe, data.num_classes, feed.axis_name))


def init_network(model: KDModel, seed: int, name: str, image_shape: tuple[int, ...]) -> dict:
    """Random variables of one network, the same for a (seed, name) in every configuration."""
    image = jnp.zeros((1, *image_shape))
    variables = _drawn(functools.partial(model.init, train=False), streams.key(seed, f"init/{name}"), image)
    return {"batch_stats": {}, **variables}  # a network without BatchNorm has none


def _drawn(init: Callable, *arguments: Any) -> dict:
    """Initial values. A CPU's compiler need not optimise what runs once: 2.5 s for a ResNet-8, not 12."""
    quick = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(init, compiler_options=quick)(*arguments)


def read_weights(given: str, key: str, model: KDModel, variables: dict, level: int = -1, *, sha256: str
                 ) -> pretrained.Imported:
    """`variables` of `model` with given weights (see `weights.py`; `key` holds them) in their place.

    Of a checkpoint of a finished run its best student. level: the freeze level that the network trains at first.
    sha256: the digest that the weights must have; "": any.

    Raises UserError, with key and path, for what cannot be read or does not fit (the errors of `weights`, `checkpoint`
    and `pretrained`), or if a stem that starts at random would stand still.
    """
    path = weights.locate(given, key, sha256)
    try:
        if path.is_dir():
            imported = pretrained.fit_variables(_one_network(checkpoint.restore(path)), variables, model.architecture)
        else:
            imported = pretrained.import_weights(weights.load(path), variables, model.architecture)
    except (UserError, OSError) as error:
        raise UserError(f"{key}={given!r}: {error}") from error
    stem, *others = stage_names(model)
    random = [leaf for leaf in imported.fresh if f"params/{stem}/" in leaf]
    if random and 0 <= level <= len(others):
        raise UserError(f"{key}={given!r}: {random[0]}. It starts at random and would stay so at freeze level "
                         f"{level}; train all stages first (-1)")
    return imported


def _one_network(stored: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint the variables of its only network, or of the best student. UserError if there is neither."""
    if "params" not in stored and "best" not in stored.get("students", {}):
        raise UserError("it is no checkpoint of one network, nor of a run with a student; kept teachers are "
                        "results_dir/teachers/NAME/checkpoint")
    return stored if "params" in stored else stored["students"]["best"]


def init_student_and_fusion(recipe: Recipe, nets: Networks, image_shape: tuple[int, ...]) -> Variables:
    """Initial variables of the student (imported where `model.student.weights` says so), IB_MBM and head."""
    student = init_network(nets.student, recipe.seed, "student", image_shape)
    if recipe.model.student.weights:
        level = freezing.level_for_stage(recipe.student_freeze_level, 0) if recipe.use_partial_freeze else -1
        student, fresh = read_weights(recipe.model.student.weights, "model.student.weights", nets.student, student,
                                      level, sha256=recipe.model.student.weights_sha256)
        logger.info("student: %s from %s%s", recipe.model.student.name, recipe.model.student.weights,
                    f"; at random, because shapes differ: {'; '.join(fresh)}" if fresh else "")
    params = {"student": student["params"]}
    if nets.ib_mbm is not None:
        q = jnp.zeros((1, _query_dim(nets)))
        kv = jnp.zeros((1, len(nets.teachers), models.feature_dim(nets.teachers[0])))
        key = streams.key(recipe.seed, "init/ib_mbm")
        params["ib_mbm"] = _drawn(nets.ib_mbm.init, key, q, kv)["params"]
        code = jnp.zeros((1, recipe.ib_mbm_out_dim))
        key = streams.key(recipe.seed, "init/synergy_head")
        params["synergy_head"] = _drawn(nets.synergy_head.init, key, code)["params"]
    return Variables(params, {"student": student["batch_stats"]})


def variable_shapes(recipe: Recipe, nets: Networks, image_shape: tuple[int, ...]) -> Variables:
    """All variables of the run, as shapes; with teachers_only the teachers' alone. Nothing is compiled.

    Raises UserError for images that a network cannot read.
    """
    student = dataclasses.replace(recipe.model.student, weights="")  # given ones change no shape
    fresh = dataclasses.replace(recipe, model=dataclasses.replace(recipe.model, student=student))

    def initial() -> Variables:
        own = Variables({}, {}) if recipe.teachers_only else init_student_and_fusion(fresh, nets, image_shape)
        teachers = {name: init_network(model, recipe.seed, name, image_shape)
                    for name, model in zip(nets.teacher_names, nets.teachers)}
        return Variables(own.params | {name: teacher["params"] for name, teacher in teachers.items()},
                         own.batch_stats | {name: teacher["batch_stats"] for name, teacher in teachers.items()})

    with jax.disable_jit():  # initialisers name options for a compiler, which jit takes outside a trace only
        return jax.eval_shape(initial)
