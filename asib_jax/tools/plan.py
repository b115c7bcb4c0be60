"""What a run would do, told from shapes alone: its data, networks and training steps.

Nothing is compiled, downloaded or written, and no published data set is read.
"""
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu.parameter_overview import count_parameters

from asib_jax import a_step, b_step, build, preparation, teachers, train
from asib_jax.engine import parallel, stored_views
from asib_jax.recipe import checks
from asib_jax.tools import cost
from asib_jax.weights import files as weights, teacher_store
from asib_jax.data import sources
from asib_jax.models.ensemble import Networks, StudentOutputs, TeacherOutputs, Variables
from asib_jax.recipe.recipe import Recipe, TeacherRecipe
from asib_jax.objectives.steps import Training


class Network(NamedTuple):
    """One network of the run. flops: of the forward pass of one image."""

    role: str
    name: str
    parameters: int
    flops: float
    origin: str


class Step(NamedTuple):
    """The epochs of one training step, and the steps in all of them. trained: how many parameters of how many train, by
    network."""

    title: str
    epochs: int
    steps: int
    trained: dict[str, tuple[int, int]]
    cost: cost.StepCost


class Plan(NamedTuple):
    """images: of each split, named as the fields of `build.Data`; batch: what one device sees of it; resident: bytes of
    the variables of all networks; stored: what `stored_views` would say; warning: of the gate."""

    sizes: sources.Sizes
    images: dict[str, int]
    batch: int
    resident: int
    networks: list[Network]
    steps: list[Step]
    stored: tuple[str, ...]
    warning: str | None


def make(recipe: Recipe) -> Plan:
    """What a run of the checked `recipe` would do. Raises the errors that its data and networks would raise then."""
    options = recipe.dataset
    sizes = sources.sizes(options.name, path=options.path, data_dir=options.data_dir)
    rows = build.divide(recipe, sizes.labels)
    images = {split: len(part) for split, part in rows._asdict().items()} | {"test": sizes.test}
    warning = checks.check_gate(recipe.enable_kd_after_syn_acc, sizes.num_classes) if recipe.uses_fusion else None
    nets = build.build_networks(recipe, sizes.num_classes)
    checks.check_data(recipe, sizes.image_shape, sizes.num_classes)
    variables = build.variable_shapes(recipe, nets, sizes.image_shape)
    preparation.check_weights(recipe, nets, variables)
    batch = options.batch_size // len(parallel.run_devices(recipe.num_devices))
    kept = [teacher_store.kept_folder(recipe, k) for k in range(len(nets.teachers))]
    stored = () if recipe.teachers_only else stored_views.decide(recipe, nets, images["train"]).lines
    return Plan(sizes, images, batch, cost.tree_bytes(variables),
                networks(recipe, nets, variables, sizes.image_shape, kept),
                list(run_steps(recipe, nets, variables, sizes, images, batch, kept)), stored, warning)


def networks(recipe: Recipe, nets: Networks, variables: Variables, image_shape: tuple[int, ...], kept: list[str]
             ) -> list[Network]:
    """A row for every network that the run has variables of."""
    def row(role, name, module, source, *inputs, **options):
        apply = functools.partial(module.apply, **options)
        inputs = (jax.ShapeDtypeStruct((1, *shape), dtype) for shape, dtype in inputs)
        return Network(role, name, count_parameters(variables.params[role]),
                       cost.flops(apply, variables.of(role), *inputs), source)

    student, image = recipe.model.student, (image_shape, jnp.uint8)
    rows = []
    if "student" in variables.params:
        rows.append(row("student", student.name, nets.student, given(student.weights) or "from scratch", image,
                        train=False))
    for k, (role, model) in enumerate(zip(nets.teacher_names, nets.teachers)):
        rows.append(row(role, recipe.teachers[k].name, model, origin(recipe.teachers[k], kept[k]), image, train=False))
    if "ib_mbm" in variables.params:
        layers = variables.params["ib_mbm"]
        q = (layers["query"]["kernel"].shape[:1], jnp.float32)
        kv = ((len(nets.teachers), layers["teachers"]["kernel"].shape[0]), jnp.float32)
        rows.append(row("ib_mbm", "IB_MBM", nets.ib_mbm, "from scratch", q, kv))
        code = ((recipe.ib_mbm_out_dim,), jnp.float32)
        rows.append(row("synergy_head", "SynergyHead", nets.synergy_head, "from scratch", code))
    return rows


