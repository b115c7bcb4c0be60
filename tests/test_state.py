"""Optimizers against their published equations in float64, and what a step is given to train."""
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asib_jax.objectives import state
from asib_jax.models.ensemble import Variables

GENERATOR = np.random.default_rng(0)
SHAPES = {"ib_mbm": {"code": {"kernel": (3, 2), "bias": (2,)}, "norm": {"scale": (2,), "bias": (2,)}},
          "student": {"stage0": {"conv": {"kernel": (1, 1, 2, 2)}, "bn": {"scale": (2,), "bias": (2,)}}},
          "synergy_head": {"log_temperature": ()}}
RATES = (0.1, 0.03)
is_shape = lambda node: isinstance(node, tuple)


def draw():
    return jax.tree.map(lambda shape: GENERATOR.normal(size=shape), SHAPES, is_leaf=is_shape)


PARAMS, GRADS = draw(), [draw(), draw()]


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def decayed(path):
    return "kernel" in path


def run(tx):
    """Two updates as the training step applies them."""
    params = jax.tree.map(jnp.float32, PARAMS)
    opt_state = tx.init(params)
    for rate, grads in zip(RATES, GRADS):
        directions, opt_state = tx.update(jax.tree.map(jnp.float32, grads), opt_state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, directions)
    return leaves(params)


def clipped(grads, bound):
    norm = np.sqrt(sum((g ** 2).sum() for g in leaves(grads).values()))
    return {path: g * min(1, bound / norm) if bound else g for path, g in leaves(grads).items()}


def adamw(weight_decay, bound, factor=lambda path: 1.0):
    """Loshchilov and Hutter (2019), algorithm 2, decay times the learning rate, on kernels only."""
    params, m, v = leaves(PARAMS), {}, {}
    for t, (rate, grads) in enumerate(zip(RATES, GRADS), 1):
        for path, g in clipped(grads, bound).items():
            m[path] = 0.9 * m.get(path, 0) + 0.1 * g
            v[path] = 0.999 * v.get(path, 0) + 0.001 * g ** 2
            direction = m[path] / (1 - 0.9 ** t) / (np.sqrt(v[path] / (1 - 0.999 ** t)) + 1e-8)
            direction = direction + (weight_decay * params[path] if decayed(path) else 0)
            params[path] = params[path] - rate * factor(path) * direction
    return params


def sgd(weight_decay, bound, momentum):
    """Nesterov momentum as in PyTorch: u = momentum u + g, direction g + momentum u, decay added to g."""
    params, u = leaves(PARAMS), {}
    for rate, grads in zip(RATES, GRADS):
        for path, g in clipped(grads, bound).items():
            g = g + (weight_decay * params[path] if decayed(path) else 0)
            u[path] = momentum * u.get(path, 0) + g
            params[path] = params[path] - rate * (g + momentum * u[path])
    return params


@pytest.mark.parametrize("options, expected", [
    ({"kind": "adamw", "weight_decay": 0.3, "grad_clip_norm": 0.0}, lambda: adamw(0.3, 0)),
    ({"kind": "adamw", "weight_decay": 0.0, "grad_clip_norm": 0.5}, lambda: adamw(0.0, 0.5)),
    ({"kind": "adamw", "weight_decay": 0.3, "grad_clip_norm": 0.5, "factors": {"ib_mbm": 10.0, "student": 0.5}},
     lambda: adamw(0.3, 0.5, lambda path: 10.0 if "ib_mbm" in path else 0.5 if "student" in path else 1.0)),
    ({"kind": "sgd", "weight_decay": 0.3, "grad_clip_norm": 0.0, "momentum": 0.7}, lambda: sgd(0.3, 0, 0.7)),
    ({"kind": "sgd", "weight_decay": 0.0, "grad_clip_norm": 0.5}, lambda: sgd(0.0, 0.5, 0.9)),
], ids=["adamw", "adamw_clipped", "adamw_factors", "sgd", "sgd_clipped"])
def test_two_updates_equal_the_equations(options, expected):
    """To 1e-5; with decay on kernels, and on nothing else, as the equations have it."""
    actual, expected = run(state.make_optimizer(**options)), expected()
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=1e-5, atol=1e-5, err_msg=path)


def test_decay_is_for_kernels_alone():
    assert {path for path, yes in leaves(state.decayed(PARAMS)).items() if yes} == {
        "['ib_mbm']['code']['kernel']", "['student']['stage0']['conv']['kernel']"}


def make_variables():
    params = jax.tree.map(jnp.float32, PARAMS)
    return Variables(params, {"student": {"mean": jnp.ones(2)}, "teacher1": {"mean": jnp.zeros(2)}})


def test_begin_splits_and_join_is_its_inverse():
    variables = make_variables()
    mask = {"ib_mbm": {"code": True, "norm": False}, "student": False, "synergy_head": True}
    tx = state.make_optimizer("adamw", weight_decay=0.1, grad_clip_norm=1.0)
    current, frozen = state.begin(variables, mask, ("student",), tx)
    assert set(leaves(current.params)) == {"['ib_mbm']['code']['bias']", "['ib_mbm']['code']['kernel']",
                                           "['synergy_head']['log_temperature']"}
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
    tx = state.make_optimizer("adamw", weight_decay=0.0, grad_clip_norm=0.0)
    first, _ = state.begin(variables, {"ib_mbm": True, "student": False, "synergy_head": False}, (), tx)
    grads = {"ib_mbm": jax.tree.map(jnp.float32, GRADS[0]["ib_mbm"])}
    _, opt_state = tx.update(grads, first.opt_state, first.params)
    mask = {"ib_mbm": {"code": True, "norm": False}, "student": True, "synergy_head": False}
    second, _ = state.begin(variables, mask, (), tx, opt_state)
    grads = {"ib_mbm": {"code": GRADS[1]["ib_mbm"]["code"]}, "student": GRADS[1]["student"]}
    directions, after = tx.update(jax.tree.map(jnp.float32, grads), second.opt_state, second.params)
    assert optax.tree.get(after, "count") == 2
    old, new = GRADS[0]["ib_mbm"]["code"]["kernel"], GRADS[1]["ib_mbm"]["code"]["kernel"]
    m, v = 0.09 * old + 0.1 * new, 0.000999 * old ** 2 + 0.001 * new ** 2
    expected = m / 0.19 / np.sqrt(v / (1 - 0.999 ** 2))
    np.testing.assert_allclose(directions["ib_mbm"]["code"]["kernel"], expected, rtol=5e-5)
    moments = optax.tree.get(after, "mu")
    np.testing.assert_allclose(moments["student"]["stage0"]["conv"]["kernel"],
                               0.1 * GRADS[1]["student"]["stage0"]["conv"]["kernel"], rtol=1e-5)
    assert "norm" not in moments["ib_mbm"]


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16", "float16"])
def test_float16_alone_has_a_loss_scale(compute_dtype):
    """65536, doubling after 2000 finite steps and halving at an overflow; typed as a step returns it."""
    tx = state.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0)
    current, _ = state.begin(make_variables(), {name: True for name in SHAPES}, (), tx, compute_dtype=compute_dtype)
    if compute_dtype != "float16":
        assert current.loss_scale is None
        return
    scale = current.loss_scale
    assert (scale.scale, scale.fin_steps) == (65536, 0)
    assert (scale.growth_interval, scale.growth_factor, scale.backoff_factor) == (2000, 2, 0.5)
    types = jax.tree.map(lambda leaf: (leaf.dtype, leaf.weak_type), (scale.scale, scale.fin_steps))
    assert types == ((jnp.float32, False), (jnp.int32, False))
