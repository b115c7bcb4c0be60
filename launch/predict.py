"""Classify pictures with a finished run's student: python launch/predict.py results/latest IMAGES

IMAGES are files, and folders with all pictures in them, which are read as training images are. The run's data are not
needed.
"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags

from asib_jax.errors import UserError
from asib_jax.tools import command_line, predict

RUN = flags.DEFINE_string("run", None, "A run folder, e.g. results/latest.", required=True)
STUDENT = flags.DEFINE_string("student", "best", "Which student: best (on validation), last, control_best, ...")
TOP = flags.DEFINE_integer("top", 1, "How many classes of each picture, from the most probable on.", lower_bound=1)
CSV = flags.DEFINE_string("csv", "", "A file for the predictions, instead of a table on the console.")


def main(images: list[str]) -> None:
    if CSV.value and pathlib.Path(CSV.value).exists():  # before the work
        raise UserError(f"--csv={CSV.value} exists; choose another")
    found = predict.predict(pathlib.Path(RUN.value), STUDENT.value, images)
    if CSV.value:
        predict.write_csv(found, TOP.value, pathlib.Path(CSV.value))
        print(f"{len(found.files)} predictions in {CSV.value}")
    else:
        print(predict.text(found, TOP.value))


if __name__ == "__main__":
    command_line.run(main, arguments=True)
