"""The PyTorch version of the A- and B-Step computes what ours does: same weights, images and noise, in float32.

Tolerances are shares of a tensor's largest magnitude. Only one thing is not compared: the key bias of PyTorch's
attention changes nothing, its gradient is rounding noise, and ours has none.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

torch = pytest.importorskip("torch")

from networks import CLASSES, DIM, make_networks, make_split, random_variables
from torch_asib import ASIB, KDNetwork, Settings
from torch_networks import resnet

from asib_jax import a_step, b_step, recipe, streams
from asib_jax.models.resnet import cifar_resnet
from asib_jax.objectives import state
from asib_jax.objectives.step import make_train_step
from asib_jax.weights.torch_names import export_weights
from configs import l2_cccp

BATCH, SPLIT = 8, make_split(16)
SHAPES = {"student": (8, (3, 4, 5), 3), "teacher1": (14, (4, 5, 6), 4), "teacher2": (8, (3, 5, 7), 3)}  # depth, widths


@functools.cache
def make_nets(base: str):
    return make_networks(
        student=cifar_resnet(*SHAPES["student"]),
        teachers=(cifar_resnet(*SHAPES["teacher1"]), cifar_resnet(*SHAPES["teacher2"])),
        base=base,
    )


NETS = make_nets("none")
MODELS = {"student": NETS.student, **dict(zip(NETS.teacher_names, NETS.teachers))}
PREFIXES = {"student": "student", "teacher1": "teachers.0", "teacher2": "teachers.1"}
pytestmark = [pytest.mark.pytorch, pytest.mark.usefixtures("quick_compilation")]


@functools.cache
def make_recipe(base: str) -> recipe.Recipe:
    """The configuration at the width of the networks here, with bounds in force and a weight decay that shows."""
    config = l2_cccp.get_config()
    config.dataset.data_aug = 0
    config.distill_out_dim = config.ib_mbm_out_dim = DIM
    config.ib_mbm_n_head, config.synergy_base = 2, base
    config.kd_max_ratio, config.min_cw, config.student_weight_decay = 0.6, 0.8, 0.3
    return recipe.read(config)


def settings_of(options: recipe.Recipe) -> Settings:
    return Settings(**{name: getattr(options, name) for name in Settings._fields})


@functools.cache
def make_variables(base: str = "none"):
    """With smaller logits of the student: a softmax that is nearly one-hot hides errors."""
    variables = random_variables(make_nets(base))
    classifier = variables.params["student"]["classifier"]
    variables.params["student"]["classifier"] = {name: value / 8 for name, value in classifier.items()}
    return variables


def make_torch(base: str = "none", **options) -> ASIB:
    """PyTorch's networks with every parameter and statistic of `make_variables`."""
    torch.manual_seed(0)
    student, *teachers = (
        (resnet("basic", widths, (depth // 6,) * 3, (3, stem, 1, False), CLASSES), MODELS[name].mean, MODELS[name].std)
        for name, (depth, widths, stem) in SHAPES.items()
    )
    data = torch.tensor(SPLIT.image), torch.tensor(SPLIT.label, dtype=torch.int64)
    asib = ASIB(
        student,
        teachers,
        CLASSES,
        *data,
        settings=settings_of(make_recipe(base)),
        **{"device": "cpu", "pad": 0, "flip": False} | options,
    )
    asib.load_state_dict(to_torch(*make_variables(base)), strict=True)
    return asib


def to_torch(params: dict, batch_stats: dict = {}) -> dict[str, torch.Tensor]:
    """Our parameters, or their gradients or moments, under PyTorch's names; whole networks or parts of them."""
    out = {}
    for name in MODELS.keys() & params.keys():
        variables = {"params": params[name], "batch_stats": batch_stats.get(name, {})}
        exported = export_weights(variables, MODELS[name].architecture)
        out |= {f"{PREFIXES[name]}.backbone.{key}": value for key, value in exported.items()}
        adapter = params[name].get("distill_adapter", {})
        out |= layers({str(2 * i): layer for i, layer in enumerate(adapter.values())}, f"{PREFIXES[name]}.adapter")
    if "ib_mbm" in params:
        fusion = dict(params["ib_mbm"])
        attention = fusion.pop("attention")
        joint = [attention[name] for name in ("query", "key", "value")]
        out["ib_mbm.attention.in_proj_weight"] = np.concatenate([np.transpose(part["kernel"]) for part in joint])
        out["ib_mbm.attention.in_proj_bias"] = np.concatenate([part.get("bias", np.zeros(DIM)) for part in joint])
        out |= layers(fusion, "ib_mbm") | layers({"out_proj": attention["out"]}, "ib_mbm.attention")
        head = params["synergy_head"]
        out |= layers({"0": head["fc1"], "2": head["fc2"]}, "head")
        out |= {name[1:]: value for name, value in layers({"router": head.get("router", {})}, "").items()}
    return {name: torch.tensor(np.array(value)) for name, value in out.items()}


def layers(branch: dict, prefix: str) -> dict[str, np.ndarray]:
    """Dense layers and LayerNorms."""
    return {
        f"{prefix}.{name}.{'bias' if leaf == 'bias' else 'weight'}": np.transpose(value)
        for name, layer in branch.items()
        for leaf, value in layer.items()
    }


@functools.cache
def ours(kind: str, base: str = "none"):
    """Of the A- or B-Step: state, what is frozen, loss and metrics with gradients, training step."""
    variables, step = make_variables(base), {"a": a_step, "b": b_step}[kind]
    training = step.make_training(make_recipe(base), make_nets(base), variables.params, 0)
    current, frozen = state.begin(variables, training.mask, training.trained_stats, training.tx)

    def loss(params, controls, batch):
        value, (_, metrics) = training.loss(state.join(current._replace(params=params), frozen), controls, batch)
        return value, metrics

    return (
        current,
        frozen,
        jax.jit(jax.value_and_grad(loss, has_aux=True)),
        jax.jit(make_train_step(training.loss, training.tx)),
    )


def controls_of(**values) -> dict:
    keys = {f"{name}_key": streams.key(0, name) for name in ("augment", "noise", "dropout", "mix")}
    scalars = {name: jnp.float32(value) for name, value in values.items()}
    return {**scalars, **keys, "temperatures": jnp.ones(2), "step": jnp.int32(0)}


def batch_of(rows: np.ndarray) -> dict:
    return {name: values[rows] for name, values in SPLIT._asdict().items()}


def noise_of(rows: np.ndarray) -> torch.Tensor:
    """What our A-Step draws."""
    keys = streams.per_example(controls_of()["noise_key"], SPLIT.index[rows])
    return torch.tensor(np.array(jax.vmap(lambda key: jax.random.normal(key, (DIM,)))(keys)))


def gradients(asib: ASIB) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in asib.named_parameters() if parameter.grad is not None}


def assert_close(actual: dict, expected: dict, tolerance: float) -> None:
    """The same names, and every tensor within `tolerance` of its largest expected magnitude."""
    assert actual.keys() == expected.keys()
    for name in actual:
        a, e = (np.float64(tensors[name].detach()) for tensors in (actual, expected))
        if name.endswith("in_proj_bias"):
            a, e = (np.delete(bias, slice(DIM, 2 * DIM)) for bias in (a, e))
        assert a.shape == e.shape and np.abs(e).max() > 0, name
        error = np.abs(a - e).max() / np.abs(e).max()
        assert error <= tolerance, f"{name}: {error}"


def test_settings_are_those_of_the_configuration():
    """And what the PyTorch version has no code for is off there."""
    options = recipe.read(l2_cccp.get_config())
    assert Settings() == settings_of(options)
    a_terms, b_terms = a_step.terms_of(options), b_step.terms_of(options)
    assert (a_terms.kd_alpha, a_terms.cccp_alpha, a_terms.cccp_tau) == (0.35, 0.25, 4.0)
    assert (b_terms.ce_alpha, b_terms.kd_alpha, b_terms.kd_target) == (0.65, 0.35, "synergy")
    assert (options.optimizer, options.ib_mbm_feature_norm, options.ib_mbm_residual) == ("adamw", "none", True)
    off = (
        "feat_kd_alpha",
        "reg_lambda",
        "ib_mbm_reg_lambda",
        "label_smoothing",
        "ce_label_smoothing",
        "kd_ens_alpha",
        "use_loss_clamp",
        "use_disagree_weight",
        "mixup_alpha",
        "cutmix_alpha_distill",
        "kd_warmup_epochs",
        "distill_hidden_dim",
        "use_partial_freeze",
        "student_freeze_bn",
        "train_distill_adapter_only",
        "use_teacher_finetuning",
        "synergy_head_dropout",
        "ib_mbm_teacher_dropout",
        "synergy_temp_learnable",
        "a_step_weight_decay",
    )
    assert not any(getattr(options, name) for name in off) and not options.model.student.use_adapter


@pytest.mark.parametrize(
    "tau, beta, student_open, certain, base",
    [
        (3.0, 0.02, True, True, "none"),
        (5.5, 0.5, False, True, "none"),
        (2.0, 0.0, False, False, "none"),
        (3.0, 0.02, True, True, "avg"),
        (3.0, 0.02, True, True, "mixture"),
    ],
)
def test_a_loss(tau, beta, student_open, certain, base):
    """Loss and gradient of every trained parameter, 1e-4, with gates open and shut; nothing else gets a gradient."""
    asib, rows = make_torch(base), np.arange(BATCH)
    current, _, value_and_grad, _ = ours("a", base)
    controls = controls_of(tau=tau, beta=beta, open=student_open, certain=certain)
    (expected, _), grads = value_and_grad(current.params, controls, batch_of(rows))
    loss, _ = asib.a_loss(
        *asib.batch(torch.tensor(rows)), noise_of(rows), tau=tau, beta=beta, student_open=student_open, certain=certain
    )
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-4)
    assert_close(gradients(asib), to_torch(grads), 1e-4)


@pytest.mark.parametrize(
    "tau, gate, bounded, base",
    [(4.0, True, True, "none"), (0.5, True, False, "none"), (3.0, False, True, "none"), (4.0, True, True, "mixture")],
)
def test_b_loss(tau, gate, bounded, base):
    """The same with both targets, and with KD's bound in force or not."""
    asib, rows = make_torch(base), np.arange(BATCH)
    current, _, value_and_grad, _ = ours("b", base)
    controls = controls_of(tau=tau, gate=gate, average_share=0, ramp=1, ratio_on=1)
    (expected, metrics), grads = value_and_grad(current.params, controls, batch_of(rows))
    assert (metrics["kd_ratio"] < 0.9) == bounded
    loss, _ = asib.b_loss(*asib.batch(torch.tensor(rows)), tau=tau, gate=gate)
    loss.backward()
    np.testing.assert_allclose(loss.item(), expected, rtol=1e-4)
    assert_close(gradients(asib), to_torch(grads), 1e-4)


@pytest.mark.parametrize(
    "kind, lr, controls, ours_only, theirs_only",
    [
        ("a", 1e-3, {"tau": 3.0, "beta": 0.02, "certain": True}, {"open": True}, {"student_open": True}),
        ("b", 1e-2, {"tau": 4.0, "gate": True}, {"average_share": 0, "ramp": 1, "ratio_on": 1}, {}),
    ],
)
def test_two_training_steps(kind, lr, controls, ours_only, theirs_only):
    """Every parameter's change to 1e-3, Adam's moments and BatchNorm's statistics to 1e-4.

    Two steps, because Adam's first one is the same however long the clipped gradient is.
    """
    asib = make_torch()
    take_step, optimizer = {"a": (asib.a_step, asib.a_optimizer), "b": (asib.b_step, asib.b_optimizer)}[kind]
    current, frozen, _, our_step = ours(kind)
    for rows, rate in ((np.arange(BATCH), lr), (np.arange(BATCH, 2 * BATCH), lr / 2)):
        current, metrics = our_step(current, frozen, controls_of(**controls, **ours_only, lr=rate), batch_of(rows))
        drawn = {"noise": noise_of(rows)} if kind == "a" else {}
        result = take_step(torch.tensor(rows), lr=rate, **controls, **theirs_only, **drawn)
        np.testing.assert_allclose(result, [metrics["loss"], metrics["acc"]], rtol=1e-4)
    adam = next(part for part in current.opt_state if isinstance(part, optax.ScaleByAdamState))
    for moment, key in ((adam.mu, "exp_avg"), (adam.nu, "exp_avg_sq")):
        theirs = {name: optimizer.state[asib.get_parameter(name)][key] for name in gradients(asib)}
        assert_close(theirs, to_torch(moment), 1e-4)
    before, after = to_torch(*make_variables()), to_torch(current.params, current.batch_stats)
    statistics = {name for name in after if "running" in name}
    parameters = after.keys() - statistics - {name for name in after if name.endswith("num_batches_tracked")}
    changes = {name: asib.get_parameter(name) - before[name] for name in parameters}
    assert_close(changes, {name: after[name] - before[name] for name in parameters}, 1e-3)
    assert_close(
        {name: with_biased_variance(name, asib.get_buffer(name), before[name]) for name in statistics},
        {name: after[name] for name in statistics},
        1e-4,
    )
    for name in before.keys() - after.keys():  # what stands still
        assert torch.equal(asib.state_dict()[name], before[name]), name


def with_biased_variance(name: str, now: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """PyTorch's running variance after two steps as if it took in the biased variance of a batch, which ours does."""
    if not name.endswith("running_var"):
        return now
    size = {"bn1": 8, "layer1": 8, "layer2": 4, "layer3": 2}[name.split(".")[2]]
    old = 0.9**2 * before
    return old + (now - old) * (1 - 1 / (BATCH * size**2))


def test_crop_and_flip():
    """Every batch entry is one of its image's 9 windows of the padded image or a mirror of one; all 18 occur, each as
    often as the others (5 standard deviations of 3600 draws). The label is its image's."""
    asib, draws = make_torch(pad=None, flip=True), 3600
    for row in (3, 14):
        padded = np.pad(SPLIT.image[row], ((1, 1), (1, 1), (0, 0))).transpose(2, 0, 1)
        windows = [padded[:, top : top + 8, left : left + 8] for top in range(3) for left in range(3)]
        possible = [window.tobytes() for window in windows] + [window[..., ::-1].tobytes() for window in windows]
        assert len(set(possible)) == 18
        pixels, labels = asib.batch(torch.full((draws,), row))
        seen = [possible.index(image.tobytes()) for image in pixels.numpy()]
        counts = np.bincount(seen, minlength=18)
        assert np.abs(counts - draws / 18).max() < 5 * np.sqrt(draws / 18)
        assert (labels == int(SPLIT.label[row])).all()
        assert pixels.is_contiguous(memory_format=torch.channels_last)  # or every network would reorder it
    rows = torch.tensor([5, 0, 9])
    np.testing.assert_array_equal(make_torch().batch(rows)[0], SPLIT.image[rows].transpose(0, 3, 1, 2))


def test_evaluation():
    """Exactly the shares of correct predictions of our networks applied one by one; the last batch is not full."""
    variables, pixels = make_variables(), jnp.float32(SPLIT.image)

    @jax.jit
    def predictions(pixels):
        out = {name: model.apply(variables.of(name), pixels, train=False) for name, model in MODELS.items()}
        kv = jnp.stack([out[name].distill_feat for name in NETS.teacher_names], axis=1)
        mu = NETS.ib_mbm.apply({"params": variables.params["ib_mbm"]}, out["student"].distill_feat, kv).mu
        logits = {
            "student": out["student"].logit,
            "average": (out["teacher1"].logit + out["teacher2"].logit) / 2,
            "synergy": NETS.synergy_head.apply({"params": variables.params["synergy_head"]}, mu),
        }
        return {name: value.argmax(-1) for name, value in logits.items()}

    labels = np.array(predictions(pixels)["synergy"])
    labels[:5] = (labels[:5] + 1) % CLASSES
    expected = {name: np.mean(np.asarray(value) == labels) for name, value in predictions(pixels).items()}
    actual = make_torch().evaluate(torch.tensor(SPLIT.image), torch.tensor(labels), batch_size=6)
    assert actual == expected and expected["synergy"] == 11 / 16 and len(set(expected.values())) > 1


def test_bfloat16():
    """Losses within 2 % of float32's, from bfloat16 convolutions; what is trained stays float32."""
    wide, narrow = make_torch(), make_torch(dtype=torch.bfloat16)
    rows, noise = torch.arange(BATCH), noise_of(np.arange(BATCH))
    for step, controls in (
        ("a_step", {"beta": 0.02, "student_open": True, "certain": True, "noise": noise}),
        ("b_step", {"gate": True}),
    ):
        expected, actual = (getattr(asib, step)(rows, lr=0.0, tau=4.0, **controls)[0] for asib in (wide, narrow))
        assert actual.dtype == torch.float32 and actual != expected
        np.testing.assert_allclose(actual, expected, rtol=0.02)
    trained = [p for optimizer in (narrow.a_optimizer, narrow.b_optimizer) for p in optimizer.state]
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in trained)
    assert {p.dtype for p in narrow.teachers[0].backbone.conv1.parameters()} == {torch.bfloat16}


def test_a_network_of_torchvision():
    """feat_2d is what the classifier reads, of pixels normalised by the given mean and standard deviation: 1e-5."""
    import torchvision

    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    network = KDNetwork(torchvision.models.mobilenet_v3_small(num_classes=CLASSES), mean, std, DIM)
    pixels = torch.tensor(SPLIT.image[:4]).permute(0, 3, 1, 2)
    with torch.no_grad():
        feature, logits = network.eval()(pixels)
        normalised = (pixels / 255 - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
        torch.testing.assert_close(logits, network.backbone(normalised), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(logits, network.backbone.classifier[-1](feature), rtol=1e-5, atol=1e-5)
        assert network.adapter(feature).shape == (4, DIM) and feature.std() > 0
