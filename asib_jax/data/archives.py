"""Readers of data files that somebody else wrote. None of them runs code from a file, or believes a size it states.

What is unpacked takes at most `_ANYWAY` bytes, or `_RATIO` times those of the file: images and weights are not packed
so well, and a bomb is.
"""

import gzip
import io
import logging
import math
import re
import struct
import tarfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from asib_jax.data.plain_pickle import Unpickler
from asib_jax.errors import UserError

logger = logging.getLogger("asib_jax")

Arrays = dict[str, np.ndarray]
Found = tuple[Arrays, str]  # what a source gives: NAMES (and perhaps OPTIONAL), and in words what was read
NAMES = ("x_train", "y_train", "x_test", "y_test")
OPTIONAL = ("x_val", "y_val", "class_names")

_PYTHON_FILES = ("train", "test", "meta")  # of cifar-100-python, pickles written by Python 2
_BINARY_FILES = ("train.bin", "test.bin", "fine_label_names.txt")  # of cifar-100-binary
CIFAR_FILES = (_PYTHON_FILES, _BINARY_FILES)
_CIFAR_FOLDERS = ("cifar-100-python", "cifar-100-binary")
_CIFAR_BYTES = 256 << 20  # more than the published files and archives, unpacked: 187 MB
_CIFAR_CLASSES, _CIFAR_NAME = 100, 100  # how many, and the longest name
_PIXELS = 3 * 32 * 32  # one image, stored channel by channel
_MAP_BYTES = 64 << 20  # from this size on images stay in their file where they can
_ANYWAY, _RATIO = 1 << 30, 100


def check_unpacked(unpacked: int, packed: int, anyway: int | None = None) -> None:
    """ValueError if so few bytes should not be unpacked into so many; `anyway` (`_ANYWAY`) bytes always are."""
    if unpacked > max(_ANYWAY if anyway is None else anyway, _RATIO * packed):
        raise ValueError(f"{packed} bytes would be unpacked into {unpacked}, more than {_RATIO} times as many")


def open_zip(file: BinaryIO) -> zipfile.ZipFile:
    """An archive whose members can be read: all of them take no more memory than `check_unpacked` lets through.

    Raises nearly anything on a damaged one, ValueError for sizes that only an attack has.
    """
    archive = zipfile.ZipFile(file)
    members = archive.infolist()
    packed = sum(member.compress_size for member in members)
    if packed > file.seek(0, io.SEEK_END):  # which members that overlap do
        raise ValueError("its members are larger than itself")
    for member in members:
        if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise ValueError(f"{member.filename} is neither stored nor deflated")
    check_unpacked(sum(member.file_size for member in members), packed)
    return archive


def read_npz(
    path: Path, required: Sequence[str] | None = None, optional: Sequence[str] = (), *, mapped: bool = False
) -> Arrays:
    """The named arrays of an .npz file, all without names; optional ones only if they are there, and where there are
    such, those of other names are told. Pickled (object) arrays are refused.

    mapped: large uint8 arrays that are not compressed (np.savez) are mapped, read-only: pages come from the file as
    they are used and no checksum is compared, so the file must stay as it is.

    Raises OSError if the file cannot be opened, UserError naming it and the array that is missing or cannot be read.
    """
    with open(path, "rb") as file:
        try:
            archive = open_zip(file)
        except Exception as error:  # damaged archives raise nearly anything
            raise UserError(f"{path} is not an .npz file, or not all of it: {error}") from error
        members = {member.filename.removesuffix(".npy"): member for member in archive.infolist()}
        missing = [name for name in required or () if name not in members]
        if missing:
            raise UserError(f"{path} lacks the arrays {', '.join(missing)}; it holds {', '.join(members)}")
        if others := [name for name in members if optional and name not in (*(required or ()), *optional)]:
            logger.warning(
                "%s: not read: %.200s; what may be there is called %s", path, ", ".join(others), ", ".join(optional)
            )
        arrays = {}
        for name in members if required is None else (*required, *(name for name in optional if name in members)):
            try:
                arrays[name] = _read_member(file, archive, members[name], mapped)
            except Exception as error:
                raise UserError(f"{path}: array {name} cannot be read (pickles are refused): {error}") from error
    return arrays


