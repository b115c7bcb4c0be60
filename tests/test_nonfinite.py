"""Steps that are not finite: NaN put into a batch, a weight, a teacher's outputs; on one of two devices; in a row."""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from epochs import BEGUN, calls_of, make_running
from networks import CLASSES, SHALLOW, make_batch, make_networks, random_variables

from asib_jax import streams
from asib_jax.engine.nonfinite import Watch
from asib_jax.engine.progress import Progress
from asib_jax.models.ensemble import TeacherOutputs, Variables
from asib_jax.objectives import losses, optimizers, state
from asib_jax.objectives.a_loss import ATerms, a_loss
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.step import TERMS, make_train_step

A_TERMS = ATerms(
    synergy_ce_alpha=0.6,
    synergy_kd_alpha=1.1,
    kd_alpha=0.35,
    cccp_alpha=0.25,
    cccp_tau=4.0,
    feat_kd_alpha=0.3,
    reg_lambda=0.1,
    ib_mbm_reg_lambda=0.1,
    label_smoothing=0.0,
    min_cw=0.1,
    data_aug=0,
)
B_TERMS = BTerms(data_aug=0, ce_alpha=0.65, kd_alpha=0.35, kd_target="synergy", kd_max_ratio=1.0, feat_kd_alpha=0.3)
CONTROLS = {
    **{name: jnp.float32(1) for name in ("tau", "beta", "open", "certain", "gate", "ramp", "ratio_on")},
    "average_share": jnp.float32(0.3),
    "lr": jnp.float32(0.1),
    "temperatures": jnp.ones(2),
    "step": jnp.int32(0),
    **{f"{name}_key": streams.key(0, name) for name in ("augment", "mix", "noise", "dropout")},
}
ADAMW = optimizers.make_optimizer("adamw", weight_decay=0.1, grad_clip_norm=1.0)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def same(a, b):
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y, equal_nan=True) for x, y in pairs)


# A step --------------------------------------------------------------------------------------------------------------


@functools.cache
def make(kind):
    """Networks, the loss and first state of the A- or B-Step, and the step compiled."""
    nets = make_networks(**SHALLOW)
    variables = random_variables(nets)
    if kind == "a":
        mask, trained = {name: name in ("ib_mbm", "synergy_head") for name in variables.params}, ()
        loss = functools.partial(a_loss, nets=nets, terms=A_TERMS, trained=lambda params: params["teacher1"])
    else:
        mask, trained = {name: name == "student" for name in variables.params}, ("student",)
        loss = functools.partial(b_loss, nets=nets, terms=B_TERMS)
    return loss, jax.jit(make_train_step(loss, ADAMW)), *state.begin(variables, mask, trained, ADAMW)


def batch_of_floats():
    """A batch whose images and stored teachers' outputs can hold NaN."""
    batch, draw = make_batch(), np.random.default_rng(0).normal
    teachers = TeacherOutputs(
        tuple(np.float32(draw(size=(8, width))) for width in (3, 4)), np.float32(draw(size=(8, 2, CLASSES)))
    )
    return {**batch, "image": np.float32(batch["image"]), "teachers": teachers}


def with_nan(tree):
    """The tree with NaN as the last entry of its first leaf."""
    first, *others = jax.tree.leaves(tree)
    first = np.array(first)
    first.flat[-1] = np.nan
    return jax.tree.unflatten(jax.tree.structure(tree), [first, *others])


@pytest.mark.parametrize(
    "kind, where, broken",
    [
        ("b", "image", "ce, kd, feat_kd"),
        ("b", "student", "ce, kd"),
        ("b", "feature", "kd, feat_kd"),
        ("b", "logit", "kd"),
        ("b", "ib_mbm", "kd, feat_kd"),
        ("a", "feature", "ce, kd_average, kd_student, gaussian_kl, cccp, feat_kd"),
        ("a", "logit", "kd_average"),
        ("a", "synergy_head", "ce, kd_average, kd_student, cccp, ib_mbm_reg"),
        ("a", "teacher1", "reg"),
    ],
)
def test_a_step_that_is_not_finite_changes_nothing_and_names_its_terms(kind, where, broken):
    """One NaN, the student's in its classifier; the state stays bitwise; the same step without it moves the state."""
    _, step, current, frozen = make(kind)
    batch = good = batch_of_floats()
    if where == "image":
        batch = {**batch, "image": with_nan(batch["image"])}
    elif where in ("feature", "logit"):
        feats, logits = batch["teachers"]
        batch = {
            **batch,
            "teachers": TeacherOutputs(with_nan(feats), logits)
            if where == "feature"
            else TeacherOutputs(feats, with_nan(logits)),
        }
    elif where in current.params:
        current = current._replace(params={**current.params, where: with_nan(current.params[where])})
    else:
        frozen = frozen._replace(params={**frozen.params, where: with_nan(frozen.params[where])})
    after, metrics = step(current, frozen, CONTROLS, batch)
    assert metrics["skipped"] == 1 and metrics["skipped"].dtype == jnp.float32 and same(after, current)
    with pytest.raises(FloatingPointError, match=f"broke in {broken}\\. "):
        Watch().see({name: np.array([value]) for name, value in metrics.items()}, 0, "stage1/b", 0, 1)
    _, _, current, frozen = make(kind)
    after, metrics = step(current, frozen, CONTROLS, good)
    assert metrics["skipped"] == 0
    assert not any(same(a, b) for a, b in zip(jax.tree.leaves(after.batch_stats), jax.tree.leaves(current.batch_stats)))
    assert not same(after.params, current.params) and not same(after.opt_state, current.opt_state)