def given(reference: str) -> str:
    """What the config calls `weights`, and whether they are here."""
    if not reference.startswith("hf:"):
        return reference
    return f"{reference} ({'in the cache' if weights.cached(reference) else 'to be downloaded'})"


def origin(options: TeacherRecipe, kept: str) -> str:
    """Where a teacher comes from, as `teachers.ready` decides."""
    if kept:
        return f"kept by an earlier run: {kept}"
    most = "at most " if options.early_stopping_patience else ""
    if not options.weights:
        return f"trained from scratch for {most}{options.epochs} epochs"
    tuned = f", fine-tuned for {most}{options.epochs} epochs" if options.epochs else ", as it is"
    return given(options.weights) + tuned


def run_steps(recipe: Recipe, nets: Networks, variables: Variables, sizes: sources.Sizes, images: dict[str, int],
              batch_size: int, kept: list[str]) -> Iterator[Step]:
    """Every training step of the run, in order."""
    size, known = recipe.dataset.batch_size, {}
    batch = batch_shapes(sizes, batch_size)

    def step(title: str, epochs: int, split: str, variables: Variables, training: Training, batch: dict[str, Any]
             ) -> Step:
        key = f"{title.partition(',')[0]} {training.mask}"  # stages that train the same cost the same
        if key not in known:
            known[key] = cost.of_step(training, variables, batch, recipe.compute_dtype)
        trained = {name: (count, int(count_parameters(variables.params[name])))
                   for name, count in known[key].trained.items()}
        return Step(title, epochs, epochs * (images[split] // size), trained, known[key])

    for k, (name, model) in enumerate(zip(nets.teacher_names, nets.teachers)):
        epochs = recipe.teachers[k].epochs
        if epochs and not kept[k]:
            own = Variables({"student": variables.params[name]}, {"student": variables.batch_stats[name]})
            training = teachers.make_training(recipe, k, model, variables.params[name])
            found = step(name, epochs, "teacher_train", own, training, batch)
            yield found._replace(trained={name: found.trained["student"]})
    if recipe.teachers_only:
        return
    stored = stored_views.decide(recipe, nets, images["train"]).steps
    shapes_of = {name: batch_shapes(sizes, batch_size, nets, recipe.compute_dtype, name if name in stored else "")
                 for name in ("a", "b")}
    for stage, epochs in enumerate(recipe.b_epochs):
        if recipe.uses_fusion:
            yield step(f"A-Step, stage {stage + 1}", recipe.a_epochs, "train", variables,
                       a_step.make_training(recipe, nets, variables.params, stage), shapes_of["a"])
        yield step(f"B-Step, stage {stage + 1}", epochs, "train", variables,
                   b_step.make_training(recipe, nets, variables.params, stage), shapes_of["b"])
    if recipe.train_control and recipe.uses_teachers:
        recipe = train.without_teachers(recipe)
        nets = build.build_networks(recipe, sizes.num_classes)
        variables = build.variable_shapes(recipe, nets, sizes.image_shape)
        for stage, epochs in enumerate(recipe.b_epochs):
            yield step(f"control, stage {stage + 1}", epochs, "train", variables,
                       b_step.make_training(recipe, nets, variables.params, stage), batch)


def batch_shapes(sizes: sources.Sizes, batch_size: int, nets: Networks | None = None, dtype: str = "float32",
                 stored: str = "") -> dict[str, Any]:
    """A training batch as shapes, with the outputs that `stored_views` brings to the step of that name, "a" or "b"."""
    def shape(dtype, *dimensions):
        return jax.ShapeDtypeStruct((batch_size, *dimensions), dtype)

    batch = {"label": shape(jnp.int32), "index": shape(jnp.int32)}
    if stored != "a":
        batch["image"] = shape(jnp.uint8, *sizes.image_shape)
    if stored:
        feats = tuple(shape(jnp.dtype(dtype), model.architecture.feat_dim) for model in nets.teachers)
        batch["teachers"] = TeacherOutputs(feats, shape(jnp.float32, len(feats), sizes.num_classes))
    if stored == "a":
        feat = shape(jnp.dtype(dtype), nets.student.architecture.feat_dim)
        batch["student"] = StudentOutputs(feat, shape(jnp.float32, sizes.num_classes))
    return batch
