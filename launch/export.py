"""Write a finished run's student under PyTorch's names: python launch/export.py results/latest"""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

from absl import flags

from asib_jax.tools import command_line, export

RUN = flags.DEFINE_string("run", None, "A run folder, e.g. results/latest.", required=True)
STUDENT = flags.DEFINE_string("student", "best", "Which student: best (on validation), last, control_best, ...")
FORMAT = flags.DEFINE_enum("format", "safetensors", sorted(export.FORMATS), "The kind of file.")
OUT = flags.DEFINE_string("out", None, "The file; by default student.FORMAT in the run folder.")


def main() -> None:
    out = pathlib.Path(OUT.value) if OUT.value else None
    path, about = export.export(pathlib.Path(RUN.value), STUDENT.value, FORMAT.value, out)
    print(path, *(f"  {key}: {value}" for key, value in about.items()), sep="\n")
    if about["small_input"]:
        print("  where small_input changes the stem (docs/models.md), change PyTorch's before it loads these weights")


if __name__ == "__main__":
    command_line.run(main)