def _read_member(file: BinaryIO, archive: zipfile.ZipFile, member: zipfile.ZipInfo, mapped: bool) -> np.ndarray:
    """An array whose header fits its member's size. Raises nearly anything on another."""
    with archive.open(member) as stream:  # which compares the member's own header with the archive's directory
        if np.lib.format.read_magic(stream) != (1, 0):  # numpy writes later versions for structured arrays only
            raise ValueError("it is not an array of numbers or text")
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        header = stream.tell()
        if dtype.hasobject or dtype.kind == "V" or not dtype.itemsize:
            raise ValueError(f"an array of type {dtype}; allow_pickle=False")
        if header + math.prod(shape) * dtype.itemsize != member.file_size:
            raise ValueError(f"its shape {list(shape)} does not fit the {member.file_size - header} bytes it has")
        if (
            mapped
            and dtype == np.uint8
            and not fortran_order
            and member.compress_type == zipfile.ZIP_STORED
            and member.file_size >= _MAP_BYTES
        ):
            return _map(file, member.header_offset, header, shape)
        values = np.frombuffer(stream.read(), dtype)  # to the end, where the checksum is compared
    return values.reshape(shape, order="F" if fortran_order else "C")


def _map(file: BinaryIO, offset: int, header: int, shape: tuple[int, ...]) -> np.ndarray:
    """The bytes after a member's header, where they lie in the file."""
    file.seek(offset + 26)  # the 30 bytes before a member's name end with two lengths
    name, extra = struct.unpack("<HH", file.read(4))
    start = offset + 30 + name + extra + header
    return np.asarray(np.memmap(file, np.uint8, "r", start, shape))  # which checks the end of the file


class _Type:
    """What stands for numpy.dtype: numbers alone."""

    def __init__(self, code: str, align: bool, copy: bool):
        if not re.fullmatch("b1|[iu][1248]|f[248]", code):
            raise ValueError("it has an array of something else than numbers")
        self.dtype = np.dtype(code)

    def __setstate__(self, state: tuple) -> None:
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array:
    """What stands for numpy.ndarray. Its values are made when they are asked for, not as often as a pickle says."""

    def __init__(self, *arguments: Any):
        """numpy's arguments are always those of an empty array."""

    def __setstate__(self, state: tuple) -> None:
        _, self.shape, self.type, self.fortran_order, self.content = state

    def values(self) -> np.ndarray:
        content = self.content.encode("latin1") if isinstance(self.content, str) else self.content
        return np.frombuffer(content, self.type.dtype).reshape(self.shape, order="F" if self.fortran_order else "C")


