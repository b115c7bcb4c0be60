"""PyTorch state dicts and Flax variables: the same arrays under two sets of names, every one accounted for.

Each architecture declares its PyTorch names (`Architecture.names`). Convolutions are OIHW there and HWIO here, linear
kernels are transposed; all else is as it is.
"""
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from asib_jax.errors import UserError
from asib_jax.models.architecture import Architecture, Names

_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}  # else the same name
_OURS = ("distill_adapter", "residual_adapter")  # no foreign weights hold these
_COUNTER = "num_batches_tracked"  # of PyTorch's BatchNorm; nothing here needs it


class Imported(NamedTuple):
    """variables: {"params", "batch_stats"}; fresh: the leaves that kept their initial values, with both shapes."""

    variables: dict[str, Any]
    fresh: tuple[str, ...]


def import_weights(state_dict: Mapping[str, np.ndarray], variables: Mapping[str, Any], architecture: Architecture
                   ) -> Imported:
    """A PyTorch state dict, under any of the architecture's naming conventions, as the variables of its `KDModel`.

    variables: {"params": ..., "batch_stats": ...} of the model: its initial values, or their shapes alone. The leaves
        of our own adapters keep theirs. So do the classifier's where the class counts differ, and a kernel of the first
        stage that sees another window (`small_input`): `fresh` names them.

    Raises UserError, naming what is left, if a source key has no place in the model, a leaf has no source, or shapes
    differ elsewhere.
    """
    arrays = {key: value for key, value in state_dict.items() if key.rpartition(".")[2] != _COUNTER}
    target = {path: leaf for path, leaf in flatten_dict(variables, sep="/").items() if _owner(path) not in _OURS}
    conventions = [{_torch_name(path, names): path for path in target} for names in architecture.names]
    paths = max(conventions, key=lambda names: len(arrays.keys() & names.keys()))
    found = {paths[key]: _to_flax(value) for key, value in arrays.items() if key in paths}
    return _fit(found, variables, architecture, {path: key for key, path in paths.items()},
                [key for key in arrays if key not in paths])


def fit_variables(stored: Mapping[str, Any], variables: Mapping[str, Any], architecture: Architecture) -> Imported:
    """The same for variables of our own, e.g. of a checkpoint; an adapter of theirs is left out."""
    target = flatten_dict(variables, sep="/")
    found = {path: leaf for path, leaf in flatten_dict(stored, sep="/").items() if _owner(path) not in _OURS}
    return _fit({path: leaf for path, leaf in found.items() if path in target}, variables, architecture,
                {path: path for path in found}, [path for path in found if path not in target])


def _fit(found: Mapping[str, np.ndarray], variables: Mapping[str, Any], architecture: Architecture,
         source_names: Mapping[str, str], unmatched: list[str]) -> Imported:
    """`found` arrays, by our paths, in the place of `variables`; everything left over is an error."""
    target = flatten_dict(variables, sep="/")
    imported, fresh, shapes = {}, [], []
    for path, value in found.items():
        difference = f"{source_names[path]} {value.shape}, the model's {path} {target[path].shape}"
        if value.shape == target[path].shape:
            imported[path] = jnp.asarray(value, target[path].dtype)
        elif _may_differ(path, value.shape, target[path].shape, architecture.stages[0][0]):
            fresh.append(difference)
        else:
            shapes.append(difference)
    unfilled = [path for path in target if path not in found and _owner(path) not in _OURS]
    if unmatched or unfilled or shapes:
        raise UserError("the weights do not fit the model"
                         + _listing("source keys without a place in the model", unmatched)
                         + _listing("model leaves without a source", unfilled)
                         + _listing("different shapes", shapes))
    return Imported({"batch_stats": {}, **unflatten_dict(target | imported, sep="/")}, tuple(fresh))


def export_weights(variables: Mapping[str, Any], architecture: Architecture) -> dict[str, np.ndarray]:
    """The inverse, under the architecture's first naming convention, with BatchNorm's step counters at 0.

    A distillation adapter is left out: no logit depends on it. Raises UserError for a residual adapter, which the
    PyTorch network does not have.
    """
    if "residual_adapter" in variables["params"]:
        raise UserError("the network has a residual adapter (model.student.use_adapter), which its PyTorch "
                         "counterpart has not")
    state = {}
    for path, leaf in flatten_dict(variables, sep="/").items():
        if _owner(path) in _OURS:
            continue
        name = _torch_name(path, architecture.names[0])
        state[name] = _to_torch(np.asarray(leaf))
        if path.endswith("/mean"):
            state[f"{name.rpartition('.')[0]}.{_COUNTER}"] = np.zeros((), np.int64)
    return state


def _owner(path: str) -> str:
    """The stage or head a path such as params/layer1/block0/bn1/scale belongs to."""
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


def _may_differ(path: str, source: tuple[int, ...], target: tuple[int, ...], first_stage: str) -> bool:
    """Whether other shapes are no mistake: another class count, or another window of the first stage's convolution."""
    if _owner(path) == "classifier":
        return source[:-1] == target[:-1]
    return _owner(path) == first_stage and len(source) == 4 and source[2:] == target[2:]


def _listing(title: str, names: list[str]) -> str:
    """A paragraph of the first ten names and how many more there are; empty without any."""
    if not names:
        return ""
    more = [f"... and {len(names) - 10} more"] if len(names) > 10 else []
    return "\n  ".join([f"\n{title} ({len(names)}):", *names[:10], *more])
