"""How fast a run's own steps are on the devices here: what `launch/benchmark.py` prints and writes.

After two calls of each that warm it up, all are measured in turn, `ROUNDS` times; figures are medians over the rounds.
The clock is read when the devices have finished.
"""

import collections
import contextlib
import dataclasses
import functools
import importlib.metadata
import importlib.util
import logging
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

from asib_jax import build, train
from asib_jax.context import Context
from asib_jax.data.parts import Data
from asib_jax.engine import views
from asib_jax.engine.banks import View
from asib_jax.engine.feed import tree_bytes
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Variables
from asib_jax.phases import Phase
from asib_jax.recipe import Recipe
from asib_jax.record import provenance
from asib_jax.record.experiment import Record
from asib_jax.record.reporting import Reporter
from asib_jax.tools import device_check, workloads
from asib_jax.tools.workloads import Work

logger = logging.getLogger("asib_jax.benchmark")

ROUNDS = 5
TITLES = {
    "a_streaming": "A-Step, all networks run",
    "torch_a": "A-Step, PyTorch",
    "a_stored": "A-Step, stored outputs",
    "b_streaming": "B-Step, all networks run",
    "torch_b": "B-Step, PyTorch",
    "b_stored": "B-Step, stored outputs",
    "read_teachers": "reading the teachers",
    "read_student": "reading the student",
    "evaluation": "evaluation",
}
_HITS, _MISSES = (f"/jax/compilation_cache/cache_{name}" for name in ("hits", "misses"))


def warm_up(
    makers: dict[str, Callable[[], Work]], devices: Sequence[jax.Device]
) -> tuple[dict[str, Work], dict[str, dict[str, float]]]:
    """Prepares each and calls it twice.

    Of each: how long it took to the end of the first call; how much longer than the second, which is tracing and
    compiling or loading; how many programs jax's persistent cache had, and how many were added to it; the most memory
    used so far.
    """
    works, found = {}, {}
    for name, make in makers.items():
        with _cache_events() as events:
            began = time.perf_counter()
            work = works[name] = make()
            called = time.perf_counter()
            work(0.0)
            done = time.perf_counter()
        work(0.0)
        first, compile_seconds = done - began, max(0.0, done - called - (time.perf_counter() - done))
        found[name] = {
            "first_call_seconds": first,
            "compile_seconds": compile_seconds,
            "from_cache": events[_HITS],
            "new_in_cache": events[_MISSES],
            "peak_bytes": peak_bytes(devices),
        }
        logger.info("%s: %.1f s to the end of the first call", TITLES[name], first)
    return works, found


@contextlib.contextmanager
def _cache_events() -> Iterator[collections.Counter]:
    events: collections.Counter = collections.Counter()

    def listen(event: str, **details: Any) -> None:
        events[event] += 1

    jax.monitoring.register_event_listener(listen)
    try:
        yield events
    finally:
        jax.monitoring.unregister_event_listener(listen)


def peak_bytes(devices: Sequence[jax.Device]) -> int:
    """The most memory used so far: of one device where they tell, as GPUs do; else this process's resident memory."""
    used = max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices)
    return used or 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def rates_of(works: dict[str, Work], seconds: float) -> dict[str, list[float]]:
    """Images per second of each, ROUNDS times in turn; `seconds` for each in all."""
    rates: dict[str, list[float]] = {name: [] for name in works}
    for number in range(ROUNDS):
        logger.info("round %d of %d", number + 1, ROUNDS)
        for name, work in works.items():
            began = time.perf_counter()
            images = work(seconds / ROUNDS)
            rates[name].append(images / (time.perf_counter() - began))
    return rates


def paired_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of the rounds' ratios: what slows a whole round down leaves it as it is."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def matmul_rate(devices: Sequence[jax.Device], dtype: str) -> float:
    """Operations per second of large matrix products on all devices together, the median of ROUNDS."""
    size = device_check.matmul_size(devices[0].platform)
    return 1e12 * statistics.median(
        sum(product.rate for product in device_check.matmuls(devices, size, dtype)) for _ in range(ROUNDS)
    )


def project(
    rates: Mapping[str, float], phases: Sequence[Phase], stored: frozenset[View], *, images: int, epoch_images: int
) -> float:
    """Seconds of reading and training, from images per second.

    stored: the views whose outputs are held; in epochs of others every network runs in each step. images: of the
    training split, which reading a view runs through; epoch_images: of an epoch's whole batches.
    """
    amounts: collections.Counter[str] = collections.Counter()
    read = [stored.intersection(phase.views) if phase.reads else frozenset() for phase in phases]
    for phase, held in zip(phases, read, strict=True):
        for view in phase.views:
            amounts[f"{phase.optimizer}_{'stored' if view in held else 'streaming'}"] += epoch_images
        amounts["read_student"] += images * len(held) * ("student" in phase.reads)
    amounts["read_teachers"] = images * len(frozenset().union(*read))
    return sum(amount / rates[name] for name, amount in amounts.items() if amount)


