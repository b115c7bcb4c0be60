"""Given weights in a network's place, every array accounted for: PyTorch's, or those of a checkpoint of ours."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from asib_jax.errors import UserError
from asib_jax.models.kd_model import KDModel, stage_names
from asib_jax.models.layers import Architecture
from asib_jax.weights import checkpoint, origins, torch_names
from asib_jax.weights.torch_names import ADAPTERS, owner

# Data sets that number their classes otherwise than published classifiers, which have them in the order of their
# synsets. ImageNet-32 (Chrabaszcz et al. 2017) has that of the ILSVRC development kit.
OTHER_ORDER = {"imagenet32"}

_LARGEST = float(np.finfo(np.float16).max)  # of a parameter: the narrowest type that networks compute in


class Imported(NamedTuple):
    """variables: {"params", "batch_stats"}; fresh: why, by the path of every leaf that kept its initial values."""

    variables: dict[str, Any]
    fresh: dict[str, str]

    def random_stem(self, model: KDModel) -> str:
        """Why the first stage starts at random, where it does: then BatchNorm's statistics fit nothing any more."""
        return "; ".join(why for path, why in self.fresh.items() if owner(path) == stage_names(model)[0])


def read_weights(
    given: str, key: str, model: KDModel, variables: dict, level: int = -1, *, sha256: str, dataset: str = ""
) -> Imported:
    """`variables` of `model` with given weights (see `origins`; `key` holds them) in their place.

    Of a checkpoint of a finished run its best student. level: the freeze level that the network trains at first.
    sha256: the digest that the weights must have; "": any. dataset: the name of the data set whose classes `model` is
    to tell apart; where it numbers them otherwise than published weights, a file's classifier is left out. "": it is
    taken as it is.

    Raises UserError, with key and path, for what cannot be read, does not fit or is broken (the errors of `origins`,
    `checkpoint` and below), or if a stem that starts at random would stand still.
    """
    path = origins.locate(given, key, sha256)
    try:
        if path.is_dir():
            imported = fit_variables(_one_network(checkpoint.restore(path)), variables, model.architecture)
        else:
            imported = import_weights(origins.load(path), variables, model.architecture)
            if dataset in OTHER_ORDER:
                imported = _without_classifier(imported, variables, dataset)
    except (UserError, OSError) as error:
        raise UserError(f"{key}={given!r}: {error}") from error
    random = imported.random_stem(model)
    if random and 0 <= level < len(stage_names(model)):
        raise UserError(
            f"{key}={given!r}: {random}. It starts at random and would stay so at freeze level {level}; "
            "train all stages first (-1)"
        )
    return imported


def import_weights(
    state_dict: Mapping[str, np.ndarray], variables: Mapping[str, Any], architecture: Architecture
) -> Imported:
    """A PyTorch state dict, under any of the architecture's naming conventions, as the variables of its `KDModel`.

    variables: {"params": ..., "batch_stats": ...} of the model: its initial values, or their shapes alone. The leaves
        of our own adapters keep theirs. So do the classifier's where the class counts differ, and a kernel of the first
        stage that sees another window (`small_input`): `fresh` names them.

    Raises UserError, naming what is left, if a source key has no place in the model, a leaf has no source, or shapes
    differ elsewhere; or naming the arrays that hold what no training leaves (`_fault`).
    """
    found, keys, unmatched = torch_names.to_ours(state_dict, flatten_dict(variables, sep="/"), architecture)
    return _fit(found, variables, architecture, keys, unmatched)


def fit_variables(stored: Mapping[str, Any], variables: Mapping[str, Any], architecture: Architecture) -> Imported:
    """The same for variables of our own, e.g. of a checkpoint; an adapter of theirs is left out."""
    target = flatten_dict(variables, sep="/")
    found = {path: leaf for path, leaf in flatten_dict(stored, sep="/").items() if owner(path) not in ADAPTERS}
    return _fit(
        {path: leaf for path, leaf in found.items() if path in target},
        variables,
        architecture,
        {path: path for path in found},
        [path for path in found if path not in target],
    )


