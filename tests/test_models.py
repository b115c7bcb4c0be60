"""Backbones and KDModel: exact sizes, what freezing and training do to statistics, and every output by another path."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import full_size_shapes, make_networks, make_split, random_values, variable_shapes

from asib_jax.models import MODELS, build_ib_mbm_from_teachers, create_student_by_name, create_teacher_by_name
from asib_jax.models.convnext import convnext
from asib_jax.models.kd_model import KDModel, stage_names
from asib_jax.models.layers import Architecture
from asib_jax.models.resnet import cifar_resnet, imagenet_resnet
from asib_jax.objectives import losses

# (name, classes, small_input) -> parameters. CIFAR: as in Tian et al.'s (2020) code. Others: torchvision's or timm's;
# small stems have 64 * 3 * (49 - 9) and 96 * 3 * (16 - 9) fewer, those not listed as many.
SIZES = {
    ("resnet8", 100, True): 83_892,
    ("resnet14", 100, True): 181_108,
    ("resnet20", 100, True): 278_324,
    ("resnet32", 100, True): 472_756,
    ("resnet44", 100, True): 667_188,
    ("resnet56", 100, True): 861_620,
    ("resnet110", 100, True): 1_736_564,
    ("resnet8x4", 100, True): 1_233_540,
    ("resnet32x4", 100, True): 7_433_860,
    ("resnet50", 1000, False): 25_557_032,
    ("resnet101", 1000, False): 44_549_160,
    ("resnet152", 1000, False): 60_192_808,
    ("resnet152", 1000, True): 60_192_808 - 7_680,
    ("wrn_16_2", 100, True): 703_284,
    ("wrn_40_1", 100, True): 569_780,
    ("wrn_40_2", 100, True): 2_255_156,
    ("vgg8", 100, True): 3_965_028,
    ("vgg13", 100, True): 9_462_180,
    ("convnext_s", 1000, False): 50_223_688,
    ("convnext_s", 1000, True): 50_223_688 - 2_016,
    ("convnext_l", 1000, False): 197_767_336,
    ("efficientnet_b0", 1000, False): 5_288_548,
    ("efficientnet_b2", 1000, False): 9_109_994,
    ("efficientnet_l2", 1000, False): 480_309_308,
    ("mobilenet_v2", 1000, False): 3_504_872,
    ("shufflenet_v2", 1000, False): 2_278_604,
}
TINY = cifar_resnet(8, widths=(2, 3, 4), stem=2)
TWO_STAGES = Architecture(TINY.stages[:2], feat_dim=2)  # where initialisers, slow to compile, are run
PIXELS = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)


def random_variables(model):
    """Variables of the model's shapes with values no initialiser gives, positive so that variances are valid."""
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: generator.uniform(0.1, 0.9, leaf.shape).astype(np.float32), variable_shapes(model))


