"""What a benchmark times: the calls, steps and readers of a run, each as a function that works for so many seconds.

The run is as `train` prepares it; with random images and teachers it needs neither data nor weights.
"""

import dataclasses
import functools
import re
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from asib_jax import a_step, b_step, build, runner, streams, train
from asib_jax.context import Context
from asib_jax.data import sources
from asib_jax.data.parts import Data
from asib_jax.data.sources import Split
from asib_jax.engine import devices
from asib_jax.engine.banks import Bank
from asib_jax.engine.compiled import Call
from asib_jax.engine.progress import Progress, Tally
from asib_jax.models.ensemble import Variables, init_network
from asib_jax.objectives import state
from asib_jax.objectives.step import make_train_step
from asib_jax.phases import Phase
from asib_jax.recipe import Recipe
from asib_jax.record.experiment import Record
from asib_jax.record.reporting import Reporter
from asib_jax.record.snapshots import Snapshots
from asib_jax.runner import Running
from asib_jax.tools import cost, plan

Work = Callable[[float], int]  # works for about so many seconds, but one call at least; on how many images


def synthetic(recipe: Recipe) -> Recipe:
    """The recipe with networks that take no weights: what `synthetic_data` and random teachers are for."""

    def bare(network: Any, **changes: Any) -> Any:
        name = re.sub("_(scratch|pretrain)$", "", network.name)
        return dataclasses.replace(network, name=name, weights="", **changes)

    model = dataclasses.replace(recipe.model, student=bare(recipe.model.student))
    networks = tuple(bare(teacher, finetune_epochs=0, train_epochs=1, warmup_epochs=0) for teacher in recipe.teachers)
    return dataclasses.replace(recipe, model=model, teachers=networks)


def synthetic_data(recipe: Recipe) -> Data:
    """Random images, as many and as large as the data set's, divided as a run divides them."""
    options = recipe.dataset
    sizes = sources.sizes(options.name, path=options.path, data_dir=options.data_dir, image_size=options.image_size)
    generator = streams.rng(recipe.seed, "synthetic")

    def split(labels: np.ndarray) -> Split:
        images = generator.integers(0, 256, (len(labels), *sizes.image_shape), np.uint8)
        return Split(images, labels.astype(np.int32), np.arange(len(labels), dtype=np.int32))

    test, own_validation = (np.arange(count) % sizes.num_classes for count in (sizes.test, sizes.validation))
    whole = split(np.concatenate([sizes.labels, own_validation]))
    rows = build.divide(recipe, sizes.labels, sizes.validation)
    train, teacher_train, validation = map(whole.take, (rows.train, rows.teacher_train, rows.validation))
    names = tuple(map(str, range(sizes.num_classes)))
    return Data(train, teacher_train, validation, split(test), names, "random images")


def start(recipe: Recipe, data: Data, record: Record, reporter: Reporter, random: bool) -> tuple[Context, Variables]:
    """A run that streams, before its first stage. random: teachers as they are initialised, else those of a run."""
    feed = build.make_feed(recipe)
    nets = build.build_networks(recipe, data.num_classes, feed.axis_name)
    recipe = dataclasses.replace(recipe, a_step_views=0, b_step_views=0, teacher_cache="", train_control=False)
    context = Context(recipe, data, nets, feed, record, reporter, Snapshots(record))
    if random:
        own = build.initial(recipe, nets, data.image_shape).variables
        drawn = {
            name: init_network(model, recipe.seed, name, data.image_shape)
            for name, model in zip(nets.teacher_names, nets.teachers, strict=True)
        }
        ready = Variables(
            *({name: variables[part] for name, variables in drawn.items()} for part in ("params", "batch_stats"))
        )
        variables = devices.replicate(
            Variables(own.params | ready.params, own.batch_stats | ready.batch_stats), feed.devices
        )
    else:
        variables, todo = train.begin(context)
        for phase in todo:
            if phase.network in nets.teacher_names:
                variables = runner.run_phase(context, phase, variables, Progress())
    context.validation.read_teachers(variables)
    return context, variables


def phase_of(context: Context, variables: Variables, kind: str) -> Phase:
    """The A- or B-Step, "a" or "b", of the first stage."""
    describe = {"a": a_step.phase, "b": b_step.phase}[kind]
    return describe(
        context.recipe, context.nets, variables.params, 0, len(context.data.train.label), context.feed.axis_name
    )