def _fit(
    found: Mapping[str, np.ndarray],
    variables: Mapping[str, Any],
    architecture: Architecture,
    source_names: Mapping[str, str],
    unmatched: list[str],
) -> Imported:
    """`found` arrays, by our paths, in the place of `variables`; what is left over or broken is an error."""
    target = flatten_dict(variables, sep="/")
    imported, fresh, shapes, broken = {}, {}, [], []
    for path, value in found.items():
        if fault := _fault(path, np.asarray(value)):
            broken.append(f"{source_names[path]}, the model's {path}: {fault}")
            continue
        difference = f"{source_names[path]} {value.shape}, the model's {path} {target[path].shape}"
        if value.shape == target[path].shape:
            imported[path] = jnp.asarray(value, target[path].dtype)
        elif _may_differ(path, value.shape, target[path].shape, architecture.stages[0][0]):
            fresh[path] = difference
        else:
            shapes.append(difference)
    unfilled = [path for path in target if path not in found and owner(path) not in ADAPTERS]
    if unmatched or unfilled or shapes:
        raise UserError(
            "the weights do not fit the model"
            + _listing("source keys without a place in the model", unmatched)
            + _listing("model leaves without a source", unfilled)
            + _listing("different shapes", shapes)
        )
    if broken:
        raise UserError(f"the weights are broken{_listing('arrays that no training leaves', broken)}")
    return Imported({"batch_stats": {}, **unflatten_dict(target | imported, sep="/")}, fresh)


def _fault(path: str, value: np.ndarray) -> str:
    """Why no network can have this array, which need not show in what it computes; "": it can.

    Numbers are floating-point, and finite in float32, too; parameters in float16, which a network may compute in, and
    which no trained one exceeds. A statistic may be as large as float32, but no variance is negative.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        return f"its type is {value.dtype}, not one of floating-point numbers"
    with np.errstate(over="ignore"):
        numbers = value.astype(np.float32, copy=False)
    low, high = numbers.min(initial=0), numbers.max(initial=0)
    if not (np.isfinite(low) and np.isfinite(high)):
        return f"{np.sum(~np.isfinite(numbers))} of {numbers.size} numbers are not finite"
    if path.startswith("params/") and max(-low, high) > _LARGEST:
        return f"it holds {low if -low > high else high:g}, beyond float16's {_LARGEST:g}"
    return f"it holds a variance of {low:g}" if path.endswith("/var") and low < 0 else ""


def _may_differ(path: str, source: tuple[int, ...], target: tuple[int, ...], first_stage: str) -> bool:
    """Whether other shapes are no mistake: another class count, or another window of the first stage's convolution."""
    if owner(path) == "classifier":
        return source[:-1] == target[:-1]
    return owner(path) == first_stage and len(source) == 4 and source[2:] == target[2:]


def _listing(title: str, names: list[str]) -> str:
    """A paragraph of the first ten names and how many more there are; empty without any."""
    if not names:
        return ""
    more = [f"... and {len(names) - 10} more"] if len(names) > 10 else []
    return "\n  ".join([f"\n{title} ({len(names)}):", *names[:10], *more])


def _without_classifier(imported: Imported, variables: dict[str, Any], dataset: str) -> Imported:
    initial = variables["params"]["classifier"]
    why = f"the classes of {dataset} have another order than published weights', a checkpoint of ours has the right one"
    fresh = imported.fresh | {f"params/classifier/{leaf}": f"classifier {leaf}: {why}" for leaf in initial}
    params = imported.variables["params"] | {"classifier": initial}
    return Imported(imported.variables | {"params": params}, fresh)


def _one_network(stored: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint the variables of its only network, or of the best student. UserError if there is neither."""
    if "params" not in stored and "best" not in stored.get("students", {}):
        raise UserError(
            "it is no checkpoint of one network, nor of a run with a student; kept teachers are "
            "results_dir/teachers/NAME/checkpoint"
        )
    return stored if "params" in stored else stored["students"]["best"]
