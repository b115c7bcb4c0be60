"""What a run would do, told from shapes alone: its data, networks and training steps.

Nothing is compiled, downloaded or written, and no published data set is read.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from clu.parameter_overview import count_parameters

from asib_jax import build, copies, preparation, runner, specialists, train
from asib_jax.data import sources, statistics
from asib_jax.data.parts import Data, Rows
from asib_jax.data.statistics import Statistics
from asib_jax.engine import views
from asib_jax.engine.banks import View
from asib_jax.engine.feed import tree_bytes
from asib_jax.engine.progress import Progress
from asib_jax.models.ensemble import Networks, StudentOutputs, TeacherOutputs, Variables
from asib_jax.phases import Phase
from asib_jax.recipe import Recipe, TeacherRecipe, checks, told_by_data
from asib_jax.tools import cost
from asib_jax.weights import origins, teacher_store
from asib_jax.weights.teacher_store import Copy


class Network(NamedTuple):
    """One network of the run. flops: of the forward pass of one image."""

    role: str
    name: str
    parameters: int
    flops: float
    origin: str


class Step(NamedTuple):
    """The epochs of one training step, and the steps in all of them. networks: bytes of the variables that it uses, as
    the devices hold them; trained: how many parameters of how many train, by network."""

    title: str
    epochs: int
    steps: int
    networks: int
    trained: dict[str, tuple[int, int]]
    cost: cost.StepCost


class Plan(NamedTuple):
    """images: of each split, named as the fields of `Data`; batch: what one device sees of it; stored: what `views`
    says; known: of teachers that do not know all classes; warning: of the gate."""

    sizes: sources.Sizes
    images: dict[str, int]
    batch: int
    networks: list[Network]
    steps: list[Step]
    stored: tuple[str, ...]
    known: tuple[str, ...]
    warning: str | None


def make(recipe: Recipe) -> Plan:
    """What a run of the checked `recipe` would do. Raises the errors that its data and networks would raise then."""
    options = recipe.dataset
    sizes = sources.sizes(options.name, path=options.path, data_dir=options.data_dir, image_size=options.image_size)
    digests = build.digests_of(recipe, None if sizes.validation else sizes.train, None)
    rows = build.divide(recipe, sizes.labels, sizes.validation, sizes.class_names, digests)
    told = functools.partial(_statistics, options.name, sizes, rows)
    recipe = told_by_data.complete(recipe, sizes.num_classes, told, sizes.class_names)
    images = {split: len(part) for split, part in rows._asdict().items() if split != "sees"} | {"test": sizes.test}
    warning = checks.check_gate(recipe.gate, sizes.num_classes) if recipe.uses_fusion else None
    nets = build.build_networks(recipe, sizes.num_classes)
    checks.check_data(recipe, sizes.image_shape, sizes.num_classes)
    variables = build.variable_shapes(recipe, nets, sizes.image_shape)
    preparation.check_weights(recipe, nets, variables)
    feed = build.make_feed(recipe)
    batch = options.batch_size // len(feed.devices)
    whole = teacher_store.copies(recipe) if nets.teachers else []
    kept = {copy: teacher_store.kept_folder(recipe, *copy) for copy in whole}
    to_train = dict.fromkeys(copy.name for copy in whole if recipe.teachers[copy.k].epochs and not kept[copy])
    own = copies.rows_of(recipe, nets, rows.sees, sizes.labels[rows.teacher_train])
    specialists.check(recipe, nets, own)
    phases = train.phases_of(recipe, nets, variables.params, images, to_train, rows=own)
    size = int(np.prod(sizes.image_shape)) + 8  # of an image, its label and its index
    stored = views.choose(phases, nets, images["train"], images["train"] * size, feed)
    rows_of_steps = list(steps(recipe, phases, stored.views, variables, sizes, images, batch))
    return Plan(
        sizes,
        images,
        batch,
        networks(recipe, nets, variables, sizes.image_shape, kept),
        rows_of_steps,
        stored.lines,
        tuple(specialists.lines(recipe, nets, sizes.class_names)),
        warning,
    )


def _statistics(name: str, sizes: sources.Sizes, rows: Rows) -> Statistics:
    """As a run finds them; any where the images are not read and nothing is published: no size depends on them."""
    if known := statistics.PUBLISHED.get(name):
        return known
    if sizes.train is None:
        return Statistics((0.5,), (0.25,))
    return statistics.of_images(sizes.train.take(rows.teacher_train).image)


def networks(
    recipe: Recipe, nets: Networks, variables: Variables, image_shape: tuple[int, ...], kept: dict[Copy, str]
) -> list[Network]:
    """A row for every network that the run has variables of. kept: where each that stands for a teacher is."""

    def row(role, name, module, source, *inputs, **options):
        apply = functools.partial(module.apply, **options)
        shapes = (jax.ShapeDtypeStruct((1, *shape), dtype) for shape, dtype in inputs)
        return Network(
            role, name, count_parameters(variables.params[role]), cost.flops(apply, variables.of(role), *shapes), source
        )

    student, image = recipe.model.student, (image_shape, jnp.uint8)
    rows = []
    if "student" in variables.params:
        rows.append(
            row("student", student.name, nets.student, given(student.weights) or "from scratch", image, train=False)
        )
    for copy, folder in kept.items():
        options, model = recipe.teachers[copy.k], nets.teachers[copy.k]
        model = model if copy.fold is None else model.clone(adapter_dim=0)
        rows.append(row(copy.name, options.name, model, origin(options, folder), image, train=False))
    if "ib_mbm" in variables.params:
        layers = variables.params["ib_mbm"]
        q = (layers["query"]["kernel"].shape[:1], jnp.float32)
        kv = ((len(nets.teachers), layers["teachers"]["kernel"].shape[0]), jnp.float32)
        rows.append(row("ib_mbm", "IB_MBM", nets.ib_mbm, "from scratch", q, kv))
        code = ((recipe.ib_mbm_out_dim,), jnp.float32)
        logs = (nets.known.shape, jnp.float32)
        rows.append(row("synergy_head", "SynergyHead", nets.synergy_head, "from scratch", code, logs, known=nets.known))
    return rows


def given(reference: str) -> str:
    """What the config calls `weights`, and whether they are here."""
    if not reference.startswith("hf:"):
        return reference
    return f"{reference} ({'in the cache' if origins.cached(reference) else 'to be downloaded'})"


def origin(options: TeacherRecipe, kept: str) -> str:
    """Where a teacher comes from, as `teachers.collect` decides."""
    if kept:
        return f"kept by an earlier run: {kept}"
    most = "at most " if options.early_stopping_patience else ""
    if not options.weights:
        return f"trained from scratch for {most}{options.epochs} epochs"
    tuned = f", fine-tuned for {most}{options.epochs} epochs" if options.epochs else ", as it is"
    return given(options.weights) + tuned


def steps(
    recipe: Recipe,
    phases: Sequence[Phase],
    stored: frozenset[View],
    variables: Variables,
    sizes: sources.Sizes,
    images: dict[str, int],
    batch_size: int,
) -> Iterator[Step]:
    """A row for every phase that trains parameters, in order."""
    known: dict[str, cost.StepCost] = {}
    for phase in phases:
        if not any(jax.tree.leaves(phase.training.mask)):  # statistics alone
            continue
        held = phase.reads if stored.issuperset(phase.views) else frozenset()  # else some of its epochs run networks
        own = jax.eval_shape(functools.partial(runner.used, phase), variables)
        key = f"{phase.optimizer} {sorted(held)} {phase.training.mask}"  # stages that do the same cost the same
        if key not in known:
            batch = batch_shapes(sizes, batch_size, phase.nets, held)
            controls = jax.eval_shape(lambda phase=phase: {**phase.controls(Progress(), 0), "step": jnp.int32(0)})
            known[key] = cost.of_step(phase.training, own, controls, batch, recipe.compute_dtype)
        trained = {
            name: (count, int(count_parameters(variables.params[name]))) for name, count in known[key].trained.items()
        }
        number = phase.epochs * (phase.images(images[phase.split]) // recipe.dataset.batch_size)
        yield Step(phase.title, phase.epochs, number, tree_bytes(own), trained, known[key])


def batch_shapes(
    sizes: sources.Sizes | Data, batch_size: int, nets: Networks, stored: frozenset[str] = frozenset()
) -> dict[str, Any]:
    """A training batch as shapes, with stored outputs of "teachers" and "student"."""

    def shape(dtype, *dimensions):
        return jax.ShapeDtypeStruct((batch_size, *dimensions), dtype)

    def logits(model):
        return jnp.float16 if jnp.dtype(model.dtype).itemsize == 2 else jnp.float32

    batch = {"label": shape(jnp.int32), "index": shape(jnp.int32)}
    if "student" not in stored:
        batch["image"] = shape(jnp.uint8, *sizes.image_shape)
    else:
        batch["student"] = StudentOutputs(
            shape(nets.student.dtype, nets.student.architecture.feat_dim),
            shape(logits(nets.student), sizes.num_classes),
        )
    if "teachers" in stored:
        feats = tuple(shape(model.dtype, model.architecture.feat_dim) for model in nets.teachers)
        batch["teachers"] = TeacherOutputs(feats, shape(logits(nets.teachers[0]), len(feats), sizes.num_classes))
    return batch
