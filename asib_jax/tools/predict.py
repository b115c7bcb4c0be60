"""What a finished run's student says of pictures: files, and folders of them."""

import csv
import logging
import math
import os
import pathlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from asib_jax import build
from asib_jax.data.folders import check_regular, picture_files
from asib_jax.data.pictures import SUFFIXES, read_pictures
from asib_jax.data.sources import Split
from asib_jax.engine import devices
from asib_jax.engine.banks import Bank
from asib_jax.engine.compiled import keep_compiled
from asib_jax.engine.feed import Feed
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.record import finished
from asib_jax.record.experiment import read_about
from asib_jax.record.predictions import printable, probabilities
from asib_jax.record.reporting import table

logger = logging.getLogger("asib_jax")

_BYTES = 1 << 28  # of the pictures that are in memory at once


class Predictions(NamedTuple):
    """probabilities: [N, C], of each file the classes called `names`; NaN where a logit is not finite."""

    files: list[pathlib.Path]
    names: tuple[str, ...]
    probabilities: np.ndarray

    def rows(self, top: int) -> Iterator[list[Any]]:
        """Of each file its name, and of the `top` most probable classes the names ("" of none) and probabilities."""
        for file, guess in zip(self.files, self.probabilities):
            best, told = np.argsort(-guess, kind="stable")[:top], np.isfinite(guess).all()
            yield [file, *(cell for k in best for cell in (self.names[k] if told else "", float(guess[k])))]


def predict(run: pathlib.Path, student: str, paths: Sequence[str]) -> Predictions:
    """Classify the pictures at `paths` by `student` ("best", "last", ... of `Finished.students`) of the run folder.

    In a folder all pictures count, as they do in one of training images. They are read as those are and brought to
    their size and channels; what was done to how many is told. The run's data are not needed.

    Raises UserError where there is no such run, student or picture, and the errors of `read_pictures`.
    """
    classify, files = Classifier(run, student), list_files(paths)
    found, done = [], Counter[str]()
    at_once = max(1, _BYTES // math.prod(classify.shape))
    for start in range(0, len(files), at_once):
        images, notes = read_images(files[start : start + at_once], classify.shape)
        done += notes
        found.append(classify(images))
    if done:
        told = ", ".join(f"{count} {what}" for what, count in done.items())
        logger.warning("of %d pictures %s", len(files), told)
    return Predictions(files, classify.names, np.concatenate(found))


class Classifier:
    """A finished run's student. names: of its classes; shape: of an image, (H, W, channels)."""

    def __init__(self, run: pathlib.Path, student: str):
        """The errors of `predict` but those of pictures."""
        recipe, variables = finished.read_recipe(run), finished.load_student(run, student)
        self.names, self.shape = _of_data(run, variables["params"]["classifier"]["kernel"].shape[-1])
        keep_compiled(recipe.compilation_cache)
        devices_, batch = tuple(devices.run_devices(1)), recipe.dataset.eval_batch_size
        self._feed = Feed(devices_, recipe.device_data_gb, eval_batch=batch)
        self._nets = Networks(build.build_networks(recipe, len(self.names)).student.clone(adapter_dim=0))
        self._own = Variables({"student": variables["params"]}, {"student": variables["batch_stats"]})

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Probabilities [N, C] of uint8 images [N, H, W, channels]; NaN where a logit is not finite."""
        nothing = np.zeros(len(images), np.int32)
        bank = Bank(self._nets, Split(images, nothing, nothing), self._feed, name="pictures")
        return probabilities(bank.read("student", self._own)[0].logit)


def _of_data(run: pathlib.Path, classes: int) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """The names of the classes and the shape of an image that the run was trained on."""
    about = read_about(run)
    names, shape = about.get("class_names"), about.get("image_shape")
    named = isinstance(names, list) and len(names) == classes
    if not named or not isinstance(shape, list) or [type(size) for size in shape] != [int] * 3 or min(shape) < 1:
        raise UserError(
            f"{run / 'about.json'} does not say class_names and image_shape: it is damaged, or an earlier version of "
            "this code wrote it; train again, which finds the teachers that are kept"
        )
    return tuple(map(str, names)), tuple(shape)


def list_files(paths: Sequence[str]) -> list[pathlib.Path]:
    """The files among `paths` and the pictures in the folders, in order. UserError where there is none."""
    files, left_out = [], Counter[str]()
    for path in map(pathlib.Path, paths):
        if not path.exists():
            raise UserError(f"{path} does not exist")
        if path.is_dir():
            files += picture_files(path, left_out)
        else:
            check_regular(path)
            files.append(path)
    if left_out:
        logger.warning("left out: %s", ", ".join(f"{count} {what}" for what, count in left_out.items()))
    if not files:
        named = ", ".join(paths) or "what was named, which is nothing: say which files or folders"
        raise UserError(f"no picture ({', '.join(SUFFIXES)}) in {named}")
    return files


def read_images(files: Sequence[pathlib.Path], shape: tuple[int, ...]) -> tuple[np.ndarray, Counter[str]]:
    """The pictures as uint8 [N, *shape], and how many had what done to them.

    Raises UserError for pictures that cannot be brought to that shape, and the errors of `read_pictures`.
    """
    height, width, channels = shape
    if channels not in (1, 3):
        raise UserError(f"the run's images have {channels} channels, which no picture has")
    images, done = read_pictures(files, height if height == width else 0)
    if images.shape[1:3] != (height, width):
        raise UserError(f"{files[0]} is {images.shape[2]}x{images.shape[1]}; the run's images are {width}x{height}")
    if channels == 3:
        return images, done
    coloured = int((images != images[..., :1]).any(axis=(1, 2, 3)).sum())
    done += Counter({"had colours, of which the brightness was taken": coloured})
    return np.stack([np.asarray(Image.fromarray(image).convert("L")) for image in images])[..., None], done


def text(predictions: Predictions, top: int) -> str:
    """A table of `Predictions.rows`."""
    ranks = range(1, min(top, len(predictions.names)) + 1)
    rows = [["file", *(cell for k in ranks for cell in (_heading("class", k), "%"))]]
    for file, *cells in predictions.rows(top):
        shown = [f"{100 * cell:.2f}" if isinstance(cell, float) else printable(cell) for cell in cells]
        rows.append([printable(os.fsencode(file).decode(errors="backslashreplace")), *shown])
    return "\n".join(table(rows, "<" + "<>" * len(ranks)))


def write_csv(predictions: Predictions, top: int, out: pathlib.Path) -> None:
    """The same as a file, at full precision. UserError where it exists."""
    ranks = range(1, min(top, len(predictions.names)) + 1)
    try:
        with open(out, "x", newline="", encoding="utf-8", errors="surrogateescape") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(["file", *(_heading(what, k) for k in ranks for what in ("class", "probability"))])
            writer.writerows(predictions.rows(top))
    except FileExistsError:
        raise UserError(f"{out} exists; choose another with --csv=FILE") from None


def _heading(what: str, rank: int) -> str:
    return what if rank == 1 else f"{what} {rank}"
