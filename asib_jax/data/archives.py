"""Readers of data files that somebody else wrote. None of them runs code from a file."""
import io
import math
import pickle
import struct
import tarfile
import zipfile
import zlib
from pathlib import Path

import numpy as np

from asib_jax.errors import UserError

Arrays = dict[str, np.ndarray]
Found = tuple[Arrays, str]  # what a source gives: NAMES (and perhaps class_names), and in words what was read
NAMES = ("x_train", "y_train", "x_test", "y_test")

_PYTHON_FILES = ("train", "test", "meta")  # of cifar-100-python, pickles written by Python 2
_BINARY_FILES = ("train.bin", "test.bin", "fine_label_names.txt")  # of cifar-100-binary
_CIFAR_FOLDERS = ("cifar-100-python", "cifar-100-binary")
_PIXELS = 3 * 32 * 32  # one image, stored channel by channel
_MAP_BYTES = 64 << 20  # from this size on images stay in their file where they can


def read_npz(path: Path, required: tuple[str, ...], optional: tuple[str, ...] = ()) -> Arrays:
    """The named arrays of an .npz file; optional ones only if they are there. Pickled (object) arrays are refused.

    Large uint8 arrays that are not compressed (np.savez) are mapped, read-only: pages come from the file as they are
    used and no checksum is compared, so the file must stay as it is.

    Raises UserError naming the file and the array that is missing or cannot be read.
    """
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not an .npz file, or is cut short")
    with np.load(path, allow_pickle=False) as file:
        missing = [name for name in required if name not in file.files]
        if missing:
            raise UserError(f"{path} lacks the arrays {', '.join(missing)}; it holds {', '.join(file.files)}")
        members = {member.filename.removesuffix(".npy"): member for member in file.zip.infolist()}
        arrays = {}
        for name in (name for name in (*required, *optional) if name in members):
            try:
                mapped = _map(path, file.zip, members[name])
                arrays[name] = file[name] if mapped is None else mapped
            except (ValueError, OSError, EOFError, zipfile.BadZipFile, zlib.error) as error:
                raise UserError(f"{path}: array {name} cannot be read (pickles are refused): {error}") from error
    return arrays


def _map(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> np.ndarray | None:
    """An uncompressed uint8 array of at least `_MAP_BYTES`, where it lies in the file; None for any other."""
    if member.compress_type != zipfile.ZIP_STORED or member.file_size < _MAP_BYTES:
        return None
    with archive.open(member) as stream:  # which compares the member's own header with the archive's directory
        if np.lib.format.read_magic(stream) != (1, 0):  # numpy writes later versions for structured arrays only
            return None
        shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
        header = stream.tell()
    if dtype != np.uint8 or fortran_order:
        return None
    if header + math.prod(shape) != member.file_size:
        raise ValueError(f"its shape {list(shape)} does not fit the {member.file_size - header} bytes it has")
    with open(path, "rb") as file:
        file.seek(member.header_offset + 26)  # the 30 bytes before a member's name end with two lengths
        name, extra = struct.unpack("<HH", file.read(4))
    start = member.header_offset + 30 + name + extra + header
    return np.asarray(np.memmap(path, np.uint8, "r", start, shape))  # which checks the end of the file


class _ArrayUnpickler(pickle.Unpickler):
    """Unpickles lists, dicts, text, numbers and numpy arrays; whatever names another function or class is refused."""

    _ALLOWED = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # One function under the names of numpy 1 and numpy 2, taken from an array so as to import neither.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
    }

    def find_class(self, module: str, name: str):
        if (module, name) not in self._ALLOWED:
            raise pickle.UnpicklingError(f"{module}.{name} is not allowed in a CIFAR file")
        return self._ALLOWED[module, name]


def unpickle_arrays(data: bytes):
    """The object of a CIFAR pickle. Raises pickle.UnpicklingError on anything but arrays and plain containers."""
    return _ArrayUnpickler(io.BytesIO(data), encoding="latin1").load()  # latin1: how numpy reads Python 2 pickles


def read_cifar100(path: Path) -> Arrays:
    """CIFAR-100 (Krizhevsky 2009) with its 100 fine labels, from the official archive or its unpacked folder.

    `path` is a .tar.gz or a folder, of the Python or the binary version. Archives are read in memory: nothing is
    unpacked to disk. Raises UserError naming the files that were looked for, or one that is malformed.
    """
    files = _folder_files(path) if path.is_dir() else _tar_files(path)
    for names, decode in ((_PYTHON_FILES, _decode_python), (_BINARY_FILES, _decode_binary)):
        if all(name in files for name in names):
            try:
                return decode(*(files[name] for name in names))
            except (pickle.UnpicklingError, LookupError, TypeError, ValueError, EOFError) as error:
                raise UserError(f"{path} is not CIFAR-100 as published: {type(error).__name__}: {error}") from error
    raise UserError(
        f"{path} holds neither {', '.join(_PYTHON_FILES)} (Python version) nor {', '.join(_BINARY_FILES)} "
        f"(binary version) of CIFAR-100; of these it holds {', '.join(sorted(files)) or 'nothing'}"
    )


def _folder_files(path: Path) -> dict[str, bytes]:
    return {name: (path / name).read_bytes() for name in _PYTHON_FILES + _BINARY_FILES if (path / name).is_file()}


def _tar_files(path: Path) -> dict[str, bytes]:
    files = {}
    try:
        with tarfile.open(path) as tar:
            for member in tar:
                folder, _, name = member.name.removeprefix("./").partition("/")
                if member.isfile() and folder in _CIFAR_FOLDERS and name in _PYTHON_FILES + _BINARY_FILES:
                    files[name] = tar.extractfile(member).read()
    except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as a tar archive: {error}") from error
    return files


def _decode_python(train: bytes, test: bytes, meta: bytes) -> Arrays:
    train, test, meta = (unpickle_arrays(data) for data in (train, test, meta))
    return {
        "x_train": channels_last(np.asarray(train["data"]), "data of train"),
        "y_train": np.asarray(train["fine_labels"]),
        "x_test": channels_last(np.asarray(test["data"]), "data of test"),
        "y_test": np.asarray(test["fine_labels"]),
        "class_names": np.asarray(meta["fine_label_names"]),
    }


def _decode_binary(train: bytes, test: bytes, names: bytes) -> Arrays:
    # One record an image: coarse label, fine label, pixels.
    train, test = (np.frombuffer(data, np.uint8).reshape(-1, 2 + _PIXELS) for data in (train, test))
    return {
        "x_train": channels_last(train[:, 2:], "train.bin"),
        "y_train": train[:, 1],
        "x_test": channels_last(test[:, 2:], "test.bin"),
        "y_test": test[:, 1],
        "class_names": np.asarray(names.decode().split()),
    }


def channels_last(rows: np.ndarray, name: str) -> np.ndarray:
    """[N,3072] rows stored channel by channel -> [N,32,32,3], a view.

    Raises UserError with `name` and the shape found.
    """
    if rows.ndim != 2 or rows.shape[1] != _PIXELS:
        raise UserError(f"{name} must have shape [N,{_PIXELS}], found {list(rows.shape)}")
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
