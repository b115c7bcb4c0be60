"""The number of devices changes nothing but speed: parameters and statistics after several steps of SGD on 1, 2 and 4
simulated devices, and under jit with a sharded batch, agree to 1e-5."""
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from asib_jax import parallel, state, steps, streams
from asib_jax.models.ensemble import Mode
from asib_jax.steps import ATerms, BTerms
from networks import make_networks, make_split, random_variables

SPLIT = make_split(40)
STEPS = 4
A_TERMS = ATerms(synergy_ce_alpha=0.6, synergy_kd_alpha=1.0, kd_alpha=0.35, cccp_alpha=0.25, cccp_tau=4.0,
                 feat_kd_alpha=0.0, reg_lambda=0.01, ib_mbm_reg_lambda=0.01, label_smoothing=0.1, min_cw=0.5, data_aug=2)
B_TERMS = BTerms(data_aug=1, ce_alpha=0.65, kd_alpha=0.35, kd_target="synergy", kd_max_ratio=0.3, feat_kd_alpha=0.1,
                 loss_clamp_max=3.0, disagree_mode="pred", disagree_lambda_high=3.0, disagree_lambda_low=0.5,
                 mixup_alpha=1.0, min_cw=0.5)


def a_step(axis_name):
    """Noise, dropout, certainty weights, and teachers in training: one with BatchNorm of its own batches."""
    nets = make_networks(dropout=0.3, axis_name=axis_name)
    modes = (Mode(train=True), Mode(train=True, frozen_stages=1, freeze_bn=True))
    trained = {"ib_mbm", "synergy_head", "teacher1", "teacher2"}
    loss = functools.partial(steps.a_loss, nets=nets, terms=A_TERMS, teacher_modes=modes, axis_name=axis_name,
                             trained=lambda params: [params["teacher1"], params["teacher2"]])
    return nets, loss, trained, ("teacher1", "teacher2")


def b_step(axis_name):
    """Mixup, BatchNorm, certainty and disagreement weights, and every factor that is a statistic of the batch."""
    nets = make_networks(axis_name=axis_name)
    loss = functools.partial(steps.b_loss, nets=nets, terms=B_TERMS, axis_name=axis_name)
    return nets, loss, {"student"}, ("student",)


def controls():
    values = {"tau": 3.0, "beta": 1e-3, "open": 1.0, "certain": 1.0, "gate": 1.0, "average_share": 0.2, "ramp": 1.0,
              "ratio_on": 1.0, "lr": 0.02}
    return {**jax.tree.map(jnp.float32, values),
            **{f"{name}_key": streams.key(0, name) for name in ("augment", "noise", "mix")}}


def run(kind, *, axis_name, compile_step, place):
    """Parameters, statistics and metrics after some steps; `place(state, frozen, batch)` puts them on devices."""
    nets, loss, trained, trained_stats = kind(axis_name)
    variables = random_variables(nets)
    tx = state.make_optimizer("sgd", weight_decay=1e-3, grad_clip_norm=1.0)
    current, frozen = state.begin(variables, {name: name in trained for name in variables.params}, trained_stats, tx)
    step = compile_step(steps.make_train_step(loss, tx, axis_name=axis_name))
    order = np.random.default_rng(0).permutation(len(SPLIT.label))
    for number in range(STEPS):
        batch = SPLIT.take(order[8 * number: 8 * (number + 1)])._asdict()
        current, frozen, batch = place(current, frozen, batch)
        current, metrics = step(current, frozen, controls() | {"step": jnp.int32(number)}, batch)
        jax.block_until_ready(current)  # well within the 32 steps that simulated devices can queue
    return jax.device_get((current.params, current.batch_stats, metrics))


def run_on(kind, count, axis_name="as many as needed"):
    devices = parallel.local_devices(count)
    return run(kind, axis_name=parallel.axis_name(devices) if axis_name else None,
               compile_step=lambda step: parallel.compile_step(step, devices, arguments=4, donate_first=True),
               place=lambda current, frozen, batch: (current, frozen, parallel.shard(batch, devices)))


@functools.cache
def on_one_device(kind):
    return run_on(kind, 1)


def assert_same(actual, expected, atol=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=atol), actual[:2], expected[:2])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=atol), actual[2], expected[2])


KINDS = pytest.mark.parametrize("kind", [a_step, b_step])


@KINDS
@pytest.mark.parametrize("count", [2, 4])
def test_steps_agree_on_any_number_of_devices(kind, count):
    assert_same(run_on(kind, count), on_one_device(kind))


@KINDS
def test_steps_agree_under_jit_with_a_sharded_batch(kind):
    """The same pure step with axis_name=None, its batch split over a mesh of four devices."""
    mesh = Mesh(np.array(parallel.local_devices(4)), ("data",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))
    actual = run(kind, axis_name=None, compile_step=jax.jit, place=lambda current, frozen, batch: (
        jax.device_put(current, everywhere), jax.device_put(frozen, everywhere), jax.device_put(batch, split)))
    assert_same(actual, on_one_device(kind))


@KINDS
def test_steps_that_do_not_reduce_over_their_devices_disagree(kind):
    """What the tests above would find: the same step on two devices, made as if for one."""
    with pytest.raises(AssertionError):
        assert_same(run_on(kind, 2, axis_name=None), on_one_device(kind), atol=1e-4)


@KINDS
def test_training_moved_everything_it_trains(kind):
    nets, _, trained, trained_stats = kind(None)
    before, (params, stats, _) = random_variables(nets), on_one_device(kind)
    assert params.keys() == trained and stats.keys() == set(trained_stats)
    moved = jax.tree.map(lambda a, b: float(np.abs(a - b).max()), params, {name: before.params[name] for name in params})
    assert min(moved["student" if kind is b_step else "ib_mbm"]["stage0" if kind is b_step else "mu"]["conv" if kind is b_step else "kernel"]) > 1e-4
