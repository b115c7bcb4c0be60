"""What functions and training steps cost, told from shapes: nothing is compiled and no array is made."""
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from clu.parameter_overview import count_parameters
from jax.extend.core import Literal

from asib_jax.objectives import state
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Variables
from asib_jax.objectives.steps import Training


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


def of_step(training: Training, variables: Variables, batch: Any, compute_dtype: str) -> StepCost:
    """Of one training step on `batch`, arrays or their shapes."""
    begin = functools.partial(state.begin, mask=training.mask, trained_stats=training.trained_stats, tx=training.tx,
                              compute_dtype=compute_dtype)
    current, frozen = jax.eval_shape(begin, variables)
    scalars = ("tau", "beta", "certain", "open", "gate", "average_share", "ramp", "ratio_on")
    keys = ("augment_key", "noise_key", "mix_key", "dropout_key")
    controls = jax.eval_shape(lambda: {**dict.fromkeys(scalars, jnp.float32(0)), "step": jnp.int32(0),
                                       **dict.fromkeys(keys, jax.random.key(0))})

    def objective(params, current, frozen, controls, batch):
        return training.loss(state.join(current._replace(params=params), frozen), controls, batch)[0]

    trained = {name: int(count_parameters(branch)) for name, branch in current.params.items()}
    return StepCost(trained, tree_bytes(current), tree_bytes(current.params),
                    activations(objective, current.params, current, frozen, controls, batch))


def tree_bytes(tree: Any) -> int:
    """Bytes of all leaves, which are arrays or their shapes."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _variables(atoms: list) -> set:
    return {atom for atom in atoms if not isinstance(atom, Literal)}


def _variable_bytes(variables: set) -> int:
    return tree_bytes([variable.aval for variable in variables])
