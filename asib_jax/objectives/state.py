"""What a step trains (SPEC 4 to 6), split off from what stands still and joined to it again.

An optimizer holds exactly the leaves its loss reaches: the others were split off the tree before (`freezing.split`), so
nothing that gets no gradient is decayed, clipped against or given moments.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax.serialization import from_state_dict
from flax.training.dynamic_scale import DynamicScale

from asib_jax.models.ensemble import Variables
from asib_jax.objectives import freezing


class TrainState(NamedTuple):
    """The arrays a step changes: trainable parameters, batch statistics of the networks in training, moments; under
    float16 also the factor of the loss, else None."""

    params: dict[str, Any]
    batch_stats: dict[str, Any]
    opt_state: Any
    loss_scale: DynamicScale | None


def first_loss_scale(compute_dtype: str) -> DynamicScale | None:
    """The factor that keeps small gradients in float16's range (Micikevicius et al. 2018); None for other types.

    It doubles after 2000 finite steps and halves at every overflow (Flax's `DynamicScale`). It starts at Flax's 65536,
    where ASIB has 1024: too high costs one step for each halving, too low loses gradients for thousands of steps.
    """
    if compute_dtype != "float16":
        return None
    return DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(65536))  # typed as a step returns them


def skipped_by_scale(compute_dtype: str, steps: int) -> int:
    """How many of a phase's steps its loss scale skips at the most: 17 halvings from 65536 to below 1, and one for each
    time that it has doubled."""
    return 17 + steps // 2000 if compute_dtype == "float16" else 0


def begin(
    variables: Variables,
    mask: Mapping[str, Any],
    trained_stats: tuple[str, ...],
    tx: optax.GradientTransformation,
    opt_state: Any = None,
    compute_dtype: str = "float32",
) -> tuple[TrainState, Variables]:
    """Split the variables into what a step trains and what stands still.

    mask: over the parameters, True where a leaf trains (may stop at whole branches; a network without a mask stands
    still); trained_stats: the networks whose batch statistics the step updates; opt_state: of the step before, whose
    moments carry over to leaves that still train; compute_dtype: that gradients pass through, for `first_loss_scale`.
    """
    whole_mask = {name: mask.get(name, False) for name in variables.params}
    params, frozen_params = freezing.split(variables.params, whole_mask)
    stats = {name: variables.batch_stats[name] for name in trained_stats}
    frozen_stats = {name: value for name, value in variables.batch_stats.items() if name not in trained_stats}
    fresh = tx.init(params)
    opt_state = fresh if opt_state is None else freezing.carry(opt_state, fresh)
    state = TrainState(params, stats, opt_state, first_loss_scale(compute_dtype))
    return jax.tree.map(jnp.copy, state), Variables(frozen_params, frozen_stats)


def with_loss_scale(state: TrainState, held: Mapping[str, Any] | None) -> TrainState:
    """The state with the loss scale that `held`, nested dicts of arrays, has, where it needs one."""
    if held is None or state.loss_scale is None:
        return state
    return state._replace(loss_scale=from_state_dict(state.loss_scale, held["loss_scale"]))


def join(state: TrainState, frozen: Variables) -> Variables:
    """All variables again: what the state trains and what stands still."""
    return Variables(freezing.merge(state.params, frozen.params), {**frozen.batch_stats, **state.batch_stats})
