"""Optimizers against their published equations in float64: as they are made, and as each training makes its own of the
recipe."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import make_networks, random_variables

from asib_jax import a_step, b_step, recipe, teachers
from asib_jax.objectives import optimizers
from configs import l2_cccp

GENERATOR = np.random.default_rng(0)
SHAPES = {
    "ib_mbm": {"code": {"kernel": (3, 2), "bias": (2,)}, "norm": {"scale": (2,), "bias": (2,)}},
    "student": {"stage0": {"conv": {"kernel": (1, 1, 2, 2)}, "bn": {"scale": (2,), "bias": (2,)}}},
    "synergy_head": {"log_temperature": ()},
    "teacher2": {"classifier": {"kernel": (2, 2), "bias": (2,)}},
}
RATES = (0.1, 0.03, 0.05)


def draw():
    return jax.tree.map(
        lambda shape: GENERATOR.normal(size=shape), SHAPES, is_leaf=lambda node: isinstance(node, tuple)
    )


PARAMS, GRADS = draw(), [draw() for _ in RATES]


def leaves(tree):
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def decayed(path):
    return "kernel" in path


def run(tx):
    """Updates as the training step applies them."""
    params = jax.tree.map(jnp.float32, PARAMS)
    opt_state = tx.init(params)
    for rate, grads in zip(RATES, GRADS):
        directions, opt_state = tx.update(jax.tree.map(jnp.float32, grads), opt_state, params)
        params = jax.tree.map(lambda p, d: p - rate * d, params, directions)
    return leaves(params)


def clipped(grads, bound):
    norm = np.sqrt(sum((g**2).sum() for g in leaves(grads).values()))
    assert not bound or bound < norm
    return {path: g * bound / norm if bound else g for path, g in leaves(grads).items()}


def adamw(weight_decay, bound, factors={}):
    """Loshchilov and Hutter (2019), algorithm 2, decay times the learning rate, on kernels only; factors: of the rate,
    for each network."""
    params, m, v = leaves(PARAMS), {}, {}
    for t, (rate, grads) in enumerate(zip(RATES, GRADS), 1):
        for path, g in clipped(grads, bound).items():
            m[path] = 0.9 * m.get(path, 0) + 0.1 * g
            v[path] = 0.999 * v.get(path, 0) + 0.001 * g**2
            direction = m[path] / (1 - 0.9**t) / (np.sqrt(v[path] / (1 - 0.999**t)) + 1e-8)
            direction = direction + (weight_decay * params[path] if decayed(path) else 0)
            params[path] = params[path] - rate * factors.get(path.split("'")[1], 1.0) * direction
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


def assert_equal(actual, expected):
    """To 1e-5."""
    assert actual.keys() == expected.keys()
    for path, value in expected.items():
        np.testing.assert_allclose(actual[path], value, rtol=1e-5, atol=1e-5, err_msg=path)


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"kind": "adamw", "weight_decay": 0.3, "grad_clip_norm": 0.0}, lambda: adamw(0.3, 0)),
        ({"kind": "adamw", "weight_decay": 0.0, "grad_clip_norm": 0.5}, lambda: adamw(0.0, 0.5)),
        (
            {"kind": "adamw", "weight_decay": 0.3, "grad_clip_norm": 0.5, "factors": {"ib_mbm": 10.0, "student": 0.5}},
            lambda: adamw(0.3, 0.5, {"ib_mbm": 10.0, "student": 0.5}),
        ),
        ({"kind": "sgd", "weight_decay": 0.3, "grad_clip_norm": 0.0, "momentum": 0.7}, lambda: sgd(0.3, 0, 0.7)),
        ({"kind": "sgd", "weight_decay": 0.0, "grad_clip_norm": 0.5}, lambda: sgd(0.0, 0.5, 0.9)),
    ],
    ids=["adamw", "adamw_clipped", "adamw_factors", "sgd", "sgd_clipped"],
)
def test_updates_equal_the_equations(options, expected):
    """With decay on kernels, and on nothing else, as the equations have it."""
    assert_equal(run(optimizers.make_optimizer(**options)), expected())


def test_a_gradient_within_the_bound_is_not_scaled():
    tx = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=1e3, momentum=0.0)
    assert_equal(run(tx), sgd(0.0, 0, 0.0))


def test_decay_is_for_kernels_alone():
    assert {path for path, yes in leaves(optimizers.decayed(PARAMS)).items() if yes} == {
        "['ib_mbm']['code']['kernel']",
        "['student']['stage0']['conv']['kernel']",
        "['teacher2']['classifier']['kernel']",
    }


# Of the recipe -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def transformation():
    """The optimizer of a step for the recipe with some changes: "a", "b", or the number of a teacher."""
    nets = make_networks()
    params = random_variables(nets).params

    def make(step, teacher={}, **changes):
        made = recipe.read(l2_cccp.get_config("digits"))
        first, second = made.teachers
        made = dataclasses.replace(
            made, teachers=(first, dataclasses.replace(second, **teacher)), grad_clip_norm=0.5, **changes
        )
        if step == "teacher2":
            return teachers.make_training(made, nets, 1, params).tx
        return {"a": a_step, "b": b_step}[step].make_training(made, nets, params, 0).tx

    return make


@pytest.mark.parametrize(
    "step, changes, expected",
    [
        ("b", {"student_weight_decay": 0.3}, lambda: adamw(0.3, 0.5)),
        ("b", {"student_weight_decay": 0.3, "optimizer": "sgd", "momentum": 0.7}, lambda: sgd(0.3, 0.5, 0.7)),
        (
            "a",
            {"a_step_lr": 2e-4, "ib_mbm_lr_factor": 7.0},
            lambda: adamw(0.0, 0.5, {"ib_mbm": 7.0, "synergy_head": 7.0}),
        ),
        (
            "a",
            {"a_step_lr": 2e-4, "teacher_lr": 6e-4, "a_step_weight_decay": 0.2, "ib_mbm_lr_factor": 1.0},
            lambda: adamw(0.2, 0.5, {"teacher2": 3.0}),
        ),
        ("teacher2", {"teacher": {"train_weight_decay": 0.3, "finetune_weight_decay": 0.1}}, lambda: adamw(0.3, 0.5)),
        (
            "teacher2",
            {"teacher": {"train_weight_decay": 0.3, "finetune_weight_decay": 0.1, "weights": "given.npz"}},
            lambda: adamw(0.1, 0.5),
        ),
    ],
    ids=["student", "student_sgd", "fusion_rate", "teacher_rate", "teacher", "given_teacher"],
)
def test_each_training_takes_the_numbers_of_the_recipe(transformation, step, changes, expected):
    assert_equal(run(transformation(step, **changes)), expected())
