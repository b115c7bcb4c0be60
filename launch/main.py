"""Train: python launch/main.py --config=configs/l2_cccp.py:digits [--dry_run] [--config.KEY=VALUE ...]

On several hosts the same, each with --coordinator=HOST:PORT --processes=2 --process=0, or 1 on the other.
"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from absl import app, flags
from ml_collections import config_flags

from asib_jax import (checks, command_line, dry_run, hosts, idle_keys, parallel, plan, recipe as recipes, reporting,
                      train)
from asib_jax.experiment import Record
from configs import base

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what the run would do, its sizes and its memory, and stop.")
COORDINATOR = flags.DEFINE_string("coordinator", None, "Of several hosts: HOST:PORT of process 0, or auto.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many there are; not with auto, which finds it.")
PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0; not with auto.")

jax.config.update("jax_default_matmul_precision", "highest")  # float32 is float32 on GPUs too, not TF32


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}; overrides are written --config.KEY=VALUE")
    try:
        with hosts.joined(COORDINATOR.value, PROCESSES.value, PROCESS.value):
            run()
    except ValueError as error:  # of joining; the run's own end it
        sys.exit(f"error: {error}")


def run() -> None:
    """The run that the flags describe; exits with a message where it fails."""
    path, _, profile = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    try:
        recipe = recipes.read(CONFIG.value)
        if recipe.deterministic:
            parallel.be_deterministic()  # before the checks, which ask for devices
        checks.check(recipe)
        idle = idle_keys.without_effect(recipe, recipes.read(base.get_config(profile)))
        warning = f"without effect in this run: {', '.join(idle)}" if idle else ""
        if DRY_RUN.value:
            if hosts.is_first():
                print(*filter(None, (dry_run.text(recipe, plan.make(recipe)), warning)), sep="\n")
            return
        name = "_".join(filter(None, (pathlib.Path(path).stem, profile, str(recipe.seed))))
        record = Record.create(recipe.results_dir, name, recipe.exp_id, CONFIG.value.to_dict())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    logger = reporting.setup_logging(record.folder)
    if warning:
        logger.warning(warning)
    parallel.keep_compiled(recipe.compilation_cache)
    try:
        train.recorded(recipe, record)
    except Exception:  # told already; the traceback is in log.txt
        sys.exit(f"see {record.folder / 'log.txt'}" if hosts.is_first() else 1)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    app.run(main, flags_parser=command_line.parse)
