"""The number of devices changes nothing but speed: parameters and statistics after several steps of SGD on 1, 2 and 4
simulated devices, and under jit with a sharded batch, agree to 1e-5.

SGD because Adam divides rounding noise by itself where a gradient is nearly zero.
"""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from networks import SHALLOW, make_feed, make_networks, make_split, one_step, random_variables

from asib_jax import streams
from asib_jax.engine import devices as placing
from asib_jax.models.ensemble import Mode
from asib_jax.objectives import optimizers, state
from asib_jax.objectives.a_loss import ATerms, a_loss
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.step import make_train_step

SPLIT = make_split(40)
STEPS = 4
# Each batch statistic and each source of randomness once; terms that are plain means over samples come in test_steps.
A_TERMS = ATerms(
    synergy_ce_alpha=0.6,
    synergy_kd_alpha=1.0,
    kd_alpha=0.0,
    cccp_alpha=0.0,
    cccp_tau=4.0,
    feat_kd_alpha=0.0,
    reg_lambda=0.0,
    ib_mbm_reg_lambda=0.0,
    label_smoothing=0.0,
    min_cw=0.5,
    data_aug=0,
    teacher_dropout=0.3,
)
B_TERMS = BTerms(
    data_aug=3,
    ce_alpha=0.65,
    kd_alpha=0.35,
    kd_target="synergy",
    kd_max_ratio=0.3,
    loss_clamp_max=1.0,
    disagree_mode="pred",
    disagree_lambda_high=3.0,
    disagree_lambda_low=0.5,
    mixup_alpha=1.0,
    min_cw=0.5,
)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def a_step(axis_name, networks_axis):
    """Noise, dropout, certainty weights, a teacher in training, and a mixture of teachers that know some classes."""
    options = {"base": "mixture", "joins": True, "classes": ((0, 1, 2, 3), (1, 4, 3, 2))}
    nets = make_networks(**SHALLOW, **options, dropout=0.3, axis_name=networks_axis)
    loss = functools.partial(
        a_loss, nets=nets, terms=A_TERMS, trained=None, teacher_modes=(Mode(train=True), Mode()), axis_name=axis_name
    )
    return nets, loss, ("ib_mbm", "synergy_head", "teacher1"), ("teacher1",)


def b_step(axis_name, networks_axis):
    """Augmentation, mixup, BatchNorm, certainty and disagreement weights, and all factors that are statistics."""
    nets = make_networks(**SHALLOW, axis_name=networks_axis)
    loss = functools.partial(b_loss, nets=nets, terms=B_TERMS, axis_name=axis_name)
    return nets, loss, ("student",), ("student",)


def controls(number):
    values = {
        "tau": 3.0,
        "beta": 1e-3,
        "open": 1.0,
        "certain": 1.0,
        "gate": 1.0,
        "average_share": 0.2,
        "ramp": 1.0,
        "ratio_on": 1.0,
        "lr": 0.02,
        "temperatures": np.array([1.5, 0.5]),
    }
    return {
        **jax.tree.map(np.float32, values),
        "step": np.int32(number),
        **{f"{name}_key": streams.key(0, name) for name in ("augment", "noise", "dropout", "mix")},
    }


def run(kind, compiled, axis_name=None, networks_axis=None):
    """Parameters, statistics and metrics after some steps by what `compiled(step)` gives."""
    nets, loss, trained, trained_stats = kind(axis_name, networks_axis)
    variables = random_variables(nets)
    tx = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=1.0)
    current, frozen = state.begin(variables, {name: name in trained for name in variables.params}, trained_stats, tx)
    step = compiled(make_train_step(loss, tx, axis_name=axis_name))
    order = np.random.default_rng(0).permutation(len(SPLIT.label))
    for number in range(STEPS):
        rows = order[8 * number : 8 * (number + 1)]
        batch = {name: leaf[rows] for name, leaf in SPLIT._asdict().items()}
        current, metrics = step(current, frozen, controls(number), batch)
        jax.block_until_ready(current)  # simulated devices stall where more than 32 steps are queued
    return jax.device_get({"params": current.params, "batch_stats": current.batch_stats, "metrics": metrics})


def run_on(kind, count, **axes):
    feed = make_feed(count)

    def compiled(step):
        steps = feed.compile(step, donate_carry=True)
        return lambda current, frozen, controls, batch: one_step(
            steps, feed, placing.replicate(current, feed.devices), frozen, controls, batch
        )

    return run(kind, compiled, **{"axis_name": feed.axis_name, "networks_axis": feed.axis_name} | axes)


@functools.cache
def on_one_device(kind):
    return run_on(kind, 1)


def assert_same(actual, expected, tolerance=1e-5):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance), actual, expected)


KINDS = pytest.mark.parametrize("kind", [a_step, b_step])


@KINDS
@pytest.mark.parametrize("count", [2, 4])
def test_steps_agree_on_any_number_of_devices(kind, count):
    assert_same(run_on(kind, count), on_one_device(kind))


def test_step_agrees_under_jit_with_a_sharded_batch():
    """The same pure step without an axis, its batch split over a mesh of four devices."""
    mesh = Mesh(np.array(placing.run_devices(4)), ("data",))
    everywhere, split = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def compiled(step):
        step = jax.jit(step)
        return lambda current, frozen, controls, batch: step(
            jax.device_put(current, everywhere),
            jax.device_put(frozen, everywhere),
            controls,
            jax.device_put(batch, split),
        )

    actual = run(b_step, compiled)
    assert_same(actual, on_one_device(b_step))


def test_step_whose_statistics_are_local_disagrees():
    """What the tests above would find: gradients are reduced, BatchNorm is not."""
    with pytest.raises(AssertionError, match="Mismatched"):
        assert_same(run_on(b_step, 2, networks_axis=None), on_one_device(b_step), tolerance=1e-3)


@KINDS
def test_the_steps_compared_did_train(kind):
    """Every tensor that the loss reaches moved by far more than the tolerance; weights and bounds were at work."""
    nets, _, trained, trained_stats = kind(None, None)
    before, after = random_variables(nets), on_one_device(kind)
    unreached = "classifier" if kind is a_step else "distill_adapter"
    for part, names in (("params", trained), ("batch_stats", trained_stats)):
        old = {name: getattr(before, part)[name] for name in names}
        moved = jax.tree.map(lambda a, b: np.abs(a - b).max(), after[part], old)
        for path, change in jax.tree_util.tree_leaves_with_path(moved):
            assert (change > 1e-3) == (unreached not in jax.tree_util.keystr(path)), jax.tree_util.keystr(path)
    if kind is a_step:
        assert after["metrics"]["certainty_sd"] > 0.05
    else:
        assert after["metrics"]["kd_ratio"] < 0.95 and abs(after["metrics"]["loss"] - 1) < 1e-6  # both bounds at work
