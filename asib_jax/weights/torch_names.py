"""PyTorch state dicts and Flax variables: the same arrays under two sets of names.

Each architecture declares its PyTorch names (`Architecture.names`). Convolutions are OIHW there and HWIO here, linear
kernels are transposed; all else is as it is.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flax.traverse_util import flatten_dict

from asib_jax.errors import UserError
from asib_jax.models.layers import Architecture, Names

ADAPTERS = ("distill_adapter", "residual_adapter")  # our own: no foreign weights hold these

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}  # else the same name
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm; nothing here needs it


def to_ours(
    state_dict: Mapping[str, np.ndarray], paths: Iterable[str], architecture: Architecture
) -> tuple[dict[str, np.ndarray], dict[str, str], list[str]]:
    """Of a state dict, under the convention that most of its keys follow: the arrays as Flax has them, by path; each
    path's key, there or not; the keys that no path has.

    paths: of all leaves of the network, e.g. params/layer1/block0/bn1/scale.
    """
    arrays = {key: value for key, value in state_dict.items() if key.rpartition(".")[2] != _COUNTER}
    own = [path for path in paths if owner(path) not in ADAPTERS]
    conventions = [{_torch_name(path, names): path for path in own} for names in architecture.names]
    chosen = max(conventions, key=lambda names: len(arrays.keys() & names.keys()))
    return (
        {chosen[key]: _to_flax(value) for key, value in arrays.items() if key in chosen},
        {path: key for key, path in chosen.items()},
        [key for key in arrays if key not in chosen],
    )


def export_weights(variables: Mapping[str, Any], architecture: Architecture) -> dict[str, np.ndarray]:
    """The inverse, under the architecture's first naming convention, with BatchNorm's step counters at 0.

    A distillation adapter is left out: no logit depends on it. Raises UserError for a residual adapter, which the
    PyTorch network does not have.
    """
    if "residual_adapter" in variables["params"]:
        raise UserError(
            "the network has a residual adapter (model.student.use_adapter), which its PyTorch counterpart has not"
        )
    state = {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        if owner(path) in ADAPTERS:
            continue
        name = _torch_name(path, architecture.names[0])
        state[name] = _to_torch(np.asarray(leaf))
        if path.endswith("/mean"):
            state[f"{name.rpartition('.')[0]}.{_COUNTER}"] = np.zeros((), np.int64)
    return state


def owner(path: str) -> str:
    """The stage or head that a path such as params/layer1/block0/bn1/scale belongs to."""
    return path.split("/")[1]


def _torch_name(path: str, names: Names) -> str:
    """PyTorch's name of one of our leaves, e.g. params/layer1/block0/bn2/scale -> layer1.0.bn2.weight."""
    _, _, path = path.partition("/")  # params or batch_stats
    module, _, leaf = path.rpartition("/")
    for pattern, replacement in names:
        if match := re.fullmatch(pattern, module):
            name = replacement(match) if callable(replacement) else match.expand(replacement)
            return f"{name}.{_LEAVES.get(leaf, leaf)}"
    raise LookupError(f"no naming rule of the architecture matches {module!r}")


def _to_flax(value: np.ndarray) -> np.ndarray:
    return value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T


def _to_torch(value: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T)
