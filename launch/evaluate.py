"""Print the final table of a finished run from disk: python launch/evaluate.py --run=results/latest"""
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import jax
from absl import app, flags, logging

from asib_jax import train

RUN = flags.DEFINE_string("run", None, "A run folder, e.g. results/latest.", required=True)

jax.config.update("jax_default_matmul_precision", "highest")  # float32 is float32 on GPUs too, not TF32


def main(argv: list[str]) -> None:
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # orbax tells of every step of a restore
    try:
        print(train.evaluate_run(pathlib.Path(RUN.value)))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    app.run(main)
