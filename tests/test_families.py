"""Every family as student and as teacher: whole A- and B-Steps at a tiny size, and the full-size ones by shape."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import (
    convolutions,
    full_size_shapes,
    make_batch,
    make_networks,
    random_values,
    random_variables,
    variable_shapes,
)

from asib_jax import streams
from asib_jax.models import MODELS
from asib_jax.models.convnext import convnext
from asib_jax.models.efficientnet import efficientnet
from asib_jax.models.ensemble import Mode
from asib_jax.models.kd_model import KDModel, in_compute_type, stage_names
from asib_jax.models.mobilenet import Row, mobilenet_v2
from asib_jax.models.resnet import cifar_resnet, imagenet_resnet
from asib_jax.models.shufflenet import shufflenet_v2
from asib_jax.models.vgg import vgg
from asib_jax.models.wide_resnet import wide_resnet
from asib_jax.objectives import optimizers, state
from asib_jax.objectives.a_loss import ATerms, a_loss
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.step import make_train_step
from asib_jax.weights.torch_names import export_weights

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = {
    "resnet": cifar_resnet(8, widths=(4, 6, 8), stem=4),
    "wrn": wide_resnet(10, 1),
    "vgg": vgg(((4,), (6,), (8,))),
    "convnext": convnext((4, 6, 8, 10), (1, 1, 1, 1), 0.5, True),
    "efficientnet": efficientnet(0.1, 0.3, 0.2, True),
    "mobilenet": mobilenet_v2((Row(1, 8, 1, 1), Row(2, 8, 2, 2)), True),
    "shufflenet": shufflenet_v2((1, 1, 1), (8, 12, 16), True),
}
FULL_SIZE = (
    "resnet20",
    "resnet50",
    "wrn_16_2",
    "vgg13",
    "convnext_s",
    "efficientnet_b0",
    "mobilenet_v2",
    "shufflenet_v2",
)
A_TERMS = ATerms(
    synergy_ce_alpha=0.6,
    synergy_kd_alpha=1.0,
    kd_alpha=0.3,
    cccp_alpha=0.25,
    cccp_tau=4.0,
    feat_kd_alpha=0.0,
    reg_lambda=0.0,
    ib_mbm_reg_lambda=0.0,
    label_smoothing=0.0,
    min_cw=0.1,
    data_aug=1,
)
B_TERMS = BTerms(data_aug=1, ce_alpha=0.65, kd_alpha=0.35, kd_target="synergy", min_cw=0.1)
CONTROLS = {
    **dict.fromkeys(("tau", "beta", "open", "certain", "gate", "average_share", "ramp", "ratio_on"), jnp.float32(1)),
    **{f"{name}_key": streams.key(0, name) for name in ("augment", "noise", "dropout", "mix")},
    "lr": jnp.float32(0.01),
    "temperatures": jnp.ones(2),
    "step": jnp.int32(0),
}


def one_step(loss, nets, variables, trained, stats):
    """A step of plain gradient descent: which kernels and statistics of the trained networks stood still."""
    tx = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0, momentum=0.0)
    current, frozen = state.begin(variables, {name: name in trained for name in variables.params}, stats, tx)
    before = jax.device_get((current.params, current.batch_stats))
    after, metrics = jax.jit(make_train_step(loss, tx))(current, frozen, CONTROLS, make_batch())
    assert all(np.isfinite(value) for value in jax.tree.leaves(metrics))
    pairs = zip(jax.tree_util.tree_leaves_with_path(before), jax.tree.leaves((after.params, after.batch_stats)))
    return {
        jax.tree_util.keystr(path)
        for (path, old), new in pairs
        if path[-1].key in ("kernel", "gamma", "mean", "var") and np.array_equal(old, new)
    }


@pytest.mark.parametrize("family", TINY)
def test_a_student_learns_from_a_teacher_of_its_family(family):
    """One B-Step: every kernel moves, but for those of the adapter, which no loss reaches."""
    nets = make_networks(student=TINY[family], teachers=(TINY[family], convolutions(4)))
    loss = functools.partial(b_loss, nets=nets, terms=B_TERMS)
    still = one_step(loss, nets, random_variables(nets), ("student",), ("student",))
    assert len(still) == 2 and all("distill_adapter" in key for key in still)


@pytest.mark.parametrize("family", ["convnext", "efficientnet"])
def test_a_teacher_is_tuned_in_the_a_step(family):
    """With BatchNorm and without: every kernel moves but the classifier's, which no loss reaches."""
    nets = make_networks(student=convolutions(3), teachers=(TINY[family], convolutions(4)))
    loss = functools.partial(
        a_loss, nets=nets, terms=A_TERMS, trained=lambda params: [], teacher_modes=(Mode(train=True), Mode())
    )
    still = one_step(loss, nets, random_variables(nets), ("teacher1", "ib_mbm", "synergy_head"), ("teacher1",))
    assert still == {"[0]['teacher1']['classifier']['kernel']"}