def with_one_view(context: Context, variables: Variables) -> Context:
    """The run with one view of the training images stored, for every step that can be read from it."""
    recipe = dataclasses.replace(context.recipe, a_step_views=1, b_step_views=1)
    stored = Context(
        recipe, context.data, context.nets, context.feed, context.record, context.reporter, context.snapshots
    )
    kinds = [phase_of(stored, variables, kind) for kind in kinds_of(recipe)]
    stored.validation.read_teachers(variables)
    stored.read_teachers(variables, kinds)
    for phase in kinds:
        if phase.score == "synergy":
            stored.read_student(variables, phase.views)
    return stored


def kinds_of(recipe: Recipe) -> tuple[str, ...]:
    """Of "a" and "b" the steps that a run has."""
    return ("a", "b") if recipe.uses_fusion else ("b",)


def repeated(once: Callable[[float], int]) -> Work:
    """Calls `once(end)`, which says on how many images it has worked, until the clock shows `end`."""

    def work(seconds: float) -> int:
        end, images = time.perf_counter() + seconds, 0
        while not images or time.perf_counter() < end:
            images += once(end)
        return images

    return work


def training(context: Context, variables: Variables, kind: str) -> Work:
    """The A- or B-Step, "a" or "b", of the first stage."""
    phase, progress = phase_of(context, variables, kind), Progress()
    running = Running(context, phase, variables, progress)
    controls = phase.controls(progress, 0)

    def epoch(end: float) -> int:
        running.tally = Tally()
        running.run_epoch(_until(end, running.calls()), controls)
        jax.block_until_ready(running.current)
        return running.tally.steps * context.recipe.dataset.batch_size

    return repeated(epoch)


def _until(end: float, calls: Iterable[Call]) -> Iterator[Call]:
    for call in calls:
        yield call
        if time.perf_counter() >= end:
            return


def reading(context: Context, variables: Variables, who: str) -> Work:
    """The reader of a bank, of "teachers" or "student", over 32 batches of training images at a time, or fewer."""
    split, recipe = context.data.train, context.recipe
    part = split.take(np.arange(min(32 * context.feed.eval_batch_size, len(split.label))))
    bank = Bank(context.nets, part, context.feed, name="some of the training images", data_aug=recipe.dataset.data_aug)

    def once(end: float) -> int:
        bank.read(who, variables)
        return len(part.label)

    return repeated(once)


def evaluation(context: Context, variables: Variables) -> Work:
    """Everything a run counts after an epoch, on its validation images."""

    def whole(end: float) -> int:
        context.validation(context.nets, variables)
        return context.validation.count

    return repeated(whole)


def streaming_works(context: Context, variables: Variables) -> dict[str, Callable[[], Work]]:
    """What a run does that stores nothing: by name, what makes it ready for its first call."""
    makers: dict[str, Callable[[], Work]] = {
        f"{kind}_streaming": functools.partial(training, context, variables, kind) for kind in kinds_of(context.recipe)
    }
    makers["evaluation"] = functools.partial(evaluation, context, variables)
    if context.nets.teachers:
        makers["read_teachers"] = functools.partial(reading, context, variables, "teachers")
    if context.recipe.uses_fusion:
        makers["read_student"] = functools.partial(reading, context, variables, "student")
    return makers


def stored_works(context: Context, variables: Variables) -> dict[str, Callable[[], Work]]:
    """The same of the steps that the run reads from stored outputs."""
    return {
        f"{kind}_stored": functools.partial(training, context, variables, kind)
        for kind in kinds_of(context.recipe)
        if _is_stored(context, phase_of(context, variables, kind))
    }


def _is_stored(context: Context, phase: Phase) -> bool:
    """Whether the bank holds what the first epoch reads; a view that does not fit is none."""
    return bool(phase.reads) and all(context.bank.of(who, phase.views[0]) is not None for who in phase.reads)


def step_flops(context: Context, variables: Variables, kind: str) -> float:
    """Operations of a training step, "a" or "b", for one image, as `cost.flops` counts them."""
    recipe, size = context.recipe, context.recipe.dataset.batch_size
    nets = build.build_networks(recipe, context.data.num_classes)  # of one device, however many the run has
    one_device = dataclasses.replace(
        context, nets=nets, feed=dataclasses.replace(context.feed, devices=context.feed.devices[:1])
    )
    phase = phase_of(one_device, variables, kind)
    controls = {**phase.controls(Progress(), 0), "lr": np.float32(0), "step": np.int32(0)}
    variables = variables.only(phase.uses)
    variables, controls = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (variables, controls))
    made = phase.training
    begin = functools.partial(
        state.begin, mask=made.mask, trained_stats=made.trained_stats, tx=made.tx, compute_dtype=recipe.compute_dtype
    )
    batch = plan.batch_shapes(context.data, size, nets, phase.reads)
    return cost.flops(make_train_step(made.loss, made.tx), *jax.eval_shape(begin, variables), controls, batch) / size
