"""Partial freezing on a hand-made parameter tree, up to an AdamW update; and what it saves in a B-Step."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from clu.parameter_overview import count_parameters
from networks import CLASSES, convolutions

from asib_jax import b_step, recipe, streams
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.models.kd_model import KDModel
from asib_jax.models.resnet import cifar_resnet
from asib_jax.objectives import freezing, state
from asib_jax.objectives.step import make_train_step
from configs import l0_baseline

STAGES = ("stem", "layer1", "layer2", "layer3")
HEADS = ("classifier", "distill_adapter", "residual_adapter")


def make_params():
    leaf = iter(np.random.default_rng(0).normal(size=(40, 2)).astype(np.float32))
    block = lambda: {"block0": {"conv": {"kernel": next(leaf)}, "bn": {"scale": next(leaf), "bias": next(leaf)}}}
    params = {stage: block() for stage in STAGES}
    return params | {head: {"fc": {"kernel": next(leaf), "bias": next(leaf)}} for head in HEADS}


def training_names(mask):
    """Top-level names; each must be wholly trainable or wholly frozen."""
    branches = {name: set(jax.tree.leaves(branch)) for name, branch in mask.items()}
    assert all(len(flags) == 1 for flags in branches.values())
    return {name for name, flags in branches.items() if flags == {True}}


@pytest.mark.parametrize(
    "level, stages", [(-1, STAGES), (0, ()), (1, ("layer3",)), (2, ("layer2", "layer3")), (4, STAGES)]
)
def test_level_names_the_stages_that_train(level, stages):
    """Level 0 trains the heads only, where the document trained everything (SPEC 10.8)."""
    mask = freezing.trainable(make_params(), STAGES, level)
    assert training_names(mask) == {*stages, *HEADS}
    assert freezing.frozen_stages(level, 4, "student_freeze_level") == 4 - len(stages)


@pytest.mark.parametrize("level", [-2, 5])
def test_level_out_of_range_names_the_key(level):
    with pytest.raises(ValueError, match=f"student_freeze_level={level}: choose -1 .* 0 to 4"):
        freezing.frozen_stages(level, 4, "student_freeze_level")


def test_declared_stage_without_parameters_is_an_error():
    with pytest.raises(ValueError, match="'layer4'"):
        freezing.trainable(make_params(), (*STAGES, "layer4"), 1)


def test_freeze_bn_extends_to_trainable_stages():
    mask = freezing.trainable(make_params(), STAGES, 1, freeze_bn=True)
    assert mask["layer3"]["block0"] == {"conv": {"kernel": True}, "bn": {"scale": False, "bias": False}}
    mask = freezing.trainable(make_params(), STAGES, -1, freeze_bn=True)
    assert mask["stem"]["block0"] == {"conv": {"kernel": True}, "bn": {"scale": False, "bias": False}}
    assert mask["classifier"]["fc"] == {"kernel": True, "bias": True}


@pytest.mark.parametrize("level", [-1, 0, 1])
def test_normalisation_after_pooling_trains_unless_freeze_bn(level):
    """It belongs to no stage."""
    params = make_params() | {"pooled_norm": {"scale": np.ones(2), "bias": np.ones(2)}}
    assert freezing.trainable(params, STAGES, level)["pooled_norm"] == {"scale": True, "bias": True}
    mask = freezing.trainable(params, STAGES, level, freeze_bn=True)
    assert mask["pooled_norm"] == {"scale": False, "bias": False}


def test_one_level_or_one_per_training_stage():
    assert [freezing.level_for_stage((2,), stage) for stage in range(3)] == [2, 2, 2]
    assert [freezing.level_for_stage((-1, 2), stage) for stage in range(2)] == [-1, 2]


def test_split_and_merge_are_inverse():
    params = make_params()
    train, frozen = freezing.split(params, freezing.trainable(params, STAGES, 1, freeze_bn=True))
    assert set(frozen) == set(STAGES) and frozen["layer3"]["block0"].keys() == {"bn"}
    assert set(train) == {"layer3", *HEADS}
    jax.tree.map(np.testing.assert_array_equal, freezing.merge(train, frozen), params)  # raises on another structure
    assert count_parameters(params) == 2 * 18 == count_parameters(train) + count_parameters(frozen)


def test_split_takes_whole_branches_and_merge_refuses_overlap():
    tree = {"student": make_params(), "teacher1": make_params()}
    train, frozen = freezing.split(tree, {"student": True, "teacher1": False})
    assert (set(train), set(frozen)) == ({"student"}, {"teacher1"})
    with pytest.raises(ValueError, match="teacher1/stem/block0/conv/kernel"):
        freezing.merge(tree, frozen)


@pytest.fixture(scope="module")
def update():
    """One jitted AdamW step on 0.5 |p|^2 summed over all parameters, differentiated for the trainable ones only."""
    tx = optax.chain(optax.clip_by_global_norm(0.5), optax.adamw(0.1, weight_decay=0.1))

    def step(train, frozen, state):
        loss = lambda train: 0.5 * optax.tree.norm(freezing.merge(train, frozen)) ** 2
        updates, state = tx.update(jax.grad(loss)(train), state, train)
        return optax.apply_updates(train, updates), state

    return tx, jax.jit(step)


def test_frozen_leaves_are_bitwise_unchanged_by_adamw(update):
    """Including by weight decay, and no moments are held for them."""
    tx, step = update
    params = make_params()
    train, frozen = freezing.split(params, freezing.trainable(params, STAGES, 0))
    state = tx.init(train)
    assert count_parameters(optax.tree.get(state, "mu")) == count_parameters(train) == 12
    for _ in range(2):
        train, state = step(train, frozen, state)
    after = freezing.merge(train, frozen)
    for name, branch in params.items():
        for before, now in zip(jax.tree.leaves(branch), jax.tree.leaves(after[name]), strict=True):
            assert np.array_equal(before, now) == (name in STAGES)


def test_carry_keeps_the_moments_of_leaves_that_stay(update):
    """Freezing layer3 and unfreezing it again: the classifier's Adam state goes on as if nothing had happened."""
    tx, step = update
    params = make_params()
    train, frozen = freezing.split(params, freezing.trainable(params, STAGES, 1))
    train, old = step(train, frozen, tx.init(train))
    narrower = {name: train[name] for name in HEADS}
    state = freezing.carry(old, tx.init(narrower))
    assert optax.tree.get(state, "count") == 1
    for moment in ("mu", "nu"):
        kept, before = optax.tree.get(state, moment), optax.tree.get(old, moment)
        assert set(kept) == set(HEADS)
        jax.tree.map(np.testing.assert_array_equal, kept, {name: before[name] for name in HEADS})
        assert all(np.any(leaf != 0) for leaf in jax.tree.leaves(kept))
    wider = freezing.carry(state, tx.init(train))
    assert not np.any(optax.tree.get(wider, "mu")["layer3"]["block0"]["conv"]["kernel"])
    np.testing.assert_array_equal(
        optax.tree.get(wider, "nu")["classifier"]["fc"]["bias"], optax.tree.get(old, "nu")["classifier"]["fc"]["bias"]
    )


