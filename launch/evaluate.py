"""Print the final table of a finished run from disk: python launch/evaluate.py --run=results/latest [--pictures]"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags

from asib_jax import evaluation
from asib_jax.tools import command_line

RUN = flags.DEFINE_string("run", None, "A run folder, e.g. results/latest.", required=True)
PICTURES = flags.DEFINE_boolean("pictures", False, "Draw the pictures in its folder anew, too.")


def main() -> None:
    print(evaluation.evaluate_run(pathlib.Path(RUN.value), draw=PICTURES.value))


if __name__ == "__main__":
    command_line.run(main)
