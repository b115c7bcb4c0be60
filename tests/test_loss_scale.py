"""Dynamic loss scaling: float16 steps against float32 ones, overflows on one device and on two, means of an epoch.

A loss of one product, whose float16 gradient is a power of two, says exactly where the range ends; a network of
convolutions says that what holds for it holds for BatchNorm and AdamW.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from epochs import BEGUN, calls_of, make_running
from flax.training.dynamic_scale import DynamicScale
from networks import SHALLOW, make_batch, make_feed, make_networks, one_step, random_variables

from asib_jax import streams
from asib_jax.engine import devices as placing
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.objectives import losses, optimizers, state
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.step import make_train_step

BATCH = make_batch()
CONTROLS = {
    "lr": jnp.float32(0.1),
    "step": jnp.int32(0),
    "augment_key": streams.key(0, "augment"),
    "mix_key": streams.key(0, "mix"),
    "dropout_key": streams.key(0, "dropout"),
}
ADAMW = optimizers.make_optimizer("adamw", weight_decay=0.1, grad_clip_norm=1.0)
SGD = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0, momentum=0.0)
START = DynamicScale(fin_steps=jnp.int32(0), scale=jnp.float32(1024), growth_interval=2)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


# A loss of one product -----------------------------------------------------------------------------------------------


def product(variables, controls, batch, axis_name=None):
    """mean(w x) in float16. Before unscaling, the gradient of an example is scale x / examples on its device."""
    x = batch["x"].astype(jnp.float16)
    value = jnp.mean((variables.params["w"]["kernel"].astype(jnp.float16) * x).astype(jnp.float32))
    stats = {"w": {"mean": losses.batch_mean(axis_name)(batch["x"])}}
    return value, (stats, {"loss": value})


def product_run(devices, tx=ADAMW):
    """The compiled step and its first state, whose scale doubles after two finite steps."""
    axis = placing.axis_name(devices)
    step = make_train_step(functools.partial(product, axis_name=axis), tx, axis_name=axis)
    variables = Variables({"w": {"kernel": jnp.float32([1.0])}}, {"w": {"mean": jnp.float32(0)}})
    current, frozen = state.begin(variables, {"w": True}, ("w",), tx, None, "float16")
    current = placing.replicate(current._replace(loss_scale=START), devices)
    return make_feed(len(devices)).compile(step, donate_carry=True), current, frozen


def examples(*x):
    return {"x": np.float32(x), "label": np.zeros(len(x))}


def take(step, current, frozen, batches, devices):
    """The states and metrics of steps taken one after the other, on the host, every device's copy compared."""
    history = []
    for batch in batches:
        current, metrics = one_step(step, make_feed(len(devices)), current, frozen, CONTROLS, batch)
        for leaf in jax.tree.leaves(current):
            copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
            assert len(copies) == len(devices) and all(np.array_equal(copies[0], copy) for copy in copies)
        history.append(jax.device_get((current, metrics)))
    return history


LARGE = 30000.0  # times 1024 / 2, beyond float16's 65504; by itself within
BATCHES = [examples(1, 2), examples(1, LARGE), examples(3, 1), examples(2, 2), examples(1, 2)]


@pytest.mark.parametrize("count", [1, 2])
def test_an_overflow_on_any_device_skips_the_step_on_all(count):
    """The second example, on two devices the second one's alone, overflows in the second step: every array keeps its
    value and the scale halves. The third step at half the scale, and the next two, count; after two finite steps the
    scale doubles with the third. All bitwise."""
    devices = placing.run_devices(count)
    step, current, frozen = product_run(devices)
    history = take(step, current, frozen, BATCHES, devices)
    assert [metrics["skipped"] for _, metrics in history] == [0, 1, 0, 0, 0]
    assert [float(after.loss_scale.scale) for after, _ in history] == [1024, 512, 512, 512, 1024]
    assert [int(after.loss_scale.fin_steps) for after, _ in history] == [1, 0, 1, 2, 0]
    first, overflow, third = (after for after, _ in history[:3])
    assert same(first._replace(loss_scale=None), overflow._replace(loss_scale=None))
    for part in ("params", "batch_stats", "opt_state"):
        assert not any(
            same(a, b)
            for a, b in zip(
                jax.tree.leaves(getattr(overflow, part)), jax.tree.leaves(getattr(third, part)), strict=True
            )
        )


def test_two_devices_reach_the_state_of_one():
    """After the overflow, too: to 1e-6, as the mean over devices may round otherwise."""
    one, two = (take(*product_run(devices), BATCHES, devices)[-1][0] for devices in map(placing.run_devices, (1, 2)))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), one, two)


def run_epoch(batches):
    running = make_running(product, ADAMW, [1.0], rate=lambda step: 0.0, limit=3, dtype="float16")
    running.current = placing.replicate(running.current._replace(loss_scale=START), running.context.feed.devices)
    running.run_epoch(calls_of(running, [batch["x"] for batch in batches]), {})
    return running


def test_means_of_an_epoch_are_over_the_steps_that_counted():
    """w stays 1 (the rate is 0), so that the loss is the mean of x: (1.5 + 2 + 2 + 1.5) / 4, not finite in the second
    step, where x itself is beyond float16."""
    running = run_epoch([BATCHES[0], examples(1, 1e5), *BATCHES[2:]])
    assert running.tally.means == {"loss": 1.75, "lr": 0, "skipped": 1} and running.tally.steps == 5
    assert running.step.compiled._cache_size() == 1  # the scale a step returns is of the type and place of the first


