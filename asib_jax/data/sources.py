"""Where images come from: every source is uint8 NHWC arrays and integer labels, checked and held once."""

import hashlib
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from asib_jax import streams
from asib_jax.data import archives, cifar100, folders
from asib_jax.data.archives import Found
from asib_jax.data.arrays import well_formed
from asib_jax.data.paths import existing, expanded
from asib_jax.data.splits import stratified_rows
from asib_jax.errors import UserError

_BLOCK_BYTES = 16 << 20


class Selected:
    """Rows of an image array without a copy of it: [M,H,W,ch], of which an index by rows gives a NumPy array."""

    def __init__(self, base: np.ndarray, rows: np.ndarray):
        self.base, self.rows = base, rows
        self.shape, self.dtype, self.ndim = (len(rows), *base.shape[1:]), base.dtype, base.ndim

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: np.ndarray | slice | int) -> np.ndarray:
        return self.base[self.rows[key]]

    def __array__(self, dtype=None, copy: bool | None = None) -> np.ndarray:
        if copy is False:
            raise ValueError("selected images are an array only as a copy")
        return np.asarray(self[:], dtype)


def blocks(array: np.ndarray | Selected) -> Iterator[np.ndarray]:
    """The array in contiguous parts of some 16 MB along its first axis: what to hash instead of a copy of it."""
    step = max(1, _BLOCK_BYTES // (array.dtype.itemsize * math.prod(array.shape[1:])))
    return (np.ascontiguousarray(array[start : start + step]) for start in range(0, len(array), step))


class Split(NamedTuple):
    """Images with their labels. `index` is the position in the source's own order: it names an example for good."""

    image: np.ndarray | Selected  # uint8 [N,H,W,ch]
    label: np.ndarray  # int32 [N], 0..C-1
    index: np.ndarray  # type: ignore[assignment]  # int32 [N]; hides tuple.index

    def take(self, rows: np.ndarray) -> "Split":
        """The split of `rows` ([M] integers); its examples keep their `index`, and its images stay where they are."""
        image = self.image if isinstance(self.image, Selected) else Selected(self.image, np.arange(len(self.image)))
        return Split(Selected(image.base, image.rows[rows]), self.label[rows], self.index[rows])


def images_digest(split: Split) -> str:
    """SHA-256 of the images and labels of a split, in hexadecimal."""
    digest = hashlib.sha256()
    for array in (split.image, split.label):
        for block in blocks(array):
            digest.update(block.data)
    return digest.hexdigest()


@dataclass(frozen=True)
class Dataset:
    """A training and a test split, the names of their classes, in words what was read, and the data's own validation
    split, if it has one, whose `index` goes on where that of training ends."""

    train: Split
    test: Split
    class_names: tuple[str, ...]
    origin: str
    validation: Split | None = None

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


@dataclass(frozen=True)
class Sizes:
    """A data set by its sizes: labels [N] of the training split, images of the test split, an image's shape.

    validation: images of the data's own validation split. class_names, train: its classes and training split, of data
    that were read.
    """

    labels: np.ndarray
    test: int
    image_shape: tuple[int, ...]
    num_classes: int
    origin: str
    validation: int = 0
    class_names: tuple[str, ...] = ()
    train: Split | None = None


_PUBLISHED = {  # training images, test images, classes; all are 32x32x3
    "cifar100": (50_000, 10_000, 100),  # Krizhevsky 2009
    "imagenet32": (1_281_167, 50_000, 1000),  # Chrabaszcz et al. 2017
}


def sizes(name: str, *, path: str = "", data_dir: str = "", image_size: int = 0) -> Sizes:
    """The sizes of what `load` would give, and its errors, except that published data sets are not looked for.

    Of those the sizes are the published ones, and the labels are such that no class has two images more than another.
    """
    if name not in _PUBLISHED:
        data = load(name, path=path, data_dir=data_dir, image_size=image_size)
        return Sizes(
            data.train.label,
            len(data.test.label),
            data.train.image.shape[1:],
            data.num_classes,
            data.origin,
            len(data.validation.label) if data.validation else 0,
            data.class_names,
            data.train,
        )
    _existing(path)
    train, test, classes = _PUBLISHED[name]
    needs_path = "; a run needs dataset.path" if name == "imagenet32" and not path else ""
    shape = (image_size or 32, image_size or 32, 3)
    return Sizes(np.arange(train) % classes, test, shape, classes, f"{name} as published, not read{needs_path}")


def load(name: str, *, path: str = "", data_dir: str = "", image_size: int = 0) -> Dataset:
    """The data set `name`, one of `SOURCES`.

    `path` is a file or folder of one's own; `data_dir` ("": $TFDS_DATA_DIR, else ~/tensorflow_datasets) is where
    prepared and downloaded data live. image_size: 0 leaves images as they are, n makes them n x n, see
    `pictures.resized`. Raises UserError for an unknown name (`dataset.name`), a missing path (`dataset.path`),
    malformed data, naming the array, or where nothing is found.
    """
    if name not in SOURCES:
        raise UserError(f"dataset.name = {name!r} is unknown; it must be one of {', '.join(SOURCES)}")
    folder = expanded(data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets", "dataset.data_dir")
    found, origin = SOURCES[name](_existing(path), folder, image_size)
    arrays, class_names = well_formed(found, origin, image_size)

    def split(name: str, first: int = 0) -> Split:
        label = arrays[f"y_{name}"].astype(np.int32)
        return Split(arrays[f"x_{name}"], label, np.arange(first, first + len(label), dtype=np.int32))

    train = split("train")
    validation = split("val", len(train.label)) if "x_val" in arrays else None
    return Dataset(train, split("test"), class_names, origin, validation)


def _existing(path: str) -> Path | None:
    return existing(path, "dataset.path") if path else None


def _digits(path: Path | None, folder: Path, image_size: int) -> Found:
    """scikit-learn's 1797 handwritten digits: 8x8, one channel, 0..16 scaled to 0..255.

    They come without a test split: 30 % are set aside for it, stratified and the same for every seed.
    """
    from sklearn.datasets import load_digits

    digits = load_digits()
    image, label = np.rint(digits.images * (255 / 16)).astype(np.uint8)[..., None], digits.target
    test = stratified_rows(label, round(0.3 * len(label)), streams.rng(0, "digits_test"), leave=1)
    train = np.setdiff1d(np.arange(len(label)), test)
    arrays = {"x_train": image[train], "y_train": label[train], "x_test": image[test], "y_test": label[test]}
    return arrays, "digits of scikit-learn"


def _npz(path: Path | None, folder: Path, image_size: int) -> Found:
    """An .npz of x_train, x_test (see `arrays.well_formed`), y_train, y_test (integers) and, optionally, x_val, y_val
    and class_names."""
    file = _required(path, "an .npz of x_train, y_train, x_test, y_test")
    return archives.read_npz(file, archives.NAMES, archives.OPTIONAL, mapped=True), str(file)


def _imagenet32(path: Path | None, folder: Path, image_size: int) -> Found:
    """Downsampled ImageNet (Chrabaszcz et al. 2017), 32x32, as published in .npz files; its validation set is our test
    split, and its labels 1..1000 become 0..999."""
    source = _required(path, "the folder of train_data_batch_1.npz, ... and val_data.npz")
    batches = list(source.glob("train_data_batch_*.npz"))
    if others := [file.name for file in batches if not re.fullmatch(r"train_data_batch_\d+", file.stem)]:
        raise UserError(
            f"dataset.path = {str(source)!r} holds {', '.join(others)}, which is no "
            "train_data_batch_NUMBER.npz: move it away"
        )
    batches.sort(key=lambda file: int(file.stem.rpartition("_")[2]))
    if not batches or not (source / "val_data.npz").is_file():
        raise UserError(f"dataset.path = {str(source)!r} must hold train_data_batch_1.npz, ... and val_data.npz")
    arrays = {"class_names": np.arange(1000).astype(str)}
    for split, files in (("train", batches), ("test", [source / "val_data.npz"])):
        images, labels = map(list, zip(*map(archives.read_imagenet32, files)))
        arrays[f"x_{split}"], arrays[f"y_{split}"] = _joined(images), np.concatenate(labels)
    return arrays, str(source)


def _joined(parts: list[np.ndarray]) -> np.ndarray:
    """np.concatenate(parts), emptying the list on the way so that parts and result are not both held."""
    whole = np.empty((sum(map(len, parts)), *parts[0].shape[1:]), np.result_type(*{part.dtype for part in parts}))
    end = len(whole)
    while parts:
        part = parts.pop()
        whole[end - len(part) : end] = part
        end -= len(part)
    return whole


def _folder(path: Path | None, folder: Path, image_size: int) -> Found:
    """Pictures in a folder for each class, see `folders.read_folder`."""
    return folders.read_folder(_required(path, f"a folder that holds {folders.LAYOUT}"), image_size)


def _required(path: Path | None, what: str) -> Path:
    if path is None:
        raise UserError(f"this dataset.name needs dataset.path: {what}")
    return path


OWN = ("npz", "folder")  # of these sources, those whose images nobody else knows
SOURCES: dict[str, Callable[[Path | None, Path, int], Found]] = {
    "cifar100": lambda path, folder, image_size: cifar100.read(path) if path else cifar100.find(folder),
    "digits": _digits,
    "imagenet32": _imagenet32,
    "npz": _npz,
    "folder": _folder,
}
