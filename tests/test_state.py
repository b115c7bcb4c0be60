"""What a step is given to train, and what it keeps of the step before."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asib_jax.models.ensemble import Variables
from asib_jax.objectives import optimizers, state

GENERATOR = np.random.default_rng(0)
SHAPES = {
    "ib_mbm": {"code": {"kernel": (3, 2), "bias": (2,)}, "norm": {"scale": (2,), "bias": (2,)}},
    "student": {"stage0": {"conv": {"kernel": (1, 1, 2, 2)}, "bn": {"scale": (2,), "bias": (2,)}}},
    "synergy_head": {"log_temperature": ()},
}
is_shape = lambda node: isinstance(node, tuple)


def draw():
    return jax.tree.map(lambda shape: GENERATOR.normal(size=shape), SHAPES, is_leaf=is_shape)


PARAMS, GRADS = draw(), [draw(), draw()]


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def make_variables():
    params = jax.tree.map(jnp.float32, PARAMS)
    return Variables(params, {"student": {"mean": jnp.ones(2)}, "teacher1": {"mean": jnp.zeros(2)}})


def test_begin_splits_and_join_is_its_inverse():
    variables = make_variables()
    mask = {"ib_mbm": {"code": True, "norm": False}, "synergy_head": True}  # the student has none: it stands still
    tx = optimizers.make_optimizer("adamw", weight_decay=0.1, grad_clip_norm=1.0)
    current, frozen = state.begin(variables, mask, ("student",), tx)
    assert set(leaves(current.params)) == {
        "['ib_mbm']['code']['bias']",
        "['ib_mbm']['code']['kernel']",
        "['synergy_head']['log_temperature']",
    }
    assert current.batch_stats.keys() == {"student"} and frozen.batch_stats.keys() == {"teacher1"}
    for moment in ("mu", "nu"):  # none for what stands still
        assert leaves(optax.tree.get(current.opt_state, moment)).keys() == leaves(current.params).keys()
    whole = state.join(current, frozen)
    jax.tree.map(np.testing.assert_array_equal, whole, variables)
    jax.tree.map(lambda leaf: leaf.delete(), current.params)  # as a donating step does
    kernel = PARAMS["ib_mbm"]["code"]["kernel"]
    np.testing.assert_array_equal(variables.params["ib_mbm"]["code"]["kernel"], np.float32(kernel))


def test_moments_carry_to_leaves_that_still_train():
    """First the whole of ib_mbm, then its `code` and the student: by the equations, `code` goes on from the old moments
    and step count; the student starts with none. 5e-5, as float32 rounds 1 - 0.999^2."""
    variables = make_variables()
    tx = optimizers.make_optimizer("adamw", weight_decay=0.0, grad_clip_norm=0.0)
    first, _ = state.begin(variables, {"ib_mbm": True, "student": False, "synergy_head": False}, (), tx)
    grads = {"ib_mbm": jax.tree.map(jnp.float32, GRADS[0]["ib_mbm"])}
    _, opt_state = tx.update(grads, first.opt_state, first.params)
    mask = {"ib_mbm": {"code": True, "norm": False}, "student": True, "synergy_head": False}
    second, _ = state.begin(variables, mask, (), tx, opt_state)
    grads = {"ib_mbm": {"code": GRADS[1]["ib_mbm"]["code"]}, "student": GRADS[1]["student"]}
    directions, after = tx.update(jax.tree.map(jnp.float32, grads), second.opt_state, second.params)
    assert optax.tree.get(after, "count") == 2
    old, new = GRADS[0]["ib_mbm"]["code"]["kernel"], GRADS[1]["ib_mbm"]["code"]["kernel"]
    m, v = 0.09 * old + 0.1 * new, 0.000999 * old**2 + 0.001 * new**2
    expected = m / 0.19 / np.sqrt(v / (1 - 0.999**2))
    np.testing.assert_allclose(directions["ib_mbm"]["code"]["kernel"], expected, rtol=5e-5)
    moments = optax.tree.get(after, "mu")
    np.testing.assert_allclose(
        moments["student"]["stage0"]["conv"]["kernel"], 0.1 * GRADS[1]["student"]["stage0"]["conv"]["kernel"], rtol=1e-5
    )
    assert "norm" not in moments["ib_mbm"]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_float16_alone_has_a_loss_scale(compute_dtype):
    """65536, doubling after 2000 finite steps and halving at an overflow; typed as a step returns it."""
    tx = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0)
    current, _ = state.begin(make_variables(), dict.fromkeys(SHAPES, True), (), tx, compute_dtype=compute_dtype)
    if compute_dtype != "float16":
        assert current.loss_scale is None
        return
    scale = current.loss_scale
    assert (scale.scale, scale.fin_steps) == (65536, 0)
    assert (scale.growth_interval, scale.growth_factor, scale.backoff_factor) == (2000, 2, 0.5)
    types = jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), (scale.scale, scale.fin_steps))
    assert types == ((jnp.float32, False), (jnp.int32, False))


def test_a_loss_scale_goes_on_where_it_was():
    """From the nested dicts that a snapshot makes of it; a state that needs none takes none, and without any keeps its
    own."""
    tx = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0)
    mask = dict.fromkeys(SHAPES, True)
    held = {"loss_scale": {"fin_steps": np.int32(7), "scale": np.float32(512)}}
    half, full = (
        state.begin(make_variables(), mask, (), tx, compute_dtype=compute_dtype)[0]
        for compute_dtype in ("float16", "float32")
    )
    after = state.with_loss_scale(half, held)
    assert (after.loss_scale.scale, after.loss_scale.fin_steps) == (512, 7) and after.params is half.params
    assert state.with_loss_scale(half, None) is half and state.with_loss_scale(full, held) is full
