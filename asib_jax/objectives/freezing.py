"""Partial freezing (SPEC 6): from a freeze level and the stages a model declares to the leaves an optimiser holds.

Trainable leaves are split off the tree of parameters and put back inside the loss. The optimiser never sees a frozen
leaf, so there is no update, decay, moment or gradient to mask.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from flax import serialization
from flax.traverse_util import flatten_dict, unflatten_dict

from asib_jax.errors import UserError

Tree = Mapping[str, Any]


def frozen_stages(level: int, num_stages: int, key: str) -> int:
    """How many leading stages stand still: none at level -1, all but the last `level` at levels 0 to num_stages.

    Raises:
        UserError: the level is out of range; the message names the config key `key`.
    """
    if not -1 <= level <= num_stages:
        raise UserError(f"{key}={level}: choose -1 (nothing frozen) or 0 to {num_stages}, the last stages that train")
    return 0 if level == -1 else num_stages - level


def level_for_stage(levels: Sequence[int], stage: int) -> int:
    """The freeze level of a training stage (from 0): `levels` holds one for all of them or one for each."""
    return levels[0] if len(levels) == 1 else levels[stage]


def trainable(params: Tree, model_stage_names: Sequence[str], level: int, freeze_bn: bool = False) -> dict:
    """Mask over one model's parameters (nested like them): true where a leaf trains at this freeze level.

    What is no stage (classifier, adapters and the normalisation after pooling) trains at every level. `freeze_bn` also
    freezes every normalisation layer that would train; Flax gives them, and only them, a parameter called `scale`.

    Raises:
        UserError: the level is out of range, or a declared stage has no parameters (a stale declaration would freeze
            nothing).
    """
    missing = [name for name in model_stage_names if name not in params]
    if missing:
        raise ValueError(f"stages {missing} are not among the parameters {sorted(params)}")
    frozen = model_stage_names[: frozen_stages(level, len(model_stage_names), "freeze_level")]
    leaves = flatten_dict(params)

    def trains(path: tuple[str, ...]) -> bool:
        normalisation = (*path[:-1], "scale") in leaves
        return path[0] not in frozen and not (freeze_bn and normalisation)

    return unflatten_dict({path: trains(path) for path in leaves})


def split(tree: Tree, mask: Any) -> tuple[dict, dict]:
    """The leaves of nested dicts where `mask` is true and those where it is false, as two sparser nested dicts.

    The mask may stop early: {"student": True, "teacher1": {"layer4": True, ...}} decides on whole branches.
    """
    keep = flatten_dict(jax.tree.broadcast(mask, tree))
    leaves = flatten_dict(tree)
    return (
        unflatten_dict({path: leaf for path, leaf in leaves.items() if keep[path]}),
        unflatten_dict({path: leaf for path, leaf in leaves.items() if not keep[path]}),
    )


def merge(a: Tree, b: Tree) -> dict:
    """The inverse of `split`. Raises ValueError if a leaf is in both."""
    left, right = flatten_dict(a), flatten_dict(b)
    if overlap := sorted("/".join(path) for path in left.keys() & right.keys()):
        raise ValueError(f"leaves in both trees: {', '.join(overlap)}")
    return unflatten_dict(left | right)


def carry(old: Any, new: Any) -> Any:
    """The optimiser state `new`, with every leaf whose path and shape also occur in `old` taken from there.

    old: such a state, or the nested dicts that a checkpoint makes of it (`flax.serialization.to_state_dict`).

    After the set of trainable parameters has changed, those that stay keep their moments and the step count goes on.
    It is shared, so Adam no longer corrects the zero moments of a leaf that joins late: its first step is
    (1 - b1) / sqrt(1 - b2), with the usual constants 3.2, times as long.
    """
    before, fresh = (flatten_dict(serialization.to_state_dict(state), keep_empty_nodes=True) for state in (old, new))
    kept = {
        path: before[path] if path in before and np.shape(before[path]) == np.shape(leaf) else leaf
        for path, leaf in fresh.items()
    }
    return serialization.from_state_dict(new, unflatten_dict(kept))