def tiny(architecture=TINY, **fields):
    return KDModel(architecture, 5, **{"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.25)} | fields)


def changed_stages(before, after):
    """Which stages have statistics that differ anywhere; asserts that a stage moves as a whole or not at all."""
    changed = set()
    for name in before:
        moved = [not np.array_equal(a, b) for a, b in zip(jax.tree.leaves(before[name]), jax.tree.leaves(after[name]))]
        assert all(moved) or not any(moved)
        changed |= {name} if any(moved) else set()
    return changed


def test_every_model_has_its_exact_size():
    assert {name for name, _, _ in SIZES} == set(MODELS)
    for (name, classes, small_input), expected in SIZES.items():
        params = full_size_shapes(name, classes, small_input)["params"]
        assert sum(leaf.size for leaf in jax.tree.leaves(params)) == expected, name


def test_stages_are_declared_in_order():
    assert stage_names(tiny()) == ("stem", "layer1", "layer2", "layer3")
    assert stage_names(tiny(imagenet_resnet((1, 1, 1, 1), True))) == ("stem", "layer1", "layer2", "layer3", "layer4")


def test_names():
    fields = {"small_input": True, "mean": (0.5,), "std": (0.25,)}
    plain = create_student_by_name("resnet20", 10, **fields)
    for name in ("resnet20_scratch", "resnet20_pretrain"):
        suffixed = create_student_by_name(name, 10, **fields)
        assert repr(suffixed) == repr(plain)
    with pytest.raises(ValueError, match=r"'resnet21'; teacherK.name must be one of resnet8, .*resnet152"):
        create_teacher_by_name("resnet21", 10, **fields)
    for name in ("resnet21_scratch", "resnet20_pretrain_scratch", "resnet20_scratch_scratch", "_scratch"):
        with pytest.raises(ValueError, match=f"'{name}'; model.student.name must be"):
            create_student_by_name(name, 10, **fields)


def test_forward_equals_its_parts_by_hand():
    """Normalisation, residual adapter, pooling, classifier and distillation adapter against numpy, 1e-5 relative."""
    model = tiny(adapter_dim=6, adapter_hidden=7, residual_adapter=True)
    variables = random_variables(model)
    params = variables["params"]
    outputs = jax.jit(lambda v: model.apply(v, PIXELS, train=False))(variables)

    @jax.jit
    def by_hand(x):
        for name, factory in TINY.stages:
            own = {"params": params[name], "batch_stats": variables["batch_stats"][name]}
            x = factory(dtype=jnp.float32, axis_name=None).apply(own, x, train=False)
            if name == "layer2":
                x += jnp.einsum("bhwi,io->bhwo", x, params["residual_adapter"]["kernel"][0, 0], precision="highest")
        return x

    feat_4d = by_hand(((PIXELS / 255 - model.mean) / model.std).astype(np.float32))
    feat_2d = np.asarray(feat_4d, np.float64).mean((1, 2))
    fc1, fc2 = params["distill_adapter"]["fc1"], params["distill_adapter"]["fc2"]
    distill = np.maximum(feat_2d @ fc1["kernel"] + fc1["bias"], 0) @ fc2["kernel"] + fc2["bias"]
    logit = feat_2d @ params["classifier"]["kernel"] + params["classifier"]["bias"]
    assert fc1["kernel"].shape == (4, 7) and fc2["kernel"].shape == (7, 6)
    for actual, expected in zip(outputs, (feat_4d, feat_2d, distill, logit), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5)
    np.testing.assert_array_equal(model.apply(variables, outputs.feat_2d, method="distill"), outputs.distill_feat)


def test_a_network_of_some_classes_places_its_logits_under_their_labels():
    """Each is that of the network whose classifier has these outputs; the others are -inf, and get no gradient."""
    nets = make_networks(classes=((4, 0, 2), ()))
    some, pixels = nets.teachers[0], jnp.float32(make_split(4).image)
    variables = random_values(variable_shapes(some))
    own = KDModel(some.architecture, 3, some.mean, some.std, adapter_dim=some.adapter_dim)
    plain = own.apply(variables, pixels, train=False)
    placed = some.apply(variables, pixels, train=False)
    np.testing.assert_array_equal(placed.logit[:, (4, 0, 2)], plain.logit)
    np.testing.assert_array_equal(placed.logit[:, (1, 3)], -np.inf)
    np.testing.assert_array_equal(placed.feat_2d, plain.feat_2d)
    np.testing.assert_array_equal(nets.known, [[True, False, True, False, True], [True] * 5])

    def loss(params, labels):
        return losses.cross_entropy(
            some.apply({**variables, "params": params}, pixels, train=False).logit, labels
        ).sum()

    gradient = jax.grad(loss)(variables["params"], jnp.array([0, 2, 4, 4]))
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient)) and gradient["classifier"]["bias"].any()


def test_adapters_leave_the_initial_network_as_it_is():
    """Same key, bitwise the same backbone and classifier; and the residual adapter starts as the identity."""

    def init_and_run(model):
        variables = model.init(jax.random.key(3), PIXELS, train=False)
        return variables, model.apply(variables, PIXELS, train=False)

    plain, plain_outputs = jax.jit(init_and_run, static_argnums=0)(tiny(TWO_STAGES))
    adapted = tiny(TWO_STAGES, adapter_dim=6, residual_adapter=True)
    both, both_outputs = jax.jit(init_and_run, static_argnums=0)(adapted)
    assert plain_outputs.distill_feat is None
    assert set(both["params"]) - set(plain["params"]) == {"distill_adapter", "residual_adapter"}
    for name in plain["params"]:
        jax.tree.map(np.testing.assert_array_equal, plain["params"][name], both["params"][name])
    jax.tree.map(np.testing.assert_array_equal, plain["batch_stats"], both["batch_stats"])
    np.testing.assert_array_equal(plain_outputs.logit, both_outputs.logit)


