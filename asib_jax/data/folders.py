"""Folders of pictures: which files are of which class and split; what was done to how many of them is told once."""

import logging
import os
import stat
from collections import Counter
from pathlib import Path

import numpy as np

from asib_jax import streams
from asib_jax.data.archives import Arrays, Found
from asib_jax.data.pictures import SUFFIXES, read_pictures
from asib_jax.data.splits import stratified_rows
from asib_jax.errors import UserError

logger = logging.getLogger("asib_jax")

_SPLITS = {"train": ("train",), "val": ("val", "validation", "valid"), "test": ("test",)}
_LIKE_SPLITS = {"train", "training", "test", "testing", "val", "valid", "validation"}
LAYOUT = "folders train/<class> and test/<class> (val/<class>, too, if you like), or a folder for each class"
_TEST_SHARE = 0.2  # of a folder that is not divided


def read_folder(source: Path, image_size: int = 0) -> Found:
    """The pictures of `source` as uint8 RGB with the names of their classes, which are those of the folders.

    It has train/<class> and test/<class>, and perhaps val/<class> (or validation, or valid); or only a folder for each
    class, of whose pictures a fifth is set aside for test, stratified and the same for every seed. Subfolders of a
    class belong to it; hidden files and folders are none. image_size: as for `read_pictures`.

    Raises UserError for another layout, a class without a picture for training, names that are no text, what is no
    regular file, and the errors of `read_pictures`.
    """
    if not source.is_dir():
        raise UserError(f"dataset.path = {str(source)!r} is no folder; it must hold {LAYOUT}")
    done, left_out = Counter[str](), Counter[str]()
    splits = _divided(source, left_out) or _undivided(source, left_out)
    names = sorted(splits["train"])
    arrays: Arrays = {"class_names": np.asarray(names)}
    for split, classes in splits.items():
        labelled = [(file, label) for label, name in enumerate(names) for file in classes.get(name, ())]
        files = [file for file, _ in labelled]
        arrays[f"x_{split}"], notes = read_pictures(files, image_size)
        arrays[f"y_{split}"] = np.asarray([label for _, label in labelled])
        done += notes
    _tell(source, sum(len(arrays[f"y_{split}"]) for split in splits), done, left_out)
    return arrays, str(source)


def _tell(source: Path, total: int, done: Counter[str], left_out: Counter[str]) -> None:
    told = [f"of {total} pictures " + ", ".join(f"{count} {what}" for what, count in done.items())] if done else []
    if left_out:
        told.append(f"left out: {_listed(left_out)}")
    if told:
        logger.info("%s: %s", source, "; ".join(told))


def _listed(counts: Counter[str]) -> str:
    return ", ".join(f"{what} ({count})" for what, count in counts.items())


Classes = dict[str, list[Path]]  # the pictures of each


def _divided(source: Path, left_out: Counter[str]) -> dict[str, Classes]:
    """The splits of a folder that has train and test; none of another."""
    folders = _subfolders(source)
    there = {split: [name for name in names if name in folders] for split, names in _SPLITS.items()}
    if not there["train"] or not there["test"]:
        return {}
    if len(there["val"]) > 1:
        raise UserError(f"{source} holds {' and '.join(there['val'])}: which is the validation split?")
    used = {split: names[0] for split, names in there.items() if names}
    if others := [name for name in folders if name not in used.values()]:
        left_out[f"folders beside {' and '.join(used.values())}: {', '.join(others[:5])}"] += len(others)
    splits = {split: _classes(source / name, left_out) for split, name in used.items()}
    for split, classes in splits.items():
        folder = source / used[split]
        if unknown := sorted(set(classes) - set(splits["train"])):
            raise UserError(f"{folder} has classes that {source / 'train'} has not: {', '.join(unknown)}")
        _check_empty(folder, classes, left_out, all_of_them=split == "train")
    return splits


