"""What functions and training steps cost, told from shapes: nothing is compiled and no array is made."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from clu.parameter_overview import count_parameters
from jax.extend.core import Literal

from asib_jax.engine.feed import tree_bytes
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Variables
from asib_jax.objectives import state
from asib_jax.objectives.step import Training


class Activations(NamedTuple):
    """Bytes that differentiating needs beside the arguments, as if nothing were fused or computed twice.

    kept: every value that the backward pass reads, constants aside; operation: the most that one operation before the
    backward pass reads and writes besides those.
    """

    kept: int
    operation: int


class StepCost(NamedTuple):
    """What one training step needs: trained parameters by network, and bytes.

    state: the copy of what it trains that it updates, and its moments; gradients: of what it trains.
    """

    trained: dict[str, int]
    state: int
    gradients: int
    activations: Activations


def flops(function: Callable, *args: Any) -> float:
    """Floating-point operations of `function(*args)` as XLA counts them before optimising.

    A multiply-add is 2, and none where a convolution meets its padding.
    """
    try:
        cpu = jax.local_devices(backend="cpu")[0]
    except RuntimeError as error:
        raise UserError("operations are counted on the CPU, which JAX_PLATFORMS excludes; add ,cpu to it") from error
    with jax.default_device(cpu):  # for a GPU jax counts compiled code only
        return jax.jit(function).lower(*args).cost_analysis()["flops"]


def activations(function: Callable, params: Any, *others: Any) -> Activations:
    """Of differentiating the scalar `function(params, *others)` with respect to `params`."""

    def residuals(params, *others):
        return jax.vjp(lambda params: function(params, *others), params)[1]

    jaxpr = jax.make_jaxpr(residuals)(params, *others).jaxpr
    constants = [equation.outvars for equation in jaxpr.eqns if not _variables(equation.invars)]
    given = {*jaxpr.invars, *jaxpr.constvars}.union(*constants)
    kept = _variables(jaxpr.outvars) - given
    operations = (_variables([*equation.invars, *equation.outvars]) - given - kept for equation in jaxpr.eqns)
    return Activations(_variable_bytes(kept), max(map(_variable_bytes, operations), default=0))


def of_step(training: Training, variables: Variables, controls: Any, batch: Any, compute_dtype: str) -> StepCost:
    """Of one training step of these networks; arrays or their shapes."""
    current, frozen = jax.eval_shape(
        functools.partial(
            state.begin,
            mask=training.mask,
            trained_stats=training.trained_stats,
            tx=training.tx,
            compute_dtype=compute_dtype,
        ),
        variables,
    )

    def objective(params, current, frozen, controls, batch):
        return training.loss(state.join(current._replace(params=params), frozen), controls, batch)[0]

    trained = {name: int(count_parameters(branch)) for name, branch in current.params.items()}
    return StepCost(
        trained,
        tree_bytes(current),
        tree_bytes(current.params),
        activations(objective, current.params, current, frozen, controls, batch),
    )


def _variables(atoms: list) -> set:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _variable_bytes(variables: set) -> int:
    return tree_bytes([variable.aval for variable in variables])
