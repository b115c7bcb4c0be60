"""The one factory that makes a training step of a loss, and what a loss is.

A loss is `(variables, controls, batch) -> (scalar, (batch_stats, metrics))`. `controls` holds every scalar that depends
on the epoch, as arrays, so that no schedule recompiles; `inputs` says what a batch holds.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asib_jax.models.ensemble import Variables
from asib_jax.objectives.state import TrainState, join

TERMS = ("ce", "kd_average", "kd_student", "gaussian_kl", "cccp", "kd", "feat_kd", "reg", "ib_mbm_reg")
"""The metrics that a loss is the sum of, in the order in which it adds them up: each with the weight that it enters the
loss with, before the B-Step's clamp. Other metrics follow from them."""

Loss = Callable[[Variables, dict, dict], tuple[jax.Array, tuple[dict, dict]]]


class Training(NamedTuple):
    """What a training step is made of. mask and trained_stats: the parameters that it trains and the networks whose
    batch statistics it updates, as `state.begin` takes them; tx: from gradients to directions."""

    loss: Loss
    mask: dict[str, Any]
    trained_stats: tuple[str, ...]
    tx: optax.GradientTransformation


def make_train_step(loss: Loss, tx: optax.GradientTransformation, *, axis_name: str | None = None) -> Callable:
    """`step(state, frozen, controls, batch) -> (state, metrics)`: one update of `state.params` at controls["lr"].

    Metrics are means over the global batch, and "lr", the rate that the step was given. Frozen leaves are arguments,
    never differentiated. A step changes nothing but the loss scale, if there is one, where the loss, a batch statistic
    or the gradient's norm is not finite on any device; the metric "skipped" is then 1, else 0.
    """

    def step(state: TrainState, frozen: Variables, controls: dict, batch: dict) -> tuple[TrainState, dict]:
        def objective(params):
            return loss(join(state._replace(params=params), frozen), controls, batch)

        loss_scale = None
        if state.loss_scale is None:
            (value, (stats, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
            grads = jax.lax.pmean(grads, axis_name) if axis_name else grads
        else:
            # Gives gradients unscaled again, their means over the axis.
            differentiate = state.loss_scale.value_and_grad(objective, has_aux=True, axis_name=axis_name)
            loss_scale, _, (value, (stats, metrics)), grads = differentiate(state.params)
        if axis_name:
            value, metrics = jax.lax.pmean((value, metrics), axis_name)
        stats = {name: stats[name] for name in state.batch_stats}
        # The norm is the one that clipping takes; a gradient whose square overflows would ruin AdamW's moments as well.
        finite = _all_finite((value, optax.tree.norm(grads), stats))
        directions, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - controls["lr"] * d, state.params, directions)
        new, old = TrainState(params, stats, opt_state, loss_scale), state._replace(loss_scale=loss_scale)
        state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        return state, {**metrics, "lr": controls["lr"], "skipped": 1 - jnp.float32(finite)}

    return step


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))
