"""What a source gives, as arrays that every other part can rely on: uint8 [N,H,W,channels] and labels 0..C-1."""

import logging
from collections import Counter
from collections.abc import Iterator

import numpy as np
from PIL import Image

from asib_jax.data.archives import Arrays
from asib_jax.data.pictures import resized, room
from asib_jax.errors import UserError

logger = logging.getLogger("asib_jax")

_MOST_CLASSES = 100_000  # that need no names of their own
_MOST_CHANNELS = 4
_AT_ONCE = 1024  # images that are scaled at once
_EXPECTED = "uint8 [N,H,W,channels], or grey [N,H,W], or floats in 0..1"


def well_formed(arrays: Arrays, origin: str, image_size: int = 0) -> tuple[Arrays, tuple[str, ...]]:
    """x_train, y_train, x_test, y_test and perhaps x_val, y_val of `arrays`, and the names of their classes.

    Images without an axis of channels get one; floats in 0..1 are scaled to 0..255; with image_size=n all are resized
    to n x n: what was done is told. Without class names the classes are 0..the largest training label, all of them.
    Named ones may be without images, as in a part of ImageNet for networks that know all of it: that is a warning.

    Raises UserError naming the array that is malformed, has its channels first, or has images of another size.
    """
    if ("x_val" in arrays) != ("y_val" in arrays):
        raise UserError(f"{origin} has {'x_val without y_val' if 'x_val' in arrays else 'y_val without x_val'}")
    found: Arrays = {}
    for split in _splits(arrays):
        x, y = images(arrays[f"x_{split}"], f"x_{split}", origin, image_size), arrays[f"y_{split}"]
        if split != "train" and x.shape[1:] != found["x_train"].shape[1:]:
            raise UserError(f"{origin}: x_{split} is {_kind(x)}, but x_train is {_kind(found['x_train'])}")
        if y.dtype.kind not in "iu" or y.shape != x.shape[:1]:
            raise UserError(f"{origin}: y_{split} must be integers [{len(x)}], one per image; found {_kind(y)}")
        _check_levels(x, f"x_{split}", origin)
        found |= {f"x_{split}": x, f"y_{split}": y}
    names = _class_names(arrays, origin)
    for split in _splits(found):
        y = found[f"y_{split}"]
        if y.min() < 0 or y.max() >= len(names):
            raise UserError(f"{origin}: y_{split} must lie in 0..{len(names) - 1}; found {y.min()}..{y.max()}")
    _check_classes(found, names, "class_names" in arrays, origin)
    return found, names


def _splits(arrays: Arrays) -> Iterator[str]:
    return (split for split in ("train", "val", "test") if f"x_{split}" in arrays)


def images(x: np.ndarray, name: str, origin: str, image_size: int = 0) -> np.ndarray:
    """uint8 [N,H,W,channels] of the array called `name`, as `well_formed` makes them; its errors."""
    told = []
    if (x.dtype != np.uint8 and x.dtype.kind != "f") or x.ndim not in (3, 4) or not x.size:
        raise UserError(f"{origin}: {name} must be {_EXPECTED}, not empty; found {_kind(x)}")
    if x.ndim == 3:
        x = x[..., None]
        told.append("is grey: it has one channel")
    if x.shape[3] > _MOST_CHANNELS:
        if x.shape[1] > _MOST_CHANNELS:
            raise UserError(
                f"{origin}: {name} must have 1 to {_MOST_CHANNELS} channels, its last axis; it is {_kind(x)}"
            )
        raise UserError(
            f"{origin}: {name} has its channels first, {_kind(x)}; they have to come last: save "
            f"{name}.transpose(0, 2, 3, 1)"
        )
    if x.dtype != np.uint8:
        x = _scaled(x, name, origin)
        told.append("was scaled from 0..1 to 0..255")
    if image_size and x.shape[1:3] != (image_size, image_size):
        told.append(f"was resized from {x.shape[1]}x{x.shape[2]} to {image_size}x{image_size}")
        x = _resized(x, image_size)
    if told:
        logger.info("%s: %s %s", origin, name, ", ".join(told))
    return np.ascontiguousarray(x)


