"""State dicts that PyTorch saved, as numpy arrays: torch is not needed, and nothing a file asks for is run.

Both formats of torch.save (PyTorch, torch/serialization.py). Since 1.6 a zip archive: NAME/data.pkl describes the
tensors, NAME/data/KEY is the storage they are views of. Before that a stream of pickles, then the storages.
"""

import io
import math
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import ml_dtypes
import numpy as np

from asib_jax.data.archives import check_unpacked, open_zip
from asib_jax.data.plain_pickle import Dictionary, Unpickler
from asib_jax.errors import UserError

_MAGIC, _PROTOCOL = 0x1950A86A20F9469CFC6C, 1001  # how a stream of pickles begins
_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in (
        ("FloatStorage", np.float32),
        ("DoubleStorage", np.float64),
        ("HalfStorage", np.float16),
        ("BFloat16Storage", ml_dtypes.bfloat16),
        ("LongStorage", np.int64),
        ("IntStorage", np.int32),
        ("ShortStorage", np.int16),
        ("CharStorage", np.int8),
        ("ByteStorage", np.uint8),
        ("BoolStorage", np.bool_),
    )
}
_MOST_AXES = 32
_WRAPPERS = ("state_dict", "model")  # what a checkpoint calls the state dict in it

_CONVERT = """import torch, safetensors.torch
safetensors.torch.save_file(torch.load({source!r}, map_location="cpu", weights_only=True), {target!r})"""


class _Tensor(NamedTuple):
    """A view of the storage `key`; offset and stride count elements."""

    key: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


def _rebuild_tensor(key: str, offset: int, size: tuple, stride: tuple, requires_grad: Any, hooks: Any) -> _Tensor:
    """A tensor with PyTorch's lazy negation or conjugation has a seventh argument, which fails."""
    if len(size) > _MOST_AXES or len(size) != len(stride):  # first: a pickle may give long ones often
        raise ValueError(f"a tensor has {len(size)} sizes and {len(stride)} strides")
    numbers = (offset, *size, *stride)
    if not isinstance(key, str) or not all(isinstance(number, int) and 0 <= number < 2**63 for number in numbers):
        raise ValueError("a tensor's offset, sizes and strides in a storage are not whole numbers from 0 on")
    return _Tensor(key, offset, size, stride)


_NAMES = {("torch", name): name for name in _DTYPES} | {
    ("collections", "OrderedDict"): Dictionary,
    ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
    ("torch._utils", "_rebuild_parameter"): lambda tensor, requires_grad, hooks: tensor,
}


class _Unpickler(Unpickler):
    """Unpickles plain containers, text, numbers and `_Tensor`s; whatever names another function or class is refused.

    storages: key -> (type, number of elements) of the storages the tensors lie in.
    """

    def __init__(self, file: io.BytesIO):
        super().__init__(file, _NAMES)
        self.storages: dict[str, tuple[np.dtype, int]] = {}

    def persistent_load(self, pid: Any) -> str:
        """A reference to a storage -> its key. Storages that are views of others are of before PyTorch 0.4."""
        kind, dtype, key, _, numel, *view = pid
        if not isinstance(dtype, str) or not isinstance(key, str) or not isinstance(numel, int):
            raise ValueError("a reference to a storage is not of text and numbers")
        storage = (_DTYPES[dtype], numel)
        if kind != "storage" or view not in ([], [None]) or self.storages.setdefault(key, storage) != storage:
            raise ValueError(f"reference {key} is not one to a storage of {numel} elements {dtype}")
        return key


def read(path: str | Path) -> dict[str, np.ndarray]:
    """The state dict in a file that torch.save wrote: name -> read-only array of the type it was saved in.

    Names are as saved, save for the prefixes "module." (DataParallel) and "_orig_mod." (torch.compile) where every name
    has them. A checkpoint that holds its state dict under exactly one of the keys "state_dict" and "model" gives that,
    and its other entries are ignored.

    Raises OSError where the file cannot be opened, UserError where it is damaged, holds something else than tensors, or
    names a function or class that weights do not need; the message tells how to convert it.
    """
    path = Path(path)
    with open(path, "rb") as file:
        try:
            zipped = file.read(4) == b"PK\x03\x04"
            file.seek(0)
            saved, storages = _read_zip(file) if zipped else _read_stream(file.read())
            return {name: _view(tensor, storages[tensor.key]) for name, tensor in _state_dict(saved).items()}
        except Exception as error:  # damaged pickles and archives raise nearly anything
            convert = _CONVERT.format(source=str(path), target=str(path.with_suffix(".safetensors")))
            raise UserError(
                f"not a state dict by torch.save, or not all of it: {type(error).__name__}: {error}\n"
                "If PyTorch can read it, which with weights_only=True runs no code either, convert it with"
                f"\n{convert}"
            ) from error