_CIFAR_PICKLES = {("numpy", "ndarray"): "numpy.ndarray", ("numpy", "dtype"): _Type} | {
    (f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")
}  # of numpy 1 and 2


def read_cifar100(path: Path) -> Arrays:
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine labels, from the official archive or its unpacked folder.

    `path` is a .tar.gz or a folder, of the Python or the binary version. Archives are read in memory: nothing is
    unpacked to disk. Raises OSError naming a file that cannot be opened, UserError naming the files that were looked
    for, or one that is malformed.
    """
    unpacked = [name for name in _PYTHON_FILES + _BINARY_FILES if (path / name).is_file()]
    files = {name: _bounded(path / name) for name in unpacked} if path.is_dir() else _tar_files(path)
    for names, decode in ((_PYTHON_FILES, _decode_python), (_BINARY_FILES, _decode_binary)):
        if all(name in files for name in names):
            try:
                *splits, class_names = decode(*(files[name] for name in names))
                arrays = {"class_names": _names(class_names)}
                for split, (images, labels) in zip(("train", "test"), splits):
                    arrays |= {f"x_{split}": channels_last(images, f"data of {split}"), f"y_{split}": labels}
                return arrays
            except Exception as error:  # damaged pickles raise nearly anything
                raise UserError(f"{path} is not CIFAR-100 as published: {type(error).__name__}: {error}") from error
    raise UserError(
        f"{path} holds neither {', '.join(_PYTHON_FILES)} (Python version) nor {', '.join(_BINARY_FILES)} "
        f"(binary version) of CIFAR-100; of these it holds {', '.join(sorted(files)) or 'nothing'}"
    )


def _bounded(path: Path, opened: Callable = open) -> bytes:
    """All of a file. UserError if that is more than there is of CIFAR-100."""
    with opened(path, "rb") as file:
        content = file.read(_CIFAR_BYTES + 1)
    if len(content) > _CIFAR_BYTES:
        raise UserError(f"{path} holds more than the {_CIFAR_BYTES >> 20} MiB that CIFAR-100 may have")
    return content


def _tar_files(path: Path) -> dict[str, bytes]:
    with open(path, "rb") as file:
        packed = file.read(2) == b"\x1f\x8b"
    files = {}
    try:
        content = _bounded(path, gzip.open if packed else open)
        with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
            for member in tar:
                if not 0 <= member.size <= len(content):  # tarfile would read members again, or fill holes
                    raise ValueError(f"{member.name} cannot have {member.size} bytes")
                folder, _, name = member.name.removeprefix("./").partition("/")
                if member.isfile() and folder in _CIFAR_FOLDERS and name in _PYTHON_FILES + _BINARY_FILES:
                    files[name] = tar.extractfile(member).read()
    except UserError:
        raise
    except Exception as error:  # damaged archives raise nearly anything
        raise UserError(f"{path} cannot be read as a tar archive: {type(error).__name__}: {error}") from error
    return files


def _decode_python(*files: bytes) -> tuple:
    """(rows of images, labels) of training and test, names."""
    train, test, meta = (Unpickler(io.BytesIO(data), _CIFAR_PICKLES).load() for data in files)
    splits = ((part["data"].values(), _labels(part["fine_labels"])) for part in (train, test))
    return *splits, meta["fine_label_names"]


def _labels(values: Any) -> np.ndarray:
    """[N] from a list of numbers: in lists of lists a few bytes can describe any number of elements."""
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise UserError("fine_labels must be a list of whole numbers")
    return np.asarray(values)


def _names(values: Any) -> np.ndarray:
    """[C] text; the longest name decides how much memory each takes."""
    if (
        not isinstance(values, list)
        or len(values) > _CIFAR_CLASSES
        or not all(isinstance(value, str) and len(value) <= _CIFAR_NAME for value in values)
    ):
        raise UserError(f"fine_label_names must be a list of {_CIFAR_CLASSES} names")
    return np.asarray(values, str)


def _decode_binary(train: bytes, test: bytes, names: bytes) -> tuple:
    """The same. One record an image: coarse label, fine label, pixels."""
    records = (np.frombuffer(data, np.uint8).reshape(-1, 2 + _PIXELS) for data in (train, test))
    return *((rows[:, 2:], rows[:, 1]) for rows in records), names.decode().split()


def read_imagenet32(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Images [N,32,32,3] and labels int32 [N], 0..999, of a file of downsampled ImageNet (Chrabaszcz et al. 2017).

    Raises OSError if it cannot be opened, UserError naming it if it is malformed.
    """
    part = read_npz(path, ("data", "labels"), mapped=True)
    images, labels = channels_last(part["data"], f"{path}: data"), part["labels"]
    if labels.dtype.kind not in "iu" or labels.shape != images.shape[:1]:
        raise UserError(
            f"{path}: labels must be integers [{len(images)}], one per image; found {labels.dtype} {list(labels.shape)}"
        )
    if len(labels) and not 1 <= labels.min() <= labels.max() <= 1000:
        raise UserError(f"{path}: labels must lie in 1..1000; found {labels.min()}..{labels.max()}")
    return images, labels.astype(np.int32) - 1


def channels_last(rows: np.ndarray, name: str) -> np.ndarray:
    """[N,3072] rows stored channel by channel -> [N,32,32,3], a view. UserError naming `name` for another shape."""
    if rows.ndim != 2 or rows.shape[1] != _PIXELS:
        raise UserError(f"{name} must have shape [N,{_PIXELS}], found {list(rows.shape)}")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