@pytest.mark.parametrize("family", TINY)
def test_bfloat16_is_float32_to_its_precision(family):
    """In training with dropout, on statistics at rest: a batch's own magnify rounding where maps are of one pixel.

    Parameters, feat_2d and logits stay float32; keys alone bring dropout.
    """
    model, pixels = KDModel(TINY[family], 5, (0.5,), (0.25,)), make_batch(8)["image"]
    half = model.clone(dtype=jnp.bfloat16)
    variables = random_values(variable_shapes(model))
    assert {leaf.dtype for leaf in jax.tree.leaves(variable_shapes(half))} == {jnp.dtype("float32")}

    @jax.jit
    def run(variables, keys):
        return [
            network.apply(variables, pixels, train=True, freeze_bn=True, dropout_keys=own)
            for network, own in ((model, keys), (half, keys), (half, None))
        ]

    exact, outputs, plain = run(variables, jax.random.split(jax.random.key(0), 8))
    assert (outputs.feat_4d.dtype, outputs.feat_2d.dtype, outputs.logit.dtype) == ("bfloat16", "float32", "float32")
    error = np.abs(outputs.feat_2d - exact.feat_2d).max() / np.abs(exact.feat_2d).max()
    assert error < 0.02, error
    dropped = [name for name in ("feat_2d", "logit") if (getattr(outputs, name) != getattr(plain, name)).any()]
    assert dropped == {
        "convnext": ["feat_2d", "logit"],
        "efficientnet": ["feat_2d", "logit"],
        "mobilenet": ["logit"],
    }.get(family, [])


LIBRARIES = (
    *(("torchvision", name, name, 0) for name in ("resnet50", "resnet101", "resnet152", "mobilenet_v2")),
    ("timm", "mobilenetv2_100", "mobilenet_v2", 1),
    ("torchvision", "shufflenet_v2_x1_0", "shufflenet_v2", 0),
    *(
        (library, name, name, i)
        for name in ("efficientnet_b0", "efficientnet_b2")
        for i, library in enumerate(("timm", "torchvision"))
    ),
    ("timm", "tf_efficientnet_l2", "efficientnet_l2", 0),
    ("timm", "convnext_small", "convnext_s", 0),
    ("timm", "convnext_large", "convnext_l", 0),
)


@pytest.mark.pytorch
@pytest.mark.parametrize(("library", "theirs", "name", "convention"), LIBRARIES, ids=lambda value: str(value))
def test_full_size_weights_are_called_and_shaped_as_the_librarys(library, theirs, name, convention):
    """With values of no bytes in place of the weights: the largest network has 480 million."""
    import timm
    import torch
    import torchvision

    create = {"torchvision": torchvision.models.get_model, "timm": timm.create_model}[library]
    with torch.device("meta"):
        expected = {key: tuple(value.shape) for key, value in create(theirs).state_dict().items()}
    empty = jax.tree.map(lambda leaf: np.zeros(leaf.shape, "V0"), full_size_shapes(name, 1000, False))
    architecture = MODELS[name](False)
    exported = export_weights(empty, architecture._replace(names=architecture.names[convention:]))
    assert {key: value.shape for key, value in exported.items()} == expected


@pytest.mark.parametrize("name", FULL_SIZE)
def test_every_family_goes_through_the_b_step_at_full_size(name):
    """By shape alone: nothing is compiled. The networks are those of the `:small` profile but for the student."""
    nets = make_networks(student=MODELS[name](True), teachers=(convolutions(3), convolutions(4)))

    def initial():
        pixels = jnp.zeros((1, 32, 32, 3))
        student = nets.student.init(jax.random.key(0), pixels, train=False)
        return student["params"], student.get("batch_stats", {})

    params, stats = jax.eval_shape(initial)
    rest = random_variables(make_networks(student=convolutions(3), teachers=(convolutions(3), convolutions(4))))
    tx = optimizers.make_optimizer("adamw", weight_decay=0.1, grad_clip_norm=1.0)
    variables = rest._replace(
        params={**rest.params, "student": params}, batch_stats={**rest.batch_stats, "student": stats}
    )
    begin = functools.partial(
        state.begin, mask={name: name == "student" for name in rest.params}, trained_stats=("student",), tx=tx
    )
    current, frozen = jax.eval_shape(begin, variables)
    step = make_train_step(functools.partial(b_loss, nets=nets, terms=B_TERMS), tx)
    batch = {**make_batch(), "image": np.zeros((8, 32, 32, 3), np.uint8)}
    after, _ = jax.eval_shape(step, current, frozen, CONTROLS, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), after) == jax.tree.map(
        lambda leaf: (leaf.shape, leaf.dtype), current
    )


@pytest.mark.parametrize("family", [*TINY, "bottleneck"])
def test_a_frozen_network_held_in_its_compute_type_says_the_same(family):
    """Bit for bit; and what is held so is half the bytes of every kernel of the stages, and nothing else."""
    architecture = TINY[family] if family in TINY else imagenet_resnet((1, 1, 1, 1), True)
    model = KDModel(architecture, 5, (0.5,), (0.25,), adapter_dim=4, dtype=jnp.bfloat16)
    variables = random_values(variable_shapes(model, 32))
    held = in_compute_type(model, variables)
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 3), np.uint8)
    run = jax.jit(lambda variables: model.apply(variables, images, train=False))
    for before, after in zip(run(variables), run(held), strict=True):
        assert before.dtype == after.dtype and np.isfinite(before).all()
        np.testing.assert_array_equal(before, after)
    narrow = {
        jax.tree_util.keystr(path)
        for path, leaf in jax.tree_util.tree_leaves_with_path(held)
        if leaf.dtype == jnp.bfloat16
    }
    kernels = {
        jax.tree_util.keystr(path)
        for path, _ in jax.tree_util.tree_leaves_with_path(held)
        if path[1].key in stage_names(model) and path[-1].key == "kernel"
    }
    assert kernels <= narrow and all(path.endswith(("['kernel']", "['bias']")) for path in narrow)
    assert jax.tree.structure(held) == jax.tree.structure(variables)