@pytest.mark.parametrize("kind", ["a", "b"])
def test_every_metric_is_a_term_in_its_place_or_follows_from_terms(kind):
    loss, _, current, frozen = make(kind)
    names = []

    def trace(batch):
        value, (_, metrics) = loss(state.join(current, frozen), CONTROLS, batch)
        names.extend(metrics)
        return value

    jax.eval_shape(trace, batch_of_floats())
    terms = [name for name in names if name in TERMS]
    assert terms == [name for name in TERMS if name in names]
    derived = {"loss", "acc", "target_acc", "kd_ratio", "clipped", "certainty_sd"}
    assert set(names) - set(terms) <= derived and len(terms) == {"a": 8, "b": 3}[kind]


# A run of steps ------------------------------------------------------------------------------------------------------


def product(variables, controls, batch, axis_name=None):
    """The mean of (w1 + w2) x, whose gradient is that of x for both; a statistic keeps that mean, too."""
    value = jnp.mean(jnp.sum(variables.params["w"]["kernel"]) * batch["x"])
    return value, ({"w": {"mean": losses.batch_mean(axis_name)(batch["x"])}}, {"ce": value, "loss": value})


def begin(devices, limit=20, **options):
    """Of SGD with momentum on two examples a step; NaN lies on the last device alone."""
    tx = optimizers.make_optimizer("sgd", weight_decay=0.5, grad_clip_norm=0.0)
    return make_running(
        functools.partial(product, axis_name="devices" if devices > 1 else None),
        tx,
        [1.0, 1.0],
        rate=lambda step: 0.25,
        devices=devices,
        limit=limit,
        **options,
    )


GOOD = [(1, 2), (0.5, -1), (3, 1), (-2, 0.25)]


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("bad", [np.nan, np.inf, 1e25], ids=["NaN", "infinity", "a square that overflows"])
def test_bad_batches_among_good_ones_leave_what_the_good_ones_make(devices, bad):
    """By numpy in float64, to 1e-6: w, its momentum, and the means over the good steps; the kept mean is the last
    one's. On two devices the bad example is the second one's alone."""
    w, trace, losses = 1.0, 0.0, []
    for x in GOOD:
        losses.append(2 * w * np.mean(x))
        gradient = np.mean(x) + 0.5 * w
        trace = gradient + 0.9 * trace
        w -= 0.25 * (gradient + 0.9 * trace)
    running = begin(devices)
    running.run_epoch(calls_of(running, [GOOD[0], (1, bad), *GOOD[1:3], (2, bad), (1, bad), GOOD[3]]), {})
    current, metrics, watch = jax.device_get(running.current), running.tally.means, running.progress.watch
    np.testing.assert_allclose(current.params["w"]["kernel"], [w, w], rtol=1e-6)
    np.testing.assert_allclose(jax.tree.leaves(current.opt_state), [[trace, trace]], rtol=1e-6)
    np.testing.assert_allclose(current.batch_stats["w"]["mean"], np.mean(GOOD[3]), rtol=1e-6)
    np.testing.assert_allclose(metrics.pop("loss"), np.mean(losses), rtol=1e-6)
    assert metrics["skipped"] == watch.skipped["stage1/b"] == 3 and watch.in_a_row == 0


@pytest.mark.parametrize("devices", [1, 2])
@pytest.mark.parametrize("steps_a_call", [1, 4])
def test_too_many_in_a_row_are_an_error_across_calls(devices, steps_a_call):
    """Steps 8, and 10 to 12: the third in a row of these is one too many, wherever a compiled call ends."""
    batches = [(1, 2), (1, np.nan), (1, 2), (1, np.nan), (1, np.nan), (1, np.nan), (1, 2)]
    running = begin(devices, limit=3, steps_a_call=steps_a_call)
    with pytest.raises(
        FloatingPointError,
        match=rf"^stage1/b, epoch 2: 3 steps in a row from step {BEGUN + 3} of stage1/b, epoch 2 .* "
        r"broke in ce\. .*grad_clip_norm.*max_nonfinite_steps",
    ):
        running.run_epoch(calls_of(running, batches), {})
    watch = running.progress.watch
    assert watch.in_a_row == 3 and watch.skipped == {"stage1/b": 4}
    running = begin(devices, limit=4, steps_a_call=steps_a_call)
    running.run_epoch(calls_of(running, batches), {})