@pytest.mark.parametrize(("adapter_dim", "hidden"), [(1, 2), (6, 6)])
def test_default_hidden_width_of_the_adapter(adapter_dim, hidden):
    """max(F // 2, D) with F = 4."""
    model = tiny(adapter_dim=adapter_dim)
    shapes = variable_shapes(model)
    assert shapes["params"]["distill_adapter"]["fc1"]["kernel"].shape == (4, hidden)


def test_initial_values():
    """He normal over fan-out, PyTorch's linear bound, BatchNorm (1, 0): spreads to 3 % over some 14,000 draws."""
    stages = cifar_resnet(8, widths=(40, 1, 1), stem=3).stages[:2]
    model = KDModel(Architecture(stages, feat_dim=40), 350, (0.5,), (0.25,))
    params = jax.jit(lambda key: model.init(key, PIXELS, train=False))(jax.random.key(0))["params"]
    block = params["layer1"]["block0"]
    np.testing.assert_allclose(np.std(block["conv2"]["kernel"]), np.sqrt(2 / (9 * 40)), rtol=0.03)
    np.testing.assert_allclose(np.std(block["conv1"]["kernel"]), np.sqrt(2 / (9 * 40)), rtol=0.1)  # fan-in is 27
    np.testing.assert_array_equal(block["bn1"]["scale"], 1)
    np.testing.assert_array_equal(block["bn1"]["bias"], 0)
    for leaf in params["classifier"].values():
        bound = 40**-0.5
        assert 0.98 * bound < np.max(np.abs(leaf)) <= bound
        np.testing.assert_allclose(np.std(leaf), bound / np.sqrt(3), rtol=0.03 if leaf.ndim == 2 else 0.1)


@pytest.mark.parametrize(
    ("options", "moving"),
    [
        ({}, {"stem", "layer1", "layer2", "layer3"}),
        ({"frozen_stages": 2}, {"layer2", "layer3"}),
        ({"frozen_stages": 4}, set()),
        ({"freeze_bn": True}, set()),
    ],
)
def test_frozen_stages_keep_their_statistics(options, moving):
    model = tiny()
    variables = random_variables(model)

    @jax.jit
    def run(variables):
        trained = model.apply(variables, PIXELS, train=True, **options, mutable=["batch_stats"])
        return *trained, model.apply(variables, PIXELS, train=False)

    outputs, updates, evaluation = run(variables)
    assert changed_stages(variables["batch_stats"], updates["batch_stats"]) == moving
    # A network whose statistics all stand still computes what it computes in evaluation.
    assert np.allclose(outputs.logit, evaluation.logit, rtol=1e-6) == (not moving)


def test_batch_statistics_are_of_the_whole_batch_over_an_axis():
    """Two halves over a mapped axis equal the batch in one piece: logits and new statistics to 1e-5."""
    model = tiny()
    variables = random_variables(model)

    def step(model, pixels):
        outputs, updates = model.apply(variables, pixels, train=True, mutable=["batch_stats"])
        return outputs.logit, updates

    logit, updates = jax.jit(lambda x: step(model, x))(PIXELS)
    halves = PIXELS.reshape(2, 2, *PIXELS.shape[1:])
    mapped = jax.vmap(lambda x: step(model.clone(axis_name="data"), x), axis_name="data")
    mapped_logit, mapped_updates = jax.jit(mapped)(halves)
    np.testing.assert_allclose(mapped_logit.reshape(logit.shape), logit, rtol=1e-5)
    for half in range(2):
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a[half], b, rtol=1e-5), mapped_updates, updates)


