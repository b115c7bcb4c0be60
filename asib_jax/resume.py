"""Which run a command goes on with, and whether it may: the configuration has to be the same where it matters."""
import json
import logging
from pathlib import Path

from asib_jax import recipe as recipes
from asib_jax.errors import UserError
from asib_jax.experiment import read_about
from asib_jax.recipe import Recipe
from asib_jax.typed_groups import flat

logger = logging.getLogger("asib_jax")

LATEST = "latest"
# Keys that a run may go on with other values of: where things are, what is shown, how fast it goes.
FREE = frozenset({
    "resume", "results_dir", "exp_id", "num_devices", "steps_per_call", "device_data_gb", "bank_memory_gb", "platform",
    "deterministic", "tensorboard", "wandb", "compilation_cache", "teacher_cache", "profile_steps",
    "checkpoint_minutes", "checkpoint_steps", "max_nonfinite_steps", "dataset.path", "dataset.data_dir"})
_FREE_OF_A_NETWORK = ("weights", "weights_sha256")  # another file of the same contents; `Record.confirm` compares them


def find(recipe: Recipe) -> Path | None:
    """The folder of the run that the recipe's `resume` asks for; None for a new one.

    "latest": the newest run of `results_dir`, or of the folder `exp_id` there, whose configuration is the same where it
    matters; warns where there is none. What it finds may have finished.

    Raises UserError for a folder that is no run's, or of a run of another configuration.
    """
    if not recipe.resume:
        return None
    if recipe.resume != LATEST:
        folder = Path(recipe.resume).expanduser().resolve()
        read_about(folder)
        if found := differences(folder, recipe):
            raise UserError(f"resume={recipe.resume!r}: that run has another configuration:\n  "
                            + "\n  ".join(found) + "\nGive it the same, or begin a new run without resume")
        return folder
    results = Path(recipe.results_dir).expanduser()
    runs = [path.parent for path in results.glob(f"{recipe.exp_id or '*'}/about.json") if not path.parent.is_symlink()]
    newest_first = sorted(runs, key=lambda run: read_about(run)["begun"], reverse=True)
    alike = [run for run in newest_first if not differences(run, recipe)]
    if not alike:
        logger.warning("resume='latest': none of the %d runs in %s is of this configuration, so a new one begins",
                       len(runs), results)
    return alike[0] if alike else None


def differences(folder: Path, recipe: Recipe) -> list[str]:
    """Lines "key: there, here" for every key that matters and differs between the run in `folder` and the recipe."""
    try:
        there = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        theirs, ours = _that_matters(recipes.read(there)), _that_matters(recipe)
    except (OSError, ValueError) as error:  # of a version with other keys, or damaged
        return [f"{folder / 'config.json'} cannot be read: {error}"]
    missing = object()
    return [f"{key}: {theirs.get(key, 'absent')!r} there, {ours.get(key, 'absent')!r} here"
            for key in sorted(theirs.keys() | ours.keys()) if theirs.get(key, missing) != ours.get(key, missing)]


def _that_matters(recipe: Recipe) -> dict[str, object]:
    values = {key: value for key, value in flat(recipe).items() if key not in FREE}
    for key in [key for key in values if key.rpartition(".")[2] in _FREE_OF_A_NETWORK]:
        values[key] = "given" if values[key] else ""
    if recipe.scale_lr_with_devices:
        values["num_devices"] = recipe.num_devices
    return values
