"""Train: python launch/main.py --config=configs/l2_cccp.py:digits [--dry_run] [--config.KEY=VALUE ...]

On several hosts the same, each with --coordinator=HOST:PORT --processes=2 --process=0, or 1 on the other.
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from absl import flags
from ml_collections import config_flags

from asib_jax import preparation, train
from asib_jax.engine import hosts, parallel
from asib_jax.recipe import idle_keys, recipe as recipes
from asib_jax.record import experiment, reporting, resume, snapshots
from asib_jax.tools import command_line, dry_run, plan
from asib_jax.record.experiment import Record
from configs import base

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
RESUME = flags.DEFINE_boolean("resume", False, "Go on with the newest run of this configuration: config.resume=latest.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what the run would do, its sizes and its memory, and stop.")
JOINED = command_line.host_flags()

jax.config.update("jax_default_matmul_precision", "highest")  # float32 is float32 on GPUs too, not TF32


def main() -> None:
    with JOINED():
        run()


def run() -> None:
    """The run that the flags describe."""
    path, _, profile = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    if RESUME.value and not CONFIG.value.resume:
        CONFIG.value.resume = resume.LATEST
    recipe = preparation.checked(CONFIG.value)
    idle = idle_keys.without_effect(recipe, recipes.read(base.get_config(profile)))
    warning = f"without effect in this run: {', '.join(idle)}" if idle else ""
    found = resume.find(recipe)
    hosts.same_everywhere({"the run to go on with": str(found)})
    if DRY_RUN.value:
        if hosts.is_first():
            goes_on = f"goes on with {found}" if found else ""
            print(*filter(None, (dry_run.text(recipe, plan.make(recipe)), warning, goes_on)), sep="\n")
        return
    if found and experiment.read_about(found)["status"] == "finished":
        print(f"{found} has finished: there is nothing to go on with")
        return
    inputs = preparation.prepare(recipe)  # and the last that fails without a trace
    if found:
        record = Record.reopen(found, CONFIG.value.to_dict())
    else:
        name = "_".join(filter(None, (pathlib.Path(path).stem, profile, str(recipe.seed))))
        record = Record.create(recipe.results_dir, name, recipe.exp_id, CONFIG.value.to_dict())
    logger = reporting.setup_logging(record.folder)
    last = snapshots.last_whole(found) if found else None
    if warning:
        logger.warning(warning)
    parallel.keep_compiled(recipe.compilation_cache)
    try:
        train.recorded(recipe, inputs, record, last)
    except Exception as error:
        if hosts.is_first():
            error.add_note(f"see {record.folder / 'log.txt'}")
        raise


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
