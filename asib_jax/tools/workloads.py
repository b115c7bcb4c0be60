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

from asib_jax import a_step, b_step, build, streams, teachers, train
from asib_jax.engine import feature_bank, loop
from asib_jax.objectives import state, steps
from asib_jax.tools import cost, plan
from asib_jax.build import Data
from asib_jax.data import sources
from asib_jax.data.sources import Split
from asib_jax.record.experiment import Record
from asib_jax.engine.feed import Call
from asib_jax.models.ensemble import Variables
from asib_jax.engine.nonfinite import Watch
from asib_jax.recipe.recipe import Recipe
from asib_jax.record.reporting import Reporter
from asib_jax.run import Progress, Run
from asib_jax.record.snapshots import Snapshots
from asib_jax.engine.stored_views import StoredViews

Work = Callable[[float], int]  # works for about so many seconds, but one call at least; on how many images
_STEPS = {"a": a_step, "b": b_step}


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
    sizes = sources.sizes(options.name, path=options.path, data_dir=options.data_dir)
    generator = streams.rng(recipe.seed, "synthetic")

    def split(labels: np.ndarray) -> Split:
        images = generator.integers(0, 256, (len(labels), *sizes.image_shape), np.uint8)
        return Split(images, labels.astype(np.int32), np.arange(len(labels), dtype=np.int32))

    whole, test = split(sizes.labels), split(np.arange(sizes.test) % sizes.num_classes)
    parts = [whole.take(rows) for rows in build.divide(recipe, sizes.labels)]
    return Data(*parts, test, sizes.num_classes, "random images")


def start(recipe: Recipe, data: Data, record: Record, reporter: Reporter, random: bool) -> tuple[Run, Variables]:
    """A run that streams, before its first step. random: teachers as they are initialised, else those of a run."""
    feed = build.make_feed(recipe)
    nets = build.build_networks(recipe, data.num_classes, feed.axis_name)
    own = build.init_student_and_fusion(recipe, nets, data.image_shape)
    if random:
        drawn = {name: build.init_network(model, recipe.seed, name, data.image_shape)
                 for name, model in zip(nets.teacher_names, nets.teachers)}
        ready = Variables(*({name: variables[part] for name, variables in drawn.items()}
                            for part in ("params", "batch_stats")))
    else:
        ready = teachers.ready(recipe, nets, data, feed, record, reporter, Snapshots(record))
    variables = Variables(own.params | ready.params, own.batch_stats | ready.batch_stats)
    recipe = dataclasses.replace(recipe, a_step_views=0, b_step_views=0, teacher_cache="")
    return train.prepare(recipe, nets, data, feed, record, reporter, Snapshots(record), variables)


def with_one_view(run: Run, variables: Variables) -> Run:
    """The run with one view of the training images stored, for every step that can be read from it."""
    recipe = dataclasses.replace(run.recipe, a_step_views=1, b_step_views=1)
    stored = StoredViews(recipe, run.nets, run.data.train, run.feed, variables)
    stored.read_student(variables, 0)
    return dataclasses.replace(run, recipe=recipe, stored=stored, _compiled={})


def repeated(once: Callable[[float], int]) -> Work:
    """Calls `once(end)`, which says on how many images it has worked, until the clock shows `end`."""
    def work(seconds: float) -> int:
        end, images = time.perf_counter() + seconds, 0
        while not images or time.perf_counter() < end:
            images += once(end)
        return images
    return work


def training(run: Run, variables: Variables, kind: str) -> Work:
    """The A- or B-Step, "a" or "b", of the first stage."""
    progress, limit = Progress(), run.recipe.max_nonfinite_steps
    current, frozen, step, rate = _STEPS[kind].begin(run, variables, progress, 0)
    controls = _STEPS[kind].controls_of(run, progress, 0, 0)

    def epoch(end: float) -> int:
        nonlocal current
        calls = _until(end, run.calls(step, kind, 0, 0))
        current = loop.run_epoch(step, current, frozen, calls, tally := loop.Tally(), Watch(limit), phase=kind,
                                 controls=controls, learning_rate=rate, first_step=0)
        jax.block_until_ready(current)
        return tally.steps * run.recipe.dataset.batch_size
    return repeated(epoch)


def _until(end: float, calls: Iterable[Call]) -> Iterator[Call]:
    for call in calls:
        yield call
        if time.perf_counter() >= end:
            return


def reading(run: Run, variables: Variables, read: Callable) -> Work:
    """A reader of `feature_bank` over 32 batches of training images at a time, or all of fewer."""
    options, split = run.recipe.dataset, run.data.train
    part = split.take(np.arange(min(32 * options.batch_size, len(split.label))))
    read = functools.partial(read, run.nets, variables, keys=[run.augment_key("a", 0, 0)], feed=run.feed,
                             data_aug=options.data_aug, batch_size=options.batch_size)

    def once(end: float) -> int:
        read(split=part)
        return len(part.label)
    return repeated(once)


def evaluation(run: Run, variables: Variables) -> Work:
    """Everything a run counts after an epoch, on its validation images."""
    def whole(end: float) -> int:
        run.validation(variables)
        return run.validation.count
    return repeated(whole)


def streaming_works(run: Run, variables: Variables) -> dict[str, Callable[[], Work]]:
    """What a run does that stores nothing: by name, what makes it ready for its first call."""
    kinds = ("a", "b") if run.recipe.uses_fusion else ("b",)
    makers = {f"{kind}_streaming": functools.partial(training, run, variables, kind) for kind in kinds}
    makers["evaluation"] = functools.partial(evaluation, run, variables)
    if run.nets.teachers:
        makers["read_teachers"] = functools.partial(reading, run, variables, feature_bank.read_teachers)
    if run.recipe.uses_fusion:
        makers["read_student"] = functools.partial(reading, run, variables, feature_bank.read_student)
    return makers


def stored_works(run: Run, variables: Variables) -> dict[str, Callable[[], Work]]:
    """The same of the steps that the run reads from stored outputs."""
    return {f"{kind}_stored": functools.partial(training, run, variables, kind) for kind in sorted(run.stored.steps)}


def step_flops(run: Run, variables: Variables, kind: str) -> float:
    """Operations of a training step, "a" or "b", for one image, as `cost.flops` counts them."""
    recipe, size = run.recipe, run.recipe.dataset.batch_size
    nets = build.build_networks(recipe, run.data.num_classes)  # of one device, however many the run has
    controls = {**_STEPS[kind].controls_of(run, Progress(), 0, 0), "lr": np.float32(0), "step": np.int32(0)}
    variables, controls = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (variables, controls))
    made = _STEPS[kind].make_training(recipe, nets, variables.params, 0)
    begin = functools.partial(state.begin, mask=made.mask, trained_stats=made.trained_stats, tx=made.tx,
                              compute_dtype=recipe.compute_dtype)
    batch = plan.batch_shapes(run.data, size, nets, recipe.compute_dtype, kind if kind in run.stored.steps else "")
    step = steps.make_train_step(made.loss, made.tx)
    return cost.flops(step, *jax.eval_shape(begin, variables), controls, batch) / size
