"""A finished run's student as a file of weights under PyTorch's names."""

import io
import json
import pathlib
from typing import Any

import numpy as np
from safetensors import numpy as safetensors

from asib_jax import models
from asib_jax.errors import UserError
from asib_jax.record import finished
from asib_jax.record.files import read_json, write
from asib_jax.weights import torch_names

Arrays = dict[str, np.ndarray]


def _safetensors(arrays: Arrays, about: dict[str, Any]) -> bytes:
    return safetensors.save(
        arrays, {key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()}
    )


def _npz(arrays: Arrays, about: dict[str, Any]) -> bytes:
    """Without `about`: an .npz holds arrays alone, and each of them is a weight."""
    file = io.BytesIO()
    np.savez(file, **arrays)  # type: ignore[arg-type]  # no weight is named as an option
    return file.getvalue()


FORMATS = {"safetensors": _safetensors, "npz": _npz}


def export(
    run: pathlib.Path, student: str, kind: str, out: pathlib.Path | None = None
) -> tuple[pathlib.Path, dict[str, Any]]:
    """Write `student` ("best", "last", ... of `Finished.students`) of the run folder `run` in the format `kind`.

    out: the file; None: student.KIND in the run folder.

    Returns the file and what a user of the weights must know: network, num_classes, mean and std of pixels in [0, 1],
    small_input, an image's shape and the names of the classes in the order of the logits, where the run recorded them,
    the run. A .safetensors file holds these too, as text.

    Raises UserError where there is no such run, it did not finish, the file exists, the run has no such student, its
    network has no PyTorch counterpart, or `out` is named otherwise.
    """
    out = out or run / f"student.{kind}"
    if out.suffix != f".{kind}":
        raise UserError(f"--out={out} must end in .{kind}, or --format say otherwise")
    recipe, variables = finished.read_recipe(run), finished.load_student(run, student)
    options, told = recipe.model.student, read_json(run / "about.json")
    architecture = models.backbone(options.name, recipe.dataset.small_input, "model.student.name")
    arrays = torch_names.export_weights(variables, architecture)
    about: dict[str, Any] = {
        "network": options.name,
        "num_classes": variables["params"]["classifier"]["kernel"].shape[-1],
        "mean": options.mean,
        "std": options.std,
        "small_input": recipe.dataset.small_input,
        **{key: told[key] for key in ("image_shape", "class_names") if key in told},
        "run": run.resolve().name,
        "student": student,
    }
    content = FORMATS[kind](arrays, about)
    if out.exists():
        raise UserError(f"{out} exists; choose another with --out=FILE")
    try:
        write(out, content)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}); choose another with --out=FILE") from error
    return out, about
