"""Of a run that has finished, every accuracy: in the process that trained it, and again from disk (SPEC 7)."""

import dataclasses
import logging
import pathlib
import sys

import jax
import numpy as np

from asib_jax import build
from asib_jax.data.parts import Data
from asib_jax.engine import devices
from asib_jax.engine.evaluate import Evaluator
from asib_jax.engine.feed import Feed
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.recipe import Recipe
from asib_jax.record import drawings, finished, provenance, reporting, results
from asib_jax.record.experiment import read_about
from asib_jax.record.files import read_json
from asib_jax.record.finished import Finished
from asib_jax.record.results import Results

logger = logging.getLogger("asib_jax")


def evaluate_finished(
    recipe: Recipe, nets: Networks, data: Data, feed: Feed, done: Finished, validation: Evaluator | None = None
) -> Results:
    """Count correct predictions of everything on validation and, the only time, on test.

    validation: an evaluator that has read the teachers as they are now.
    """
    variables = devices.share(done.variables, feed.devices)
    cache = "" if recipe.trains_teachers else recipe.teacher_cache
    evaluators = [
        validation or Evaluator(nets, data.validation, feed, "validation", cache),
        Evaluator(nets, data.test, feed, "test", cache),
    ]
    for evaluator in evaluators:
        if nets.teachers:
            evaluator.divide(done.temperatures(recipe))
        if not evaluator.teacher_counts:
            evaluator.read_teachers(variables)
    return results.final_results(recipe, nets, dataclasses.replace(done, variables=variables), *evaluators)


def evaluate_run(folder: pathlib.Path, draw: bool = False) -> str:
    """The final table of the finished run in `folder`, computed anew from disk. draw: its pictures, too.

    Raises UserError where the data are not those of the run, and the errors of `finished.load`.
    """
    recipe = finished.read_recipe(folder)
    feed = Feed(tuple(devices.run_devices(1)), recipe.device_data_gb)  # whatever the run used: counts are the same
    data = build.load_data(recipe)
    theirs, ours = read_about(folder).get("data_sha256", {}), provenance.data_digests(data)
    if changed := [split for split in ours if theirs.get(split) != ours[split]]:
        raise UserError(
            f"{data.origin} is not the data of the run in {folder}: about.json there has another SHA-256 "
            f"of {', '.join(changed)}, or none; dataset.path in its config.json says where they were"
        )
    nets = build.build_networks(recipe, data.num_classes, feed.axis_name)
    done = finished.load(folder, recipe, nets, data.image_shape)
    _check_shapes(folder, done, build.variable_shapes(recipe, nets, data.image_shape))
    found = evaluate_finished(recipe, nets, data, feed, done)
    _compare(folder, found.summary)
    if draw:
        drawings.draw(folder, read_json(folder / "metrics.json"), data, found.logits, found.named, found.known)
    return results.render(recipe, found, reporting.width(sys.stdout))


def _compare(folder: pathlib.Path, summary: dict[str, float]) -> None:
    """Warn of figures that are not those that the run ended with."""
    metrics = read_json(folder / "metrics.json")
    recorded = {name: metrics.get(f"final/{name}", now) for name, now in summary.items()}  # an earlier version had less
    differ = [f"{name} {recorded[name]}, now {now}" for name, now in summary.items() if recorded[name] != now]
    if differ:
        logger.warning(
            "%s: not what the run ended with, since a file of it was changed or this machine rounds otherwise: %s",
            *(folder, ", ".join(differ)),
        )


def _check_shapes(folder: pathlib.Path, done: Finished, expected: Variables) -> None:
    """UserError where config.json has been edited to networks other than those that the run left."""
    networks = {name: done.variables.params[name] for name in done.variables.params.keys() & expected.params.keys()}
    for name, params in networks.items():
        theirs, ours = (
            {jax.tree_util.keystr(path): np.shape(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}
            for tree in (params, expected.params[name])
        )
        if differ := [key for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key) != ours.get(key)]:
            group = "model.student" if name == "student" else name
            raise UserError(
                f"{folder / 'config.json'} is not what the run began with: its {group} has "
                f"{ours.get(differ[0], 'nothing')} for {differ[0]}, the checkpoint {theirs.get(differ[0], 'nothing')}; "
                f"put the keys of {group} back"
            )