def test_only_a_batch_statistic_that_is_not_finite_keeps_its_value():
    """Of a step that trains nothing, as the pass that sets them: the loss does not see x."""

    def loss(variables, controls, batch):
        return jnp.zeros(()), ({"w": {"mean": jnp.mean(batch["x"])}}, {"loss": jnp.zeros(())})

    tx = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0)
    variables = Variables({"w": {"kernel": jnp.float32([1.0])}}, {"w": {"mean": jnp.float32(0)}})
    current, frozen = state.begin(variables, {"w": False}, ("w",), tx)
    step = jax.jit(make_train_step(loss, tx))
    for x, mean, skipped in ((2.0, 2.0, 0), (np.nan, 2.0, 1), (3.0, 3.0, 0)):
        current, metrics = step(current, frozen, {"lr": jnp.float32(0)}, {"x": jnp.float32([x])})
        assert current.batch_stats["w"]["mean"] == mean and metrics["skipped"] == skipped


@pytest.mark.parametrize("devices", [1, 2])
def test_a_loss_that_is_not_finite_counts_though_its_gradient_is(devices):
    """x is no factor of w: the gradient is 1 whatever x. Of two devices x is the second one's; both skip the step."""

    def loss(variables, controls, batch):
        value = variables.params["w"]["kernel"][0] + jnp.mean(batch["x"])
        return value, ({}, {"loss": value})

    tx = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0, momentum=0.0)
    variables = Variables({"w": {"kernel": jnp.float32([1.0])}}, {})
    current, frozen = state.begin(variables, {"w": True}, (), tx)
    axis = "devices" if devices > 1 else None
    step = jax.vmap(make_train_step(loss, tx, axis_name=axis), (None, None, None, 0), axis_name=axis, axis_size=devices)
    for x, w, skipped in ((2.0, 0.5, 0), (np.inf, 0.5, 1), (3.0, 0.0, 0)):
        examples = np.float32([[1.0], [x]])[-devices:]
        after, metrics = jax.jit(step)(current, frozen, {"lr": jnp.float32(0.5)}, {"x": examples})
        np.testing.assert_array_equal(after.params["w"]["kernel"], np.full((devices, 1), w))
        np.testing.assert_array_equal(metrics["skipped"], np.full(devices, skipped))
        np.testing.assert_array_equal(metrics["lr"], np.full(devices, 0.5))
        current = jax.tree.map(lambda leaf: leaf[0], after)


# The watch -----------------------------------------------------------------------------------------------------------


def metrics_of(skipped, ce=1.0):
    return {"skipped": np.float32(skipped), "ce": np.full(len(skipped), ce, np.float32)}


def test_a_streak_goes_on_over_calls_phases_and_a_resumption():
    """It is named by where it began."""
    progress = Progress()
    progress.watch.see(metrics_of([0, 1], np.inf), 0, "stage1/a", 2, 4)
    progress.watch.see({"ce": np.float32([np.nan])}, 2, "stage1/a", 2, 4)  # of a step that skips nothing
    progress.watch.see(metrics_of([1]), 70, "stage1/b", 0, 4)
    arrays, values = progress.content()
    resumed = Progress.restored(arrays, json.loads(json.dumps(values)))
    for each in (progress, resumed):
        assert each.watch.in_a_row == 2 and each.watch.skipped == {"stage1/a": 1, "stage1/b": 1}
        told = "^stage1/b, epoch 1: 4 steps in a row from step 1 of stage1/a, epoch 3 .* the first one broke in ce"
        with pytest.raises(FloatingPointError, match=told):
            each.watch.see(metrics_of([1, 1]), 71, "stage1/b", 0, 4)
    progress.watch.see(metrics_of([0]), 73, "stage1/b", 0, 4)
    assert progress.watch.in_a_row == 0


@pytest.mark.parametrize(
    "skipped, steps, dtype, ends",
    [
        (1, 10, "float32", False),
        (2, 10, "float32", True),
        (20, 200, "bfloat16", False),
        (21, 200, "bfloat16", True),
        (17, 20, "float16", False),  # a loss scale of 65536 that has to come down to 0.5
        (19, 20, "float16", False),
        (20, 20, "float16", True),
        (217, 2000 - 1, "float16", True),
        (217, 2000, "float16", False),
        (1, 1, "float32", True),
        (0, 0, "float32", False),
        (0, 5, "float32", False),
    ],
)
def test_a_phase_that_skipped_too_many_of_its_steps_is_an_error(skipped, steps, dtype, ends):
    """More than a tenth, beside what float16's scale may; or all."""
    watch = Watch()
    for step in range(skipped):  # never two in a row
        watch.see(metrics_of([1, 0], np.nan), 2 * step, "stage2/a", 0, 2)
    if ends:
        told = f"^stage2/a: {skipped} of {steps} steps .* than a tenth; step {2 * skipped - 2} of .* broke in ce. "
        with pytest.raises(FloatingPointError, match=told):
            watch.judge("stage2/a", steps, dtype)
    else:
        watch.judge("stage2/a", steps, dtype)
    watch.judge("stage1/a", steps, dtype)


def test_where_every_metric_is_finite_the_gradient_broke():
    """An overflow of float16's scaled gradients."""
    with pytest.raises(FloatingPointError, match="broke in the gradient"):
        Watch().see({**metrics_of([1]), "acc": np.float32([0.5])}, 0, "stage1/b", 0, 1)