def projections(rates: Mapping[str, float], run: Context, variables: Variables, recipe: Recipe) -> list[dict[str, Any]]:
    """The first A-Step and all stages of the recipe, with its views and with one, and PyTorch's time where it is known.

    Without evaluations, BatchNorm calibration and compilation, and with teachers given.
    """
    images = len(run.data.train.label)
    sizes = {"images": images, "epoch_images": images // recipe.dataset.batch_size * recipe.dataset.batch_size}
    theirs = {f"{kind}_streaming": rates[f"torch_{kind}"] for kind in ("a", "b") if f"torch_{kind}" in rates}
    rows: list[dict[str, Any]] = []
    for counts in dict.fromkeys([(recipe.a_step_views, recipe.b_step_views), (1, 1)]):
        wanted = dataclasses.replace(recipe, a_step_views=counts[0], b_step_views=counts[1], train_control=False)
        phases = train.phases_of(wanted, run.nets, variables.params, {"train": images}, {})
        stored = views.choose(phases, run.nets, images, tree_bytes(run.data.train), run.feed).views
        parts = {f"A-Step of {recipe.a_epochs} epochs": phases[:1]} if recipe.uses_fusion else {}
        for part, some in (parts | {"whole run": phases}).items():
            row: dict[str, Any] = {
                "part": part,
                **{
                    f"{kind}_views": count * any(phase.optimizer == kind and bool(phase.reads) for phase in some)
                    for kind, count in zip("ab", counts, strict=True)
                },
                "seconds": project(rates, some, stored, **sizes),
            }
            if theirs:
                row["torch_seconds"] = project(theirs, some, frozenset(), **sizes)
                row["ratio"] = row["torch_seconds"] / row["seconds"]
            rows += [row] if row not in rows else []
    return rows


def measure(
    recipe: Recipe, *, random: bool, seconds: float, rival: Callable[[Recipe, Data, str], dict[str, Work]] | None = None
) -> dict[str, Any]:
    """Everything about a checked recipe, as values that JSON knows.

    random: `workloads.synthetic` has made the recipe: random images and teachers. seconds: for the rounds of each rate.
    rival: (recipe, data, platform) to PyTorch's works, "torch_a" and "torch_b", which take turns with ours.
    """
    if recipe.teachers_only:
        raise UserError("teachers_only=True: there is no A- or B-Step to measure; set teachers_only=False")
    if recipe.folds:
        raise UserError(
            f"teacher_folds={recipe.folds}: copies are read from what is stored and never run at every step, which is "
            "measured, too; set teacher_folds=0, under which a stored step takes as long"
        )
    began = time.perf_counter()
    data = workloads.synthetic_data(recipe) if random else build.load_data(recipe)
    recipe = build.complete(recipe, data)
    with tempfile.TemporaryDirectory() as folder, Reporter(folder, tensorboard=False, wandb="", config={}) as reporter:
        record = Record.create(folder, "benchmark", "", {"seed": recipe.seed})
        run, variables = workloads.start(recipe, data, record, reporter, random)
        before, devices = time.perf_counter() - began, run.feed.devices
        works, warm = warm_up(workloads.streaming_works(run, variables), devices)
        stored = workloads.with_one_view(run, variables)
        more, found = warm_up(workloads.stored_works(stored, variables), devices)
        works, warm = works | more, warm | found
        flops = {
            name: workloads.step_flops(stored if name in more else run, variables, name[0])
            for name in works
            if name[:2] in ("a_", "b_")
        }
        if rival:
            works |= (theirs := rival(recipe, data, devices[0].platform))
            warm |= warm_up({name: functools.partial(dict.get, theirs, name) for name in theirs}, devices)[1]
        rounds = rates_of({name: works[name] for name in TITLES if name in works}, seconds)
    rates = {name: statistics.median(values) for name, values in rounds.items()}
    matmul = matmul_rate(devices, recipe.compute_dtype)
    view_seconds = {
        name: len(data.train.label) / rates[name] for name in ("read_teachers", "read_student") if name in rates
    }
    achieved = {name: rates[name] * count for name, count in flops.items()}
    paired = {name: paired_ratio(rounds[name], rounds[f"torch_{name[0]}"]) for name in flops} if rival else {}
    return {
        **environment(recipe, run, random, rival is not None),
        "rounds": ROUNDS,
        "seconds_each": seconds,
        "images_per_second": rates,
        "images_per_second_of_each_round": rounds,
        "warm_up": warm,
        "view_seconds": view_seconds,
        "first_step_seconds": before + next(iter(warm.values()))["first_call_seconds"],
        "matmul_flops_per_second": matmul,
        "flops_per_image": flops,
        "flops_per_second": achieved,
        "share_of_matmul": {name: rate / matmul for name, rate in achieved.items()},
        "ratio_to_torch": paired,
        "projected_from_rates": projections(rates, run, variables, recipe),
        "recipe": dataclasses.asdict(recipe),
    }


def environment(recipe: Recipe, run: Context, random: bool, with_torch: bool) -> dict[str, Any]:
    """What the figures are of."""
    devices = run.feed.devices
    names = [recipe.model.student.name, *(teacher.name for teacher in recipe.teachers if run.nets.teachers)]
    versions = provenance.versions()
    if with_torch and importlib.util.find_spec("torch"):
        versions["torch"] = importlib.metadata.version("torch")
    return {
        "synthetic": random,
        "versions": versions,
        "platform": devices[0].platform,
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "hosts": jax.process_count(),
        "cores": len(os.sched_getaffinity(0)),
        "networks": names,
        "compute_dtype": recipe.compute_dtype,
        "batch_size": recipe.dataset.batch_size,
        "classes": run.data.num_classes,
        "image_shape": list(run.data.image_shape),
        "images": {"train": len(run.data.train.label), "validation": len(run.data.validation.label)},
    }
