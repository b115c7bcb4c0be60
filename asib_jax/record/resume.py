"""Which run a command goes on with, and whether it may: the configuration has to be the same where it matters."""

import logging
from pathlib import Path
from typing import NamedTuple

from asib_jax.errors import UserError
from asib_jax.recipe import RETIRED, Recipe, keys, read_stored
from asib_jax.record.experiment import read_about
from asib_jax.record.files import read_json

logger = logging.getLogger("asib_jax")

LATEST = "latest"
_FREE_OF_A_NETWORK = ("weights", "weights_sha256")  # another file of the same contents; `Record.confirm` compares them


def find(recipe: Recipe, name: str) -> Path | None:
    """The folder of the run that the recipe's `resume` asks for; None for a new one.

    "latest": the run called `exp_id`, or without one the newest of `results_dir` whose configuration is the same where
    it matters; warns where there is none. What it finds may have finished. name: of the configuration and its profile,
    by which a run is known whose files are damaged.

    Raises UserError for a folder that is no run's, or of a run of another configuration, and where the newest run is
    damaged: to begin another beside it would bury what it has.
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
    of_a_run = ("about.json", "config.json", "checkpoints")
    runs = {path.parent for content in of_a_run for path in results.glob(f"[!.]*/{content}")}
    seen = [_look(run, recipe, f"{name}_{recipe.seed}") for run in sorted(runs) if not run.is_symlink()]
    alike = sorted(run for run in seen if run.ours)
    if not alike:
        logger.warning(
            "resume='latest': none of the %d runs in %s is of this configuration, so a new one begins",
            sum(not run.wrong for run in seen),
            results,
        )
        return None
    if alike[-1].wrong:
        raise UserError(
            f"resume='latest': {alike[-1].wrong}. It is the newest run of {name}: put that file back, from a copy, or "
            f"name another run with --config.resume=RUN; or move {alike[-1].folder} away, and a new run begins, for "
            "which teachers that are kept are not trained again"
        )
    return alike[-1].folder


class _Seen(NamedTuple):
    """A run: when it began, or changed last where only that can be told; whether it is of the configuration that is
    looked for, and what cannot be read of it."""

    begun: float
    folder: Path
    ours: bool
    wrong: str


def _look(run: Path, recipe: Recipe, name: str) -> _Seen:
    about, wrong = None, ""
    try:
        about = read_about(run)
    except UserError as error:
        wrong = str(error)
    try:
        ours = not differences(run, recipe)
    except UserError as error:
        wrong = wrong or str(error)
        ours = about["name"] == name if about else run.name.startswith(f"{name}_")
    if wrong and (not ours or (about and about["status"] == "finished")):
        logger.warning("left out: %s", wrong)
        ours = False
    return _Seen(about["begun"] if about else run.stat().st_mtime, run, ours, wrong)


def _of_this_configuration(run: Path, recipe: Recipe) -> Path:
    read_about(run)
    if found := differences(run, recipe):
        raise UserError(
            f"resume={recipe.resume!r}: the run {run} has another configuration:\n  "
            + "\n  ".join(found)
            + "\nGive it the same, or begin a new run without resume"
        )
    return run


def differences(folder: Path, recipe: Recipe) -> list[str]:
    """Lines "key: there, here" for every key that matters and differs between the run in `folder` and the recipe.

    Raises UserError where its configuration cannot be read.
    """
    there = read_json(folder / "config.json")
    try:
        theirs, ours = _that_matters(read_stored(there)), _that_matters(recipe)
    except UserError as error:  # edited, or of a version with other keys
        raise UserError(f"{folder / 'config.json'} cannot be read: {error}") from error
    ours |= {key: now for key, now in RETIRED.items() if now is not None}
    theirs |= {key: there.get(key, now) for key, now in RETIRED.items() if now is not None}
    pairs = {key: (theirs.get(key, "absent"), ours.get(key, "absent")) for key in sorted(theirs.keys() | ours.keys())}
    return [f"{key}: {there!r} there, {here!r} here" for key, (there, here) in pairs.items() if there != here]


def _that_matters(recipe: Recipe) -> dict[str, object]:
    values = keys.that_matter(recipe)
    for key in [key for key in values if key.rpartition(".")[2] in _FREE_OF_A_NETWORK]:
        values[key] = "given" if values[key] else ""
    return values