def test_carry_drops_leaves_whose_shape_changed():
    tx = optax.adam(0.1)
    old = tx.init({"fc": jnp.ones(2), "bias": jnp.ones(3)})
    old = jax.tree.map(lambda leaf: leaf + 1, old)
    mu = optax.tree.get(freezing.carry(old, tx.init({"fc": jnp.ones(4), "bias": jnp.ones(3)})), "mu")
    np.testing.assert_array_equal(mu["fc"], np.zeros(4))
    np.testing.assert_array_equal(mu["bias"], np.ones(3))


@pytest.fixture(scope="module")
def distillation():
    """A ResNet-8 that learns from the average of two networks of one convolution; 4 images of 16x16, as shapes."""
    model = functools.partial(KDModel, num_classes=CLASSES, mean=(0.5,), std=(0.3,))
    student, *teachers = map(model, (cifar_resnet(8, (4, 6, 8), 4), convolutions(3), convolutions(4)))
    trees = [
        jax.eval_shape(functools.partial(net.init, train=False), jax.random.key(0), jnp.zeros((1, 16, 16, 3)))
        for net in (student, *teachers)
    ]
    variables = Variables(
        *(
            {name: tree[kind] for name, tree in zip(("student", "teacher1", "teacher2"), trees)}
            for kind in ("params", "batch_stats")
        )
    )
    batch = {"image": jnp.zeros((4, 16, 16, 3), jnp.uint8), "label": jnp.arange(4), "index": jnp.arange(4)}
    controls = {
        **{name: jnp.float32(1) for name in ("tau", "ramp", "ratio_on", "lr")},
        "temperatures": jnp.ones(2),
        "step": jnp.int32(0),
        **{f"{name}_key": streams.key(0, name) for name in ("augment", "mix", "dropout")},
    }
    return Networks(student, tuple(teachers)), variables, controls, batch


def test_frozen_stages_cost_no_gradient_work(distillation, quick_compilation):
    """Operations of the compiled B-Step, as XLA counts them: every stage that trains adds its own.

    At level 0 there remain the forward passes and the classifier's gradient, to 1 %: one kernel of the last stage alone
    would add 51,200 operations (100 meetings of entry and pixel, 8 x 8 channels, 4 images, a multiply-add each), 3 %.
    """
    nets, variables, controls, batch = distillation

    def flops(function, *args):
        return jax.jit(function).lower(*args).compile().cost_analysis()["flops"]

    step_flops = {}
    for level in (0, 1, 2, -1):
        config = l0_baseline.get_config("digits")
        config.use_partial_freeze, config.student_freeze_level = True, (level,)
        training = b_step.make_training(recipe.read(config), nets, variables.params, 0)
        begin = functools.partial(state.begin, mask=training.mask, trained_stats=training.trained_stats, tx=training.tx)
        current, frozen = jax.eval_shape(begin, variables)
        step_flops[level] = flops(make_train_step(training.loss, training.tx), current, frozen, controls, batch)
        if level == 0:
            forward = flops(
                lambda current, frozen, *args: training.loss(state.join(current, frozen), *args)[0],
                current,
                frozen,
                controls,
                batch,
            )
    assert step_flops[0] < step_flops[1] < step_flops[2] < step_flops[-1]
    classifier = 2 * 4 * 8 * CLASSES + 4 * CLASSES  # its kernel and bias, of 4 images with 8 features
    assert forward + classifier < step_flops[0] < 1.01 * (forward + classifier)
