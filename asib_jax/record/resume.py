"""Which run a command goes on with, and whether it may: the configuration has to be the same where it matters."""

import logging
from pathlib import Path
from typing import Any

from asib_jax.errors import UserError
from asib_jax.recipe import RETIRED, Recipe, keys, read_stored
from asib_jax.record.experiment import read_about, read_json

logger = logging.getLogger("asib_jax")

LATEST = "latest"
_FREE_OF_A_NETWORK = ("weights", "weights_sha256")  # another file of the same contents; `Record.confirm` compares them


def find(recipe: Recipe) -> Path | None:
    """The folder of the run that the recipe's `resume` asks for; None for a new one.

    "latest": the run called `exp_id`, or without one the newest of `results_dir` whose configuration is the same where
    it matters; warns where there is none. What it finds may have finished.

    Raises UserError for a folder that is no run's, or of a run of another configuration.
    """
    results = Path(recipe.results_dir)
    if not recipe.resume:
        return None
    if recipe.resume != LATEST:
        return _of_this_configuration(Path(recipe.resume).resolve(), recipe)
    if recipe.exp_id:
        if (results / recipe.exp_id).exists():
            return _of_this_configuration(results / recipe.exp_id, recipe)
        logger.warning("resume='latest': there is no run %s yet, so it begins", results / recipe.exp_id)
        return None
    runs = {
        run: about
        for path in results.glob("*/about.json")
        if not (run := path.parent).is_symlink() and (about := _readable(run))
    }
    alike = [run for run in sorted(runs, key=lambda run: runs[run]["begun"]) if not differences(run, recipe)]
    if not alike:
        logger.warning(
            "resume='latest': none of the %d runs in %s is of this configuration, so a new one begins",
            len(runs),
            results,
        )
    return alike[-1] if alike else None


def _of_this_configuration(run: Path, recipe: Recipe) -> Path:
    read_about(run)
    if found := differences(run, recipe):
        raise UserError(
            f"resume={recipe.resume!r}: the run {run} has another configuration:\n  "
            + "\n  ".join(found)
            + "\nGive it the same, or begin a new run without resume"
        )
    return run


def _readable(run: Path) -> dict[str, Any] | None:
    try:
        return read_about(run)
    except UserError as error:
        logger.warning("left out: %s", error)
        return None


def differences(folder: Path, recipe: Recipe) -> list[str]:
    """Lines "key: there, here" for every key that matters and differs between the run in `folder` and the recipe."""
    try:
        there = read_json(folder / "config.json")
        theirs, ours = _that_matters(read_stored(there)), _that_matters(recipe)
    except ValueError as error:  # damaged, or of a version with other keys
        return [f"{folder / 'config.json'} cannot be read: {error}"]
    ours |= {key: now for key, now in RETIRED.items() if now is not None}
    theirs |= {key: there.get(key, now) for key, now in RETIRED.items() if now is not None}
    pairs = {key: (theirs.get(key, "absent"), ours.get(key, "absent")) for key in sorted(theirs.keys() | ours.keys())}
    return [f"{key}: {there!r} there, {here!r} here" for key, (there, here) in pairs.items() if there != here]


def _that_matters(recipe: Recipe) -> dict[str, object]:
    values = keys.that_matter(recipe)
    for key in [key for key in values if key.rpartition(".")[2] in _FREE_OF_A_NETWORK]:
        values[key] = "given" if values[key] else ""
    return values
