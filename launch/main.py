"""Train: python launch/main.py --config=configs/l2_cccp.py:digits [--dry_run] [--config.KEY=VALUE ...]

On several hosts the same, each with --coordinator=HOST:PORT --processes=2 --process=0, or 1 on the other.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags
from ml_collections import config_flags

from asib_jax import train
from asib_jax.recipe import read
from asib_jax.tools import command_line, dry_run
from configs import base, profiles

CONFIG = config_flags.DEFINE_config_file("config", lock_config=True)
RESUME = flags.DEFINE_boolean("resume", False, "Go on with the newest run of this configuration: config.resume=latest.")
DRY_RUN = flags.DEFINE_boolean("dry_run", False, "Print what the run would do, its sizes and its memory, and stop.")
JOINED = command_line.host_flags()


def main() -> None:
    path, _, profile = config_flags.get_config_filename(flags.FLAGS["config"]).partition(":")
    if RESUME.value and not CONFIG.value.resume:
        CONFIG.value.resume = "latest"
    name = "_".join(filter(None, (pathlib.Path(path).stem, profile)))
    defaults = read(base.get_config(profile if profile in profiles.PROFILES else ""))  # a file may have its own
    with JOINED():
        if DRY_RUN.value:
            dry_run.tell(CONFIG.value, name, defaults)
        else:
            changed = config_flags.get_override_values(flags.FLAGS["config"])
            train.start(CONFIG.value, name, defaults, changed)


if __name__ == "__main__":
    flags.mark_flag_as_required("config")
    command_line.run(main)