def _read_zip(file: BinaryIO) -> tuple[Any, dict[str, np.ndarray]]:
    with open_zip(file) as archive:
        names = archive.namelist()
        roots = [name.removesuffix("data.pkl") for name in names if name.partition("/")[2] == "data.pkl"]
        if len(roots) != 1:
            raise ValueError(f"it holds {len(roots)} files NAME/data.pkl")
        root = roots[0]
        unpickler = _Unpickler(io.BytesIO(archive.read(f"{root}data.pkl")))
        saved = unpickler.load()
        storages = {
            key: _storage(archive.read(f"{root}data/{key}"), *storage) for key, storage in unpickler.storages.items()
        }
        if f"{root}byteorder" in names and archive.read(f"{root}byteorder") != b"little":
            storages = {key: storage.byteswap() for key, storage in storages.items()}
    return saved, storages


def _read_stream(content: bytes) -> tuple[Any, dict[str, np.ndarray]]:
    file = io.BytesIO(content)
    if (_Unpickler(file).load(), _Unpickler(file).load()) != (_MAGIC, _PROTOCOL):
        raise ValueError("it does not begin as one")
    _Unpickler(file).load()  # about the machine that wrote it; the storages are little-endian on any
    unpickler = _Unpickler(file)
    saved = unpickler.load()
    storages = {}
    for key in _Unpickler(file).load():
        if not isinstance(key, str):
            raise ValueError(f"a {type(key).__name__} is no reference to a storage")
        dtype, numel = unpickler.storages[key]
        if int.from_bytes(file.read(8), "little") != numel:
            raise ValueError(f"storage {key} is not of {numel} elements")
        storages[key] = np.frombuffer(content, dtype, numel, file.tell())
        file.seek(storages[key].nbytes, io.SEEK_CUR)
    return saved, storages


def _storage(content: bytes, dtype: np.dtype, numel: int) -> np.ndarray:
    if len(content) != numel * dtype.itemsize:
        raise ValueError(f"a storage of {numel} {dtype} has {len(content)} bytes")
    return np.frombuffer(content, dtype)


def _state_dict(saved: Any) -> dict[str, _Tensor]:
    if isinstance(saved, dict):
        wrapped = [saved[key] for key in _WRAPPERS if isinstance(saved.get(key), dict)]
        saved = wrapped[0] if len(wrapped) == 1 else saved
    if not isinstance(saved, dict):
        raise ValueError(f"it holds a {type(saved).__name__}, not a state dict")
    for name, value in saved.items():
        if not isinstance(name, str) or not isinstance(value, _Tensor):
            raise ValueError(f"{name!r} is a {type(value).__name__}, not a tensor")
    for prefix in ("_orig_mod.", "module.", "_orig_mod."):  # of torch.compile, around or within DataParallel
        if all(name.startswith(prefix) for name in saved):
            saved = {name.removeprefix(prefix): tensor for name, tensor in saved.items()}
    return saved


def _view(tensor: _Tensor, storage: np.ndarray) -> np.ndarray:
    _, offset, size, stride = tensor
    last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
    # In Python's integers: numpy checks bounds too, but lets through strides whose products overflow.
    if 0 not in size and last >= storage.size:
        raise ValueError(f"a tensor of {list(size)} reaches outside its storage of {storage.size}")
    check_unpacked(math.prod(size) * storage.itemsize, storage.nbytes)  # a stride of 0 repeats elements
    return np.lib.stride_tricks.as_strided(
        storage[offset:], size, [step * storage.itemsize for step in stride], writeable=False
    )
