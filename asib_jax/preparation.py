"""What can be known to go wrong before a run leaves a trace: nothing here is compiled or written."""
import dataclasses
from collections.abc import Mapping
from typing import Any

from asib_jax import build, teachers
from asib_jax.engine import parallel
from asib_jax.objectives import freezing
from asib_jax.recipe import checks, recipe as recipes
from asib_jax.record import experiment
from asib_jax.weights import files as weights, teacher_store
from asib_jax.build import Inputs
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.data.paths import expanded
from asib_jax.recipe.recipe import Recipe


def checked(config: Mapping[str, Any]) -> Recipe:
    """The recipe of a configuration that this machine can run, as far as no data are read. A ~ is a home's path in it
    where the run is written or looked for.

    Raises UserError for a key or a value that cannot be, for devices that are not here, or for a run that exists.
    """
    recipe = recipes.read(config)
    homes = {key: str(expanded(path, key)) for key in ("results_dir", "resume")
             if (path := getattr(recipe, key)).startswith("~")}
    recipe = dataclasses.replace(recipe, **homes)
    if recipe.deterministic:
        parallel.be_deterministic()  # before the checks, which ask for devices
    checks.check(recipe)
    if not recipe.resume:
        experiment.check_exp_id(recipe.results_dir, recipe.exp_id)
    return recipe


def prepare(recipe: Recipe) -> Inputs:
    """The data and networks of a checked recipe.

    Raises UserError for data, or given weights that are on this machine, that are damaged or do not fit.
    """
    inputs = build.make_inputs(recipe)
    checks.check_data(recipe, inputs.data.image_shape, inputs.data.num_classes)
    check_weights(recipe, inputs.nets, build.variable_shapes(recipe, inputs.nets, inputs.data.image_shape))
    return inputs


def check_weights(recipe: Recipe, nets: Networks, shapes: Variables) -> None:
    """Read the given weights that are here already; those of a teacher that an earlier run left ready are not asked
    for."""
    student = recipe.model.student
    if student.weights and not recipe.teachers_only and weights.cached(student.weights):
        level = freezing.level_for_stage(recipe.student_freeze_level, 0) if recipe.use_partial_freeze else -1
        build.read_weights(student.weights, "model.student.weights", nets.student, shapes.of("student"), level,
                           sha256=student.weights_sha256)
    for k, (name, model) in enumerate(zip(nets.teacher_names, nets.teachers)):
        given = recipe.teachers[k].weights
        if given and weights.cached(given) and not teacher_store.kept_folder(recipe, k):
            teachers.given(recipe.teachers[k], name, model, shapes.of(name))
