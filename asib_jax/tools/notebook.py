"""A run in a few lines of Python: teachers, student and data in; a trained student and its table out."""

import contextlib
import copy
import dataclasses
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from asib_jax import shipped, train
from asib_jax.data import arrays
from asib_jax.data.archives import NAMES
from asib_jax.data.sources import SOURCES
from asib_jax.errors import UserError
from asib_jax.recipe import keys as keys_, read
from asib_jax.record import console
from asib_jax.record.files import read_json
from asib_jax.tools.predict import Classifier
from asib_jax.weights import origins

Network = str | Mapping[str, Any]  # a name, or keys of the configuration's group


@dataclasses.dataclass(frozen=True)
class Distilled:
    """A finished run. folder: its record, of which the launch scripts make the same and more; table: its final table;
    metrics: every figure of it, by name."""

    folder: pathlib.Path
    table: str
    metrics: dict[str, Any]

    def predict(self, images: np.ndarray, student: str = "best") -> np.ndarray:
        """Probabilities [N, C] of the classes, in their order, of images in any form that `distil` takes them in.

        student: "best" (on validation), "last", "control_best" or "control_last". Raises UserError for images of
        another size than those of the run, or a student that it has not.
        """
        classify = Classifier(self.folder, student)
        found = arrays.images(np.asarray(images), "images", "predict")
        if found.shape[1:] != classify.shape:
            raise UserError(f"images {list(found.shape)}: those of the run in {self.folder} are [N, *{classify.shape}]")
        return classify(found)


def distil(
    config: str = "l2_cccp:own",
    *,
    data: str | Mapping[str, np.ndarray] | None = None,
    student: Network | None = None,
    teachers: Sequence[Network] | None = None,
    **keys: Any,
) -> Distilled:
    """Train as `python launch/main.py --config=configs/CONFIG` does, and wait for the end.

        run = asib_jax.distil(data="pictures/", student="resnet8", teachers=["resnet20", "resnet14"], kd_alpha=0.5)
        print(run.table)

    config: a shipped configuration with its profile, whose keys count where nothing else is said. data: a folder or
    file, the name of a data set, or the arrays x_train, y_train, x_test, y_test (and class_names), which are kept in
    results_dir/data, so that the run can be evaluated and gone on with. student, teachers: networks by name, or as
    keys of `model.student` and `teacherK`; what is not said of a teacher is as of the configuration's first, and one
    with `weights` is not trained unless it says so. keys: any other of the configuration, a group as a mapping:
    `schedule={"type": "step"}`; `resume="latest"` goes on with an interrupted run, or gives the finished one.

    Raises UserError as the command does, and Interrupted where a signal has stopped the run.
    """
    values = shipped.config(config)
    defaults = read(values)
    _merge(values, keys)
    if student is not None:
        _merge(values, {"model": {"student": _network(student)}})
    if teachers is not None:
        first = values["teacher1"]
        for name in [name for name in values if name.startswith("teacher") and name[7:].isdigit()]:
            del values[name]
        for k, teacher in enumerate(teachers, 1):
            own = _network(teacher)
            values[f"teacher{k}"] = copy.deepcopy(first)
            _merge(values, {f"teacher{k}": ({"train_epochs": 0} if own.get("weights") else {}) | own})
    if data is not None:
        _merge(values, {"dataset": _dataset(data, pathlib.Path(values["results_dir"]))})
    before, now = keys_.flat(defaults), keys_.flat(read(values))
    changed = [key for key in now if now[key] != before.get(key)]
    with contextlib.redirect_stderr(sys.stderr), contextlib.ExitStack() as end:  # both are the caller's afterwards
        end.callback(console.leave)
        folder = train.start(values, config.replace(":", "_"), defaults, changed)
    return Distilled(folder, (folder / "table.txt").read_text(encoding="utf-8"), read_json(folder / "metrics.json"))


def _merge(values: dict[str, Any], changes: Mapping[str, Any]) -> None:
    """Set keys, in groups one by one. What is no key stays for `read` to name."""
    for name, value in changes.items():
        if isinstance(value, Mapping) and isinstance(values.get(name), dict):
            _merge(values[name], value)
        else:
            values[name] = value


def _network(given: Network) -> dict[str, Any]:
    return {"name": given} if isinstance(given, str) else dict(given)


def _dataset(data: str | Mapping[str, np.ndarray], results: pathlib.Path) -> dict[str, str]:
    """The keys of the group `dataset` that name it."""
    if isinstance(data, Mapping):
        return {"name": "npz", "path": str(_kept(data, results / "data"))}
    if isinstance(data, str) and data in SOURCES:
        return {"name": data, "path": ""}
    return {"name": "", "path": str(data)}


def _kept(given: Mapping[str, np.ndarray], folder: pathlib.Path) -> pathlib.Path:
    """The file of these arrays, called by their digest."""
    if missing := [name for name in NAMES if name not in given]:
        raise UserError(f"data={{{', '.join(given)}}} has no {', '.join(missing)}")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
        np.savez(file, **{name: np.asarray(array) for name, array in given.items()})  # type: ignore[arg-type]  # names
    path = folder / f"{origins.digest(file.name)[:16]}.npz"
    os.replace(file.name, path)  # or the same once more
    return path
