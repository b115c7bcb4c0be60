"""Dropout and stochastic depth: values, and that every network, place and example draws for itself."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import convolutions, make_batch, random_values, variable_shapes

from asib_jax import streams
from asib_jax.models.convnext import Block
from asib_jax.models.ensemble import Mode, Networks, Variables, classify, run_teachers
from asib_jax.models.ib_mbm import SynergyHead
from asib_jax.models.kd_model import KDModel
from asib_jax.models.layers import Architecture, chain, dropout, stochastic_depth

pytestmark = pytest.mark.usefixtures("quick_compilation")
KEYS = jax.random.split(jax.random.key(0), 64)


def test_dropout_and_stochastic_depth():
    """Entries, or examples as a whole, are 0 at the rate and else divided by what is left; nothing without keys."""
    x = np.random.default_rng(0).uniform(1, 2, (64, 3, 3, 8)).astype(np.float32)
    for drop, shape, spread in ((dropout, x.shape, 0.5 / 4608**0.5), (stochastic_depth, (64, 1, 1, 1), 0.5 / 8)):
        dropped = np.asarray(drop(x, 0.25, KEYS))
        kept = np.broadcast_to((dropped > 0)[:, : shape[1], : shape[2], : shape[3]], x.shape)
        np.testing.assert_allclose(dropped, np.where(kept, x / 0.75, 0), rtol=1e-6)
        assert abs(kept.mean() - 0.75) < 4 * spread
        np.testing.assert_array_equal(drop(x[40:], 0.25, KEYS[40:]), dropped[40:])  # whatever else is in the batch
        assert drop(x, 0.25, None) is x and drop(x, 0.0, KEYS) is x
        assert drop(x.astype(jnp.bfloat16), 0.25, KEYS).dtype == jnp.bfloat16


def test_places_draw_apart_and_frozen_stages_do_not_draw():
    """Residual branches that are 1, 10 and 100 everywhere: their sum tells which of them, doubled, an example kept."""
    stages = (("first", chain([partial(Block, 0.5)] * 2)), ("second", chain([partial(Block, 0.5)])))
    model = KDModel(Architecture(stages, feat_dim=3), 2, (0.5,), (0.25,))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), variable_shapes(model))["params"]
    for stage, block, value in (("first", "block0", 1), ("first", "block1", 10), ("second", "block0", 100)):
        params[stage][block]["gamma"] += 1
        params[stage][block]["fc2"]["bias"] += value
    grey = np.full((64, 2, 2, 3), 127.5, np.float32)  # 0 after normalisation

    @partial(jax.jit, static_argnums=0)
    def run(frozen_stages, keys):
        return model.apply({"params": params}, grey, train=True, frozen_stages=frozen_stages, dropout_keys=keys).feat_4d

    def sums(frozen_stages, keys=KEYS):
        maps = np.asarray(run(frozen_stages, keys))
        assert (maps == maps[:, :1, :1, :1]).all()
        return set(maps[:, 0, 0, 0])

    assert sums(0) == {0, 2, 20, 22, 200, 202, 220, 222}
    assert sums(1) == {11, 211}
    assert sums(2) == sums(0, None) == {111}


def test_networks_draw_apart():
    """Two equal teachers with dropout disagree as soon as they train, and the head has keys of its own."""
    teacher = KDModel(convolutions(3)._replace(dropout=0.5), 5, (0.5,), (0.25,))
    nets = Networks(teacher, (teacher, teacher), synergy_head=SynergyHead(6, 6, 0.5, False))
    values = random_values(variable_shapes(teacher))
    one, zero = np.ones(6, np.float32), np.zeros(6, np.float32)
    head = {"fc1": {"kernel": np.diag(zero), "bias": one}, "fc2": {"kernel": np.diag(one), "bias": zero}}
    params = dict.fromkeys(nets.teacher_names, values["params"]) | {"synergy_head": head}
    variables = Variables(params, dict.fromkeys(nets.teacher_names, values["batch_stats"]))
    pixels, keys, modes = make_batch()["image"], KEYS[:8], (Mode(train=True),) * 2
    plain, dropped = (np.asarray(run_teachers(nets, variables, pixels, modes, own)[0].logits) for own in (None, keys))
    np.testing.assert_array_equal(plain[:, 0], plain[:, 1])
    for a, b in ((dropped[:, 0], dropped[:, 1]), (dropped[:, 0], plain[:, 0]), (dropped[:, 1], plain[:, 1])):
        assert (np.abs(a - b).max(axis=1) > 0.01).sum() >= 4  # of 8 examples; features are 3, many of them 0
    hidden = np.ones((8, 6), np.float32)  # what the head's first layer gives; the second one shows it
    expected = dropout(hidden, 0.5, streams.branch(keys, "synergy_head"))
    np.testing.assert_array_equal(classify(nets, variables, 0 * hidden, None, keys), expected)
    np.testing.assert_array_equal(classify(nets, variables, 0 * hidden, None), hidden)
    assert set(np.unique(expected)) == {0, 2}