def _scaled(x: np.ndarray, name: str, origin: str) -> np.ndarray:
    """Floats in 0..1 to the nearest of 0..255."""
    low, high = float(x.min()), float(x.max())  # NaN if there is one
    if not (low >= 0 and high <= 1):
        raise UserError(
            f"{origin}: {name} is {x.dtype} in {low:.6g}..{high:.6g}, but floats must lie in 0..1, before any "
            f"normalisation; levels of 0..255 are saved as {name}.astype(np.uint8)"
        )
    scaled = np.empty(x.shape, np.uint8)
    for start in range(0, len(x), _AT_ONCE):
        part = slice(start, start + _AT_ONCE)
        scaled[part] = np.rint(x[part].astype(np.float32) * 255)
    return scaled


def _check_levels(x: np.ndarray, name: str, origin: str) -> None:
    """UserError for training images without a difference, a warning for levels that were divided once too often."""
    low, high = 255, 0
    for start in range(0, len(x), _AT_ONCE):
        part = x[start : start + _AT_ONCE]
        low, high = min(low, int(part.min())), max(high, int(part.max()))
        if high > max(low, 1):
            return
    if low == high and name == "x_train":
        raise UserError(f"{origin}: every pixel of every training image is {low} of 0..255: there is nothing to learn")
    if high <= 1:
        logger.warning(
            "%s: %s lies in %d..%d of 0..255, which is black: levels in 0..1 are saved as floats, not as uint8, nor "
            "divided by 255 twice",
            *(origin, name, low, high),
        )


def _resized(x: np.ndarray, size: int) -> np.ndarray:
    """[N,size,size,channels]; every channel by itself."""
    found = room((len(x), size, size, x.shape[3]))
    for image, small in zip(x, found, strict=True):
        for channel in range(x.shape[3]):
            plane = Image.fromarray(np.ascontiguousarray(image[..., channel]))
            small[..., channel] = np.asarray(resized(plane, size))
    return found


def _check_classes(arrays: Arrays, names: tuple[str, ...], named: bool, origin: str) -> None:
    """Every class has images where it needs them, or that is told."""
    trained = np.unique(arrays["y_train"])
    absent = np.setdiff1d(np.arange(len(names)), trained)
    if len(absent) and not named:
        raise UserError(
            f"{origin}: y_train has no {_listed(absent, names)}; labels must be 0..C-1, each there, or class_names be "
            "given"
        )
    if len(trained) < 2:
        raise UserError(
            f"{origin}: all training images are of one class, {names[trained[0]]!r}: there is nothing to tell apart"
        )
    if len(absent):
        logger.warning(
            "%s: %d classes of %d have no training image: %s", origin, len(absent), len(names), _listed(absent, names)
        )
    for split in _splits(arrays):
        missing = np.setdiff1d(trained, arrays[f"y_{split}"])
        if len(missing):
            logger.warning(
                "%s: the %s split has no image of %d of the %d classes; its accuracy says nothing of them: %s",
                *(origin, {"val": "validation"}.get(split, split), len(missing), len(trained), _listed(missing, names)),
            )


def _listed(classes: np.ndarray, names: tuple[str, ...]) -> str:
    return ", ".join([*(names[k] for k in classes[:5]), *["..."][: max(0, len(classes) - 5)]])


def _class_names(arrays: Arrays, origin: str) -> tuple[str, ...]:
    if "class_names" not in arrays:
        largest = int(arrays["y_train"].max())
        if largest >= _MOST_CLASSES:
            raise UserError(
                f"{origin}: y_train has the label {largest}; more than {_MOST_CLASSES} classes, all of "
                "which would have an output, need class_names"
            )
        return tuple(str(label) for label in range(largest + 1))
    names = arrays["class_names"]
    if names.dtype.kind != "U" or names.ndim != 1:
        raise UserError(f"{origin}: class_names must be text [C]; found {_kind(names)}")
    letters = names.astype(names.dtype.newbyteorder("=")).view(np.uint32)
    if ((letters >= 0xD800) & (letters < 0xE000) | (letters > 0x10FFFF)).any():  # Python has trouble with either
        raise UserError(f"{origin}: class_names is not all text: it has code points that Unicode has not")
    found = tuple(names.tolist())
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        logger.warning(
            "%s: class_names has %s: predictions by name do not tell such classes apart",
            origin,
            ", ".join([f"{name!r} {found.count(name)} times" for name in twice[:5]] + ["..."] * (len(twice) > 5)),
        )
    return found


def _kind(array: np.ndarray) -> str:
    return f"{array.dtype} {list(array.shape)}"
