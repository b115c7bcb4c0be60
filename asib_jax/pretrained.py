"""PyTorch's ResNet weights into Flax variables, with every name on both sides accounted for."""
import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file

# PyTorch's module name -> ours. "shortcut" and "linear" are the names of common CIFAR ResNets.
_MODULES = (
    (r"conv1", r"stem/conv"),
    (r"bn1", r"stem/bn"),
    (r"(layer\d+)\.(\d+)\.((?:conv|bn)\d)", r"\1/block\2/\3"),
    (r"(layer\d+)\.(\d+)\.(?:downsample|shortcut)\.0", r"\1/block\2/downsample_conv"),
    (r"(layer\d+)\.(\d+)\.(?:downsample|shortcut)\.1", r"\1/block\2/downsample_bn"),
    (r"fc|linear", r"classifier"),
)
_LEAVES = {"bias": "params/{}/bias", "running_mean": "batch_stats/{}/mean", "running_var": "batch_stats/{}/var"}
_OURS = ("distill_adapter", "residual_adapter")  # no foreign weights hold these

_CONVERT = """import torch, safetensors.torch
safetensors.torch.save_file(torch.load({source!r}, map_location="cpu", weights_only=True), {target!r})"""


def load_weights(path: str | Path) -> dict[str, np.ndarray]:
    """Named arrays of a .safetensors or .npz file; neither can hold code.

    Raises ValueError for any other kind; for PyTorch's own .pth and .pt, pickles that can, it says how to convert.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    message = f"cannot read weights from {path}: expected .safetensors or .npz"
    if path.suffix in (".pth", ".pt"):
        convert = _CONVERT.format(source=str(path), target=str(path.with_suffix(".safetensors")))
        message += f"; a {path.suffix} file is a pickle and may run code. Convert a state dict once with\n{convert}"
    raise ValueError(message)


def import_weights(state_dict: Mapping[str, np.ndarray], variables: Mapping[str, Any]) -> dict[str, Any]:
    """A PyTorch ResNet's state dict (torchvision's names or common CIFAR ones) as the variables of a `KDModel`.

    Convolutions OIHW -> HWIO, linear kernels transposed, running statistics to batch_stats; the rest as it is.
    variables: {"params": ..., "batch_stats": ...} of the model, for names, shapes and types; only the leaves of our
        own adapters keep their values.

    Raises ValueError if the class counts differ, and naming what is left if a source key has no place, a leaf has
    no source or shapes differ (`num_batches_tracked`, PyTorch's step counter, is ignored).
    """
    target = flatten_dict(variables, sep="/")
    imported, unmatched, shapes = {}, [], []
    for key, value in state_dict.items():
        if key.endswith("num_batches_tracked"):
            continue
        path = _target_path(key, value.ndim)
        if path not in target or path in imported:
            unmatched.append(key)
            continue
        value = _transposed(value)
        imported[path] = jnp.asarray(value, target[path].dtype)
        if value.shape != target[path].shape:
            shapes.append(f"{key} {value.shape}, the model's {path} {target[path].shape}")
    _check_class_count(imported, target)
    unfilled = [path for path in target if path not in imported and path.split("/")[1] not in _OURS]
    if unmatched or unfilled or shapes:
        raise ValueError("the weights do not fit the model"
                         + _listing("source keys without a place in the model", unmatched)
                         + _listing("model leaves without a source", unfilled)
                         + _listing("different shapes", shapes))
    return unflatten_dict(target | imported, sep="/")


def digest(path: str | Path) -> str:
    """SHA-256 of the file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _target_path(key: str, ndim: int) -> str | None:
    """Our path of a PyTorch key, e.g. layer1.0.bn2.weight -> params/layer1/block0/bn2/scale; None if no rule fits."""
    module, _, leaf = key.rpartition(".")
    leaves = _LEAVES | {"weight": "params/{}/scale" if ndim == 1 else "params/{}/kernel"}
    for pattern, ours in _MODULES:
        match = re.fullmatch(pattern, module)
        if match and leaf in leaves:
            return leaves[leaf].format(match.expand(ours))
    return None


def _transposed(value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _check_class_count(imported: Mapping[str, Any], target: Mapping[str, Any]) -> None:
    path = "params/classifier/bias"
    if path in imported and imported[path].shape != target[path].shape:
        raise ValueError(f"the weights classify {imported[path].shape[0]} classes, the model {target[path].shape[0]}: "
                         "take weights fitted to the classes of dataset.name (teacherK.weights, model.student.weights)")


def _listing(title: str, names: list[str]) -> str:
    """A paragraph of the first ten names and how many more there are; empty without any."""
    if not names:
        return ""
    more = [f"... and {len(names) - 10} more"] if len(names) > 10 else []
    return "\n  ".join([f"\n{title} ({len(names)}):", *names[:10], *more])
