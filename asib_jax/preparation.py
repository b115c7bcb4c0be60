"""What can be known to go wrong before a run leaves a trace: nothing here is compiled or written."""

import dataclasses
import importlib.util
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from asib_jax import a_step, b_step, build, copies, specialists, teachers
from asib_jax.build import Inputs
from asib_jax.data.paths import expanded
from asib_jax.engine import compiled, devices, views
from asib_jax.engine.feed import tree_bytes
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.recipe import Recipe, checks, keys, read
from asib_jax.record import experiment
from asib_jax.weights import origins, teacher_store


def checked(config: Mapping[str, Any]) -> Recipe:
    """The recipe of a configuration that this machine can run, as far as no data are read. A ~ is a home's path in it
    where the run is written or looked for.

    Raises UserError for a key or a value that cannot be, for devices that are not here, or for a run that exists.
    """
    recipe = read(config)
    homes: dict[str, Any] = {
        key: str(expanded(path, key))
        for key in ("results_dir", "resume")
        if (path := getattr(recipe, key)).startswith("~")
    }
    recipe = dataclasses.replace(recipe, **homes)
    if recipe.deterministic:
        compiled.be_deterministic()  # before the checks, which ask for devices
    checks.check(recipe)
    check_machine(recipe)
    if not recipe.resume:
        experiment.check_exp_id(recipe.results_dir, recipe.exp_id)
    return recipe


def warning(recipe: Recipe, defaults: Recipe) -> str:
    """What to say of keys that were set away from `defaults` and have no effect in this run; "": there is none."""
    idle = keys.without_effect(recipe, defaults)
    return f"without effect in this run: {', '.join(idle)}" if idle else ""


def check_machine(recipe: Recipe) -> None:
    """Raise UserError, naming the key, for devices, files, folders or packages of a recipe that are not here."""
    devices.check_platform(devices.all_devices(), recipe.platform, "platform")
    devices.check_batch(recipe.dataset.batch_size, devices.run_devices(recipe.num_devices))
    if recipe.wandb and importlib.util.find_spec("wandb") is None:
        raise UserError(f'wandb={recipe.wandb!r} needs the wandb package: pip install wandb, or set wandb to ""')
    if recipe.tensorboard and importlib.util.find_spec("tensorboardX") is None:
        raise UserError("tensorboard=True needs the tensorboardX package: pip install tensorboardX, or set it to False")
    kept = pathlib.Path(recipe.results_dir) / teacher_store.TEACHERS
    if kept.exists() and not kept.is_dir():
        raise UserError(f"results_dir={recipe.results_dir!r}: {kept} is no folder, in which trained teachers are kept")
    cache = expanded(recipe.teacher_cache, "teacher_cache")
    there = next(folder for folder in (cache, *cache.parents) if folder.exists())
    if recipe.teacher_cache and not (there.is_dir() and os.access(there, os.W_OK)):
        raise UserError(
            f"teacher_cache={recipe.teacher_cache!r}: {there} is no folder that can be written; name another, or none"
        )
    given = {"model.student.weights": recipe.model.student.weights}
    if recipe.uses_teachers:
        given |= {f"teacher{k}.weights": teacher.weights for k, teacher in enumerate(recipe.teachers, 1)}
    for key, weights in given.items():  # those of the hub are fetched, or missed, when the run starts
        if weights and origins.cached(weights) is None and not weights.startswith("hf:"):
            raise UserError(f"{key}={weights!r} does not exist")


def prepare(recipe: Recipe) -> Inputs:
    """The data and networks of a checked recipe.

    Raises UserError for data, or given weights that are on this machine, that are damaged or do not fit.
    """
    inputs = build.make_inputs(recipe)
    recipe = inputs.recipe
    checks.check_data(recipe, inputs.data.image_shape, inputs.data.num_classes)
    data = inputs.data
    rows = copies.rows_of(recipe, inputs.nets, data.sees, data.teacher_train.label)
    specialists.check(recipe, inputs.nets, rows, data.validation.label)
    shapes = build.variable_shapes(recipe, inputs.nets, inputs.data.image_shape)
    check_weights(recipe, inputs.nets, shapes)
    if recipe.folds and not recipe.teachers_only:
        _check_room(inputs, shapes)
    return inputs


def _check_room(inputs: Inputs, shapes: Variables) -> None:
    """UserError where teachers have copies, whose outputs have to be stored, and there is no room for them."""
    recipe, nets, train = inputs.recipe, inputs.nets, inputs.data.train
    kinds = (a_step.phase, b_step.phase) if recipe.uses_fusion else (b_step.phase,)
    stages, count = range(len(recipe.b_epochs)), len(train.label)
    phases = [kind(recipe, nets, shapes.params, stage, count) for stage in stages for kind in kinds]
    views.choose(phases, nets, count, tree_bytes(train), inputs.feed)


def check_weights(recipe: Recipe, nets: Networks, shapes: Variables) -> None:
    """Read the given weights that are here already; those of a teacher that an earlier run left ready are not asked
    for."""
    student = recipe.model.student
    if student.weights and not recipe.teachers_only and origins.cached(student.weights):
        build.read_student(recipe, nets.student, shapes.of("student"))
    read: set[int] = set()
    for copy in teacher_store.copies(recipe) if nets.teachers else ():
        given = recipe.teachers[copy.k].weights
        if copy.k not in read and given and origins.cached(given) and not teacher_store.kept_folder(recipe, *copy):
            teachers.given(recipe, copy.k, nets.teachers[copy.k], shapes.of(copy.name))
            read.add(copy.k)