def _undivided(source: Path, left_out: Counter[str]) -> dict[str, Classes]:
    """A folder of classes, divided into training and test."""
    like = [name for name in _subfolders(source) if name.lower() in _LIKE_SPLITS and _subfolders(source / name)]
    if like:
        raise UserError(
            f"{source} holds {', '.join(like)}, but not both train and test: call them so, and a validation split val; "
            "or let dataset.path be one of them alone, to have it divided"
        )
    classes = _classes(source, left_out)
    if not classes:
        raise UserError(f"dataset.path = {str(source)!r} must hold {LAYOUT}; it holds no folder")
    _check_empty(source, classes, left_out)
    if few := [f"{name} ({len(files)})" for name, files in classes.items() if len(files) < 3]:
        raise UserError(
            f"{source} is divided into training, validation and test, for which every class needs 3 pictures; too few "
            f"have {', '.join(few[:5])}: add some, move the folder away, or divide it into train and test yourself"
        )
    files = [file for name in classes for file in classes[name]]
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in classes.values()])
    count = max(len(classes), round(_TEST_SHARE * len(files)))
    chosen = np.zeros(len(files), bool)
    chosen[stratified_rows(labels, count, streams.rng(0, "folder_test"), leave=2)] = True
    logger.info(
        "%s: not divided into train and test; of %d pictures %d are set aside for test, stratified, the same ones for "
        "every seed",
        *(source, len(files), count),
    )
    splits: dict[str, Classes] = {"train": {name: [] for name in classes}, "test": {name: [] for name in classes}}
    names = list(classes)
    for file, label, test in zip(files, labels, chosen, strict=True):
        splits["test" if test else "train"][names[label]].append(file)
    return splits


def _check_empty(folder: Path, classes: Classes, left_out: Counter[str], *, all_of_them: bool = True) -> None:
    empty = [name for name, files in classes.items() if not files]
    if len(empty) == len(classes) or (empty and all_of_them):
        others = f"; there are {_listed(left_out)}" if left_out else ""
        raise UserError(f"{folder}: no picture ({', '.join(SUFFIXES)}) in {', '.join(empty) or '<class>'}{others}")


def _classes(folder: Path, left_out: Counter[str]) -> Classes:
    """The pictures of each class in `folder`, in order of their names."""
    stray = [entry for entry in folder.iterdir() if _visible(entry.name) and entry.suffix.lower() in SUFFIXES]
    if stray := [entry for entry in stray if not entry.is_dir()]:
        left_out[f"files beside the classes in {folder}"] += len(stray)
    return {name: picture_files(folder / name, left_out) for name in _subfolders(folder)}


def _subfolders(folder: Path) -> list[str]:
    entries = [entry for entry in folder.iterdir() if _visible(entry.name)]
    if broken := [entry.name for entry in entries if entry.is_symlink() and not entry.exists()]:
        raise UserError(f"{folder / broken[0]} is a link that leads to nothing: remove it")
    names = sorted(entry.name for entry in entries if entry.is_dir())
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"the name of the folder {os.fsencode(name)!r} in {folder} is no UTF-8 text, so no class can be called "
                "so: rename it; if others show it rightly, the locale is not UTF-8: set PYTHONUTF8=1"
            ) from error
    return names


def picture_files(folder: Path, left_out: Counter[str]) -> list[Path]:
    """The pictures in `folder` and its subfolders, by their suffixes. UserError for what cannot be read as a file."""
    found, seen = [], dict[str, str]()
    for root, folders, files in os.walk(folder, onerror=_raised, followlinks=True):
        real = os.path.realpath(root)
        if real in seen:
            raise UserError(f"{root} is {seen[real]} once more, by a link: remove the link")
        seen[real] = root
        folders[:] = sorted(filter(_visible, folders))
        for file in (Path(root, name) for name in sorted(filter(_visible, files))):
            if file.suffix.lower() not in SUFFIXES:
                left_out[f"files called {file.suffix.lower()}" if file.suffix else "files without a suffix"] += 1
                continue
            check_regular(file)
            found.append(file)
    return found


def check_regular(file: Path) -> None:
    """UserError for what cannot be read as a file: a link to nothing, a pipe, a socket, a device."""
    try:
        mode = file.stat().st_mode
    except OSError as error:
        raise UserError(f"{file} is a link that leads to no file ({error.strerror}): remove it") from error
    if not stat.S_ISREG(mode):
        raise UserError(f"{file} is no file but a pipe, socket or device: move it away")


def _visible(name: str) -> bool:
    return not name.startswith(".")


def _raised(error: OSError) -> None:
    raise error