def test_an_epoch_of_overflows_alone_is_an_error():
    """Of too large a loss scale, with fewer in a row than are allowed: no means, but no error."""
    with pytest.raises(FloatingPointError, match=f"3 steps in a row from step {BEGUN} .* broke in loss.*'bfloat16'"):
        run_epoch([examples(1, 1e5)] * 3)
    tally = run_epoch([examples(1, 1e5)] * 2).tally
    assert tally.means["skipped"] == tally.steps == 2 and np.isnan(tally.means["loss"])


# A network -----------------------------------------------------------------------------------------------------------


def network_run(dtype, tx, ce_alpha=1.0):
    """A supervised step of a small network that computes in `dtype`, not compiled yet, and its first state."""
    student = make_networks(**SHALLOW).student.clone(adapter_dim=0)
    variables = random_variables(Networks(student))
    nets = Networks(student.clone(dtype=jnp.dtype(dtype)))
    loss = functools.partial(b_loss, nets=nets, terms=BTerms(data_aug=0, ce_alpha=ce_alpha))
    begun = state.begin(variables, {"student": True}, ("student",), tx, None, dtype)
    return make_train_step(loss, tx), loss, *begun


def test_an_overflow_leaves_parameters_moments_and_statistics_of_a_network():
    """From 2^40 the scale halves, and nothing else changes, until a step's gradients are finite; that one moves all."""
    step, _, current, frozen = network_run("float16", ADAMW)
    first = current = current._replace(loss_scale=START.replace(scale=jnp.float32(2.0**40)))
    step = jax.jit(step)
    for skips in range(40):  # noqa: B007  # how many there were counts afterwards
        before, (current, metrics) = current, step(current, frozen, CONTROLS, BATCH)
        if not metrics["skipped"]:
            break
        assert same(current._replace(loss_scale=None), first._replace(loss_scale=None))
        assert current.loss_scale.scale == before.loss_scale.scale / 2 and current.loss_scale.fin_steps == 0
    assert 20 < skips < 30  # 2^16 / (gradient towards a logit, at most 1 / 8) lies between 2^11 and 2^20
    assert not any(same(a, b) for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(current), strict=True))


@pytest.mark.parametrize("ce_alpha", [1.0, 1e-6])
def test_a_float16_step_is_the_float32_step(ce_alpha):
    """Update, statistics and metrics to 0.5 %, the update of its norm: float16 rounds to 0.05 %. The second loss is so
    small that its gradients are beneath float16's range: without the scale the convolution's are lost. The clipping
    bound is above their norm and far below that of the scaled ones: they are clipped after."""
    clipped = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=10 * ce_alpha, momentum=0.0)

    def one_step(dtype, tx, loss_scale=None):
        step, _, current, frozen = network_run(dtype, tx, ce_alpha)
        controls = CONTROLS | {"lr": jnp.float32(0.1 / ce_alpha)}
        after, metrics = jax.jit(step)(current._replace(loss_scale=loss_scale), frozen, controls, BATCH)
        moved = jax.tree.map(lambda new, old: np.float64(new) - np.float64(old), after.params, current.params)
        return moved["student"], after.batch_stats, metrics

    def distance(a, b, stage):
        a, b = (np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree[stage])]) for tree in (a, b))
        return np.linalg.norm(a - b) / np.linalg.norm(b)

    half, half_stats, half_metrics = one_step("float16", clipped, START.replace(scale=jnp.float32(8192)))
    full, full_stats, full_metrics = one_step("float32", SGD)
    assert half_metrics["skipped"] == 0 and half_metrics.keys() == full_metrics.keys()
    for stage in ("stage0", "classifier"):
        assert distance(half, full, stage) < 0.005, stage
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.005), half_metrics, full_metrics)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0.005, atol=1e-4), half_stats, full_stats)
    if ce_alpha < 1:
        assert distance(one_step("float16", SGD)[0], full, "stage0") > 0.5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_other_types_take_the_plain_step(dtype):
    """Bitwise that of value_and_grad, the optimizer and the descent, five in a row; the state holds no scale."""
    step, loss, current, frozen = network_run(dtype, ADAMW)
    assert current.loss_scale is None

    def plain(current, frozen, controls, batch):
        def objective(params):
            return loss(state.join(current._replace(params=params), frozen), controls, batch)

        (_, (stats, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(current.params)
        directions, opt_state = ADAMW.update(grads, current.opt_state, current.params)
        params = jax.tree.map(lambda p, d: p - controls["lr"] * d, current.params, directions)
        return state.TrainState(params, stats, opt_state, None), metrics

    def five(f):
        after, run = current, jax.jit(f)
        for seed in range(5):
            after, metrics = run(after, frozen, CONTROLS, make_batch(seed=seed))
        return after, metrics

    (actual, metrics), expected = five(step), five(plain)
    assert (metrics.pop("skipped"), metrics.pop("lr")) == (0, CONTROLS["lr"])
    assert same((actual, metrics), expected) and not same(actual, current)