def test_bfloat16_keeps_float32_where_it_matters():
    model = tiny(adapter_dim=6, residual_adapter=True, dtype=jnp.bfloat16)
    variables = random_variables(model)

    outputs, updates = jax.jit(lambda v: model.apply(v, PIXELS, train=True, mutable=["batch_stats"]))(variables)
    fresh = variable_shapes(model)
    assert outputs.feat_4d.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((updates, fresh, outputs[1:]))} == {jnp.dtype("float32")}
    # The mean and the classifier are float32 computations on what the bfloat16 stages gave.
    feat_2d = np.asarray(outputs.feat_4d, np.float64).mean((1, 2))
    classifier = variables["params"]["classifier"]
    np.testing.assert_allclose(outputs.feat_2d, feat_2d, rtol=1e-6)
    np.testing.assert_allclose(outputs.logit, feat_2d @ classifier["kernel"] + classifier["bias"], rtol=1e-6)


def test_normalisation_fits_the_channels():
    """One value serves every channel; uint8 and float pixels are the same; another count is an error."""
    one, three = tiny(mean=(0.3,), std=(0.2,)), tiny(mean=(0.3,) * 3, std=(0.2,) * 3)
    variables = random_variables(one)
    logits = jax.jit(
        lambda: (
            one.apply(variables, PIXELS, train=False).logit,
            three.apply(variables, PIXELS.astype(np.float32), train=False).logit,
        )
    )()
    np.testing.assert_array_equal(*logits)
    with pytest.raises(ValueError, match="mean = .* has 3 values, the images have 1 channels: set mean to"):
        tiny().init(jax.random.key(0), PIXELS[..., :1], train=False)


def test_fusion_for_teachers_of_different_widths():
    fields = {
        "dim": 8,
        "num_heads": 2,
        "use_ib": True,
        "feature_norm": "none",
        "logvar_clip": 6.0,
        "min_std": 1e-3,
        "residual": True,
        "dropout": 0.1,
        "learnable_temperature": True,
        "base": "none",
    }
    narrow, wide = tiny(), tiny(cifar_resnet(8, widths=(2, 3, 6)))
    with pytest.raises(ValueError, match=r"different widths \[4, 6\]: set use_distillation_adapter=True"):
        build_ib_mbm_from_teachers([narrow, wide], **fields)
    joined = [teacher.clone(joins_probabilities=True) for teacher in (narrow, wide)]
    with pytest.raises(ValueError, match=r"features, their probabilities.*ib_mbm_kv.* different widths \[9, 11\]: set"):
        build_ib_mbm_from_teachers(joined, **fields)
    ib_mbm, head = build_ib_mbm_from_teachers([narrow.clone(adapter_dim=3), wide.clone(adapter_dim=3)], **fields)
    assert (ib_mbm.dim, ib_mbm.num_heads, ib_mbm.use_ib) == (8, 2, True)
    assert (head.num_classes, head.dim, head.dropout) == (5, 8, 0.1)


def test_images_too_small_for_a_network_are_refused():
    model = tiny(convnext((2, 2, 2, 2), (1, 1, 1, 1), 0.0, False))
    with pytest.raises(ValueError, match=r"images of 8x8 pixels leave a map of \(0, 0\).* dataset.small_input=True"):
        variable_shapes(model)


def test_the_classifier_reads_features_with_dropout():
    """Where keys are given, what it reads is dropped at the rate and else scaled up; feat_2d is not."""
    architecture = TINY._replace(dropout=0.5)
    model = tiny(architecture)
    variables = random_variables(model)
    keys = jax.random.split(jax.random.key(0), 4)
    run = jax.jit(lambda keys: model.apply(variables, PIXELS, train=False, dropout_keys=keys))
    plain, dropped = run(None), run(keys)
    np.testing.assert_array_equal(plain.feat_2d, dropped.feat_2d)
    kernel, bias = (np.asarray(variables["params"]["classifier"][leaf], np.float64) for leaf in ("kernel", "bias"))
    feats = np.asarray(plain.feat_2d, np.float64)
    masks = [np.array([mask >> i & 1 for i in range(4)]) for mask in range(16)]
    for b in range(4):  # every row is the classifier's answer to one of the sixteen ways to drop four features
        answers = np.stack([2 * mask * feats[b] @ kernel + bias for mask in masks])
        assert (np.abs(answers - dropped.logit[b]) / np.abs(plain.logit[b])).max(axis=1).min() < 1e-5
    assert not np.allclose(plain.logit, dropped.logit)
