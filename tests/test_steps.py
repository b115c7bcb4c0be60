"""The A- and B-Step losses against float64 numpy, computed from the raw outputs of networks applied one by one.

Values to 2e-5 relative. Every case has its own weights and scalars, so that none can stand in for another.
"""

import collections
import functools
from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import CLASSES, DIM, convolutions, make_batch, make_networks, random_variables

from asib_jax import streams
from asib_jax.data.augment import augment, mix
from asib_jax.models.ensemble import Mode, StudentOutputs, TeacherOutputs, Variables
from asib_jax.models.ib_mbm import sample
from asib_jax.objectives import freezing, losses, optimizers, state, targets
from asib_jax.objectives.a_loss import ATerms, a_loss, mean_square
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.step import make_train_step

BATCH = {**make_batch(), "label": np.array([0, 1, 0, 3, 4, 0, 1, 3], np.int32)}  # some the teachers know, some not
ONE_HOT = np.eye(CLASSES)
THREE_TEACHERS = (convolutions(3, 5), convolutions(4, 5), convolutions(5))
A_TERMS = ATerms(
    synergy_ce_alpha=0.6,
    synergy_kd_alpha=1.1,
    kd_alpha=0.35,
    cccp_alpha=0.25,
    cccp_tau=4.0,
    feat_kd_alpha=0.0,
    reg_lambda=0.0,
    ib_mbm_reg_lambda=0.0,
    label_smoothing=0.0,
    min_cw=0.1,
    data_aug=0,
)
B_TERMS = BTerms(data_aug=0, ce_alpha=0.65, kd_alpha=0.35, kd_target="synergy", min_cw=0.1)
pytestmark = pytest.mark.usefixtures("quick_compilation")


def a_controls(**changes):
    values = {"tau": 3.0, "beta": 0.02, "open": 1.0, "certain": 1.0, "temperatures": np.ones(2)} | changes
    return {
        **jax.tree.map(jnp.float32, values),
        "augment_key": streams.key(0, "augment"),
        "noise_key": streams.key(0, "noise"),
        "dropout_key": streams.key(0, "dropout"),
    }


def b_controls(**changes):
    values = {"tau": 3.0, "gate": 1.0, "average_share": 0.0, "ramp": 1.0, "ratio_on": 1.0, "temperatures": np.ones(2)}
    values |= changes
    return {
        **jax.tree.map(jnp.float32, values),
        "step": jnp.int32(5),
        "augment_key": streams.key(0, "augment"),
        "mix_key": streams.key(0, "mix"),
        "dropout_key": streams.key(0, "dropout"),
    }


@functools.cache
def make(**options):
    nets = make_networks(**options)
    return nets, random_variables(nets)


def log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def softmax(x):
    return np.exp(log_softmax(x))


def cross_entropy(logits, labels, smoothing=0.0):
    return -(((1 - smoothing) * ONE_HOT[labels] + smoothing / CLASSES) * log_softmax(logits)).sum(-1)


def kd(logits, target, tau):
    return tau**2 * (softmax(target / tau) * (log_softmax(target / tau) - log_softmax(logits / tau))).sum(-1)


def mean_of_squares(tree):
    return np.mean([np.mean(np.float64(leaf) ** 2) for leaf in jax.tree.leaves(tree)])


def certainty(logvar, min_cw):
    precision = np.exp(-logvar.mean(-1))
    return np.clip(precision / precision.mean(), min_cw, 1 / min_cw)


def raw_outputs(nets, variables, pixels, student_mode):
    """Everything the networks say of the pixels, in float64, each network applied by itself."""
    student = nets.student.apply(variables.of("student"), pixels, **student_mode, mutable=["batch_stats"])[0]
    teachers = [
        model.apply(variables.of(name), pixels, train=False) for name, model in zip(nets.teacher_names, nets.teachers)
    ]
    read = [t.distill_feat if t.distill_feat is not None else t.feat_2d for t in teachers]
    query = getattr(student, nets.student_feature)
    latent = nets.ib_mbm.apply({"params": variables.params["ib_mbm"]}, query, jnp.stack(read, axis=1))
    return jax.tree.map(
        np.float64,
        {
            "student": student.logit,
            "query": query,
            "teachers": [t.logit for t in teachers],
            "mu": latent.mu,
            "logvar": latent.logvar,
            "clipped": latent.clipped,
        },
    )


def head(nets, variables, z):
    params = {"params": variables.params["synergy_head"]}
    return np.float64(nets.synergy_head.apply(params, jnp.float32(z)))


def divided(out, controls):
    """The teachers' logits, each by its own temperature [T, B, C]."""
    return np.stack(out["teachers"]) / np.float64(controls["temperatures"])[:, None, None]


# The A-Step ----------------------------------------------------------------------------------------------------------


def a_reference(nets, variables, controls, terms, trained=None):
    """The terms of SPEC 4 by name, those of weight 0 as 0; synergy logits; what else is watched of the bottleneck."""
    pixels = augment(controls["augment_key"], BATCH["index"], BATCH["image"], terms.data_aug)
    out = raw_outputs(nets, variables, pixels, {"train": False})
    c = {name: float(value) for name, value in controls.items() if value.ndim == 0 and "key" not in name}
    z, w, watched = out["mu"], np.ones(len(pixels)), {}
    if nets.ib_mbm.use_ib:
        keys = [jax.random.fold_in(controls["noise_key"], index) for index in BATCH["index"]]
        noise = np.stack([jax.random.normal(key, (DIM,)) for key in keys])
        z = z + np.exp(out["logvar"] / 2) * np.float64(noise)
        w = certainty(out["logvar"], terms.min_cw) if c["certain"] else w
    logits, average = head(nets, variables, z), divided(out, controls).mean(axis=0)
    parts = {
        "ce": terms.synergy_ce_alpha * np.mean(w * cross_entropy(logits, BATCH["label"], terms.label_smoothing)),
        "kd_average": terms.synergy_kd_alpha * np.mean(w * kd(logits, average, c["tau"])),
        "kd_student": c["open"] * terms.kd_alpha * np.mean(w * kd(logits, out["student"], c["tau"])),
        "cccp": c["open"] * terms.cccp_alpha * np.mean(kd(logits, out["student"], terms.cccp_tau)),
        "feat_kd": (
            terms.feat_kd_alpha * np.mean(w * ((out["query"] - out["mu"]) ** 2).sum(-1)) if terms.feat_kd_alpha else 0
        ),
        "ib_mbm_reg": terms.ib_mbm_reg_lambda
        * mean_of_squares([variables.params[name] for name in ("ib_mbm", "synergy_head")]),
        "reg": terms.reg_lambda * mean_of_squares(trained) if trained else 0,
    }
    if nets.ib_mbm.use_ib:
        logvar = out["logvar"]
        watched = {"certainty_sd": np.sqrt(np.mean((w - 1) ** 2)), "clipped": np.mean(out["clipped"])}
        parts["gaussian_kl"] = c["beta"] * np.mean(-0.5 * (1 + logvar - out["mu"] ** 2 - np.exp(logvar)).sum(-1))
    return parts, logits, watched


def run_a(nets, variables, controls, terms):
    """`reg_lambda` acts on one teacher's adapter."""
    return a_loss(
        variables,
        controls,
        BATCH,
        nets=nets,
        terms=terms,
        trained=lambda params: [params["teacher1"]["distill_adapter"]],
    )


@pytest.mark.parametrize(
    "terms, controls, nets",
    [
        ({}, {}, {}),
        ({}, {"tau": 5.5, "beta": 0.5}, {}),
        ({"min_cw": 0.8}, {}, {}),
        ({}, {"temperatures": np.array([3.0, 0.5])}, {}),
        ({}, {"open": 0.0}, {}),
        ({}, {"open": 0.0, "certain": 0.0, "beta": 0.0}, {}),
        ({"synergy_kd_alpha": 0.0, "label_smoothing": 0.2}, {}, {}),
        ({"kd_alpha": 0.0, "cccp_alpha": 0.7, "cccp_tau": 1.5}, {}, {}),
        ({"cccp_alpha": 0.0, "feat_kd_alpha": 0.3}, {}, {}),
        ({"ib_mbm_reg_lambda": 0.1, "reg_lambda": 0.4}, {}, {}),
        ({"data_aug": 1}, {}, {"use_ib": False}),
        (
            {},
            {"temperatures": np.ones(3)},
            {"adapter_dim": 0, "student_feature": "feat_2d", "teachers": THREE_TEACHERS},
        ),
    ],
    ids=[
        "all",
        "schedules",
        "weights_clipped",
        "temperatures",
        "gate_shut",
        "synergy_only",
        "smoothed_labels",
        "cccp",
        "feature_kd",
        "regularised",
        "without_ib",
        "three_teachers_without_adapters",
    ],
)
def test_a_loss_equals_numpy(terms, controls, nets):
    terms, controls, (nets, variables) = replace(A_TERMS, **terms), a_controls(**controls), make(**nets)
    trained = variables.params["teacher1"]["distill_adapter"] if terms.reg_lambda else None
    loss, (_, metrics) = run_a(nets, variables, controls, terms)
    parts, logits, watched = a_reference(nets, variables, controls, terms, trained)
    for name, value in (parts | watched).items():
        np.testing.assert_allclose(metrics.get(name, 0.0), value, rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(loss, sum(parts.values()), rtol=2e-5)
    np.testing.assert_allclose(metrics["loss"], loss)
    np.testing.assert_allclose(metrics["acc"], np.mean(logits.argmax(-1) == BATCH["label"]), rtol=1e-6)


def test_a_loss_weighs_samples_by_certainty_without_gradient():
    """The gradient is that of the same loss with the weights as plain numbers (SPEC 10.4), to 1e-5 of its maximum."""
    nets, variables = make()
    terms = replace(A_TERMS, synergy_kd_alpha=0.0, kd_alpha=0.0, cccp_alpha=0.0)
    controls = a_controls(beta=0.0)
    pixels = jnp.float32(BATCH["image"])
    out = raw_outputs(nets, variables, pixels, {"train": False})
    weight = certainty(out["logvar"], terms.min_cw)
    keys = streams.per_example(controls["noise_key"], BATCH["index"])
    read = [
        model.apply(variables.of(name), pixels, train=False).distill_feat
        for name, model in zip(nets.teacher_names, nets.teachers)
    ]

    def by_hand(params, share):
        """`share` of the weight has its gradient, the rest is a plain number; the value is the same."""
        latent = nets.ib_mbm.apply({"params": params}, jnp.float32(out["query"]), jnp.stack(read, axis=1))
        z = sample(latent, jax.vmap(lambda key: jax.random.normal(key, (DIM,)))(keys))
        logits = nets.synergy_head.apply({"params": variables.params["synergy_head"]}, z)
        precision = jnp.exp(-jnp.mean(latent.logvar, axis=-1))
        relative = jnp.clip(precision / jnp.mean(precision), terms.min_cw, 1 / terms.min_cw)
        w = share * relative + (1 - share) * jnp.float32(weight)
        return 0.6 * jnp.mean(w * losses.cross_entropy(logits, BATCH["label"]))

    def ours(params):
        return run_a(nets, Variables({**variables.params, "ib_mbm": params}, variables.batch_stats), controls, terms)[0]

    def logvar_kernel(gradient):
        return np.asarray(gradient["logvar"]["kernel"])

    params, reference = variables.params["ib_mbm"], jax.jit(jax.grad(by_hand))
    actual = logvar_kernel(jax.jit(jax.grad(ours))(params))
    np.testing.assert_allclose(actual, logvar_kernel(reference(params, 0.0)), atol=1e-5 * np.abs(actual).max())
    assert np.abs(logvar_kernel(reference(params, 1.0)) - actual).max() > 0.01 * np.abs(actual).max()
    assert weight.std() > 0.1


def test_feature_kd_of_the_a_step_moves_the_code_and_not_the_query():
    """Alone, it gives the bias of mu 2 alpha mean(w (mu - s)), to 1e-5."""
    nets, variables = make()
    terms = replace(
        A_TERMS, synergy_ce_alpha=0.0, synergy_kd_alpha=0.0, kd_alpha=0.0, cccp_alpha=0.0, feat_kd_alpha=0.3
    )
    gradient = jax.jit(
        jax.grad(
            lambda fusion: run_a(
                nets,
                Variables({**variables.params, "ib_mbm": fusion}, variables.batch_stats),
                a_controls(beta=0.0),
                terms,
            )[0]
        )
    )(variables.params["ib_mbm"])
    out = raw_outputs(nets, variables, jnp.float32(BATCH["image"]), {"train": False})
    w = certainty(out["logvar"], terms.min_cw)[:, None]
    np.testing.assert_allclose(
        gradient["mu"]["bias"], (2 * 0.3 * w * (out["mu"] - out["query"])).mean(0), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("classes", [(), ((0, 1, 2), (2, 3, 4))], ids=["all", "some"])
def test_a_teacher_left_out_is_no_key_and_not_in_the_base(classes):
    """The cross entropy of every example with the keys and the mixture of the teachers that it kept, by numpy; who that
    is depends on the example alone. A class that one teacher knows keeps it. Nothing is left out at rate 0."""
    rate, terms = 0.6, replace(A_TERMS, synergy_kd_alpha=0.0, kd_alpha=0.0, cccp_alpha=0.0, synergy_ce_alpha=1.0)
    nets, variables = make(use_ib=False, base="mixture", classes=classes)
    controls = a_controls()
    keys = streams.branch(streams.per_example(controls["dropout_key"], BATCH["index"]), "teachers")
    kept = np.array([jax.random.bernoulli(key, 1 - rate, (2,)) for key in keys])
    assert {tuple(row) for row in kept} == {(False, False), (True, False), (False, True), (True, True)}
    kept[~kept.any(axis=1)] = True
    out = [
        model.apply(variables.of(name), jnp.float32(BATCH["image"]), train=False)
        for name, model in zip(("student", *nets.teacher_names), (nets.student, *nets.teachers))
    ]
    kv = np.stack([teacher.distill_feat for teacher in out[1:]], axis=1) * kept[..., None]
    mu = nets.ib_mbm.apply({"params": variables.params["ib_mbm"]}, out[0].distill_feat, kv).mu
    router = variables.params["synergy_head"]["router"]
    pi = softmax(np.float64(mu) @ router["kernel"] + router["bias"])
    p = softmax(np.stack([np.float64(teacher.logit) for teacher in out[1:]], axis=1))
    speak = nets.known & kept[..., None]
    speak = np.where(speak.any(axis=1, keepdims=True), speak, nets.known)
    logits = head(nets, variables, mu) + np.log((pi[..., None] * p * speak).sum(axis=1))
    expected = np.mean(cross_entropy(logits, BATCH["label"], 0.0))
    for given, value in ((rate, expected), (0.0, None)):
        loss, (_, metrics) = run_a(nets, variables, controls, replace(terms, teacher_dropout=given))
        if value is None:
            assert loss == run_a(nets, variables, controls, terms)[0] != expected
        else:
            np.testing.assert_allclose(metrics["ce"], value, rtol=1e-5)


def test_a_student_that_is_no_target_cannot_reach_the_fusion_network():
    """Its logits broken, the gate shut: loss and gradient are bitwise those without KD towards the student."""
    nets, variables = make()
    feat = raw_outputs(nets, variables, jnp.float32(BATCH["image"]), {"train": False})["student"]
    batch = {**BATCH, "student": StudentOutputs(jnp.ones((len(feat), 4)), jnp.full((len(feat), CLASSES), jnp.nan))}

    def of(**terms):
        return jax.jit(
            jax.value_and_grad(
                lambda fusion: a_loss(
                    Variables({**variables.params, **fusion}, variables.batch_stats),
                    a_controls(open=0.0),
                    batch,
                    nets=nets,
                    terms=replace(A_TERMS, **terms),
                    trained=None,
                )[0]
            )
        )({name: variables.params[name] for name in ("ib_mbm", "synergy_head")})

    shut, without = of(), of(kd_alpha=0.0, cccp_alpha=0.0)
    jax.tree.map(np.testing.assert_array_equal, shut, without)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(shut))


def test_a_bottleneck_that_does_not_count_yet_may_overflow():
    """Codes of 1e20, whose squares float32 has not, and a head that brings them back to 1: with beta 0 all else counts
    as it would, with beta 0.02 the loss is infinite."""
    nets, variables = make()
    fusion, head = (jax.tree.map(np.copy, variables.params[name]) for name in ("ib_mbm", "synergy_head"))
    fusion["mu"] = {"kernel": 0 * fusion["mu"]["kernel"], "bias": np.full_like(fusion["mu"]["bias"], 1e20)}
    head["fc1"]["kernel"] *= np.float32(1e-20)
    broken = Variables({**variables.params, "ib_mbm": fusion, "synergy_head": head}, variables.batch_stats)
    warm, later = (run_a(nets, broken, a_controls(beta=beta), A_TERMS) for beta in (0.0, 0.02))
    assert warm[1][1]["gaussian_kl"] == 0 and np.isinf(later[0])
    np.testing.assert_allclose(warm[0], sum(warm[1][1][name] for name in ("ce", "kd_average", "kd_student", "cccp")))


def test_a_loss_draws_noise_and_dropout_from_their_keys():
    """Sampling and dropout happen in the A-Step: another key, another code; the same keys, bitwise the same loss."""
    nets, variables = make(dropout=0.5)

    def metrics(**keys):
        return run_a(nets, variables, a_controls() | keys, A_TERMS)[1][1]

    one, again = metrics(), metrics()
    for other in (metrics(noise_key=streams.key(1, "noise")), metrics(dropout_key=streams.key(1, "dropout"))):
        for name in ("ce", "kd_average"):
            assert one[name] == again[name] and abs(one[name] - other[name]) > 1e-3
        assert one["gaussian_kl"] == other["gaussian_kl"]  # of mu and logvar, before any noise


# The B-Step ----------------------------------------------------------------------------------------------------------


def b_reference(nets, variables, controls, terms, batch=BATCH):
    """The loss of SPEC 5, its weighted parts by name (those of weight 0 are 0), and what else is logged."""
    c = {name: float(value) for name, value in controls.items() if value.ndim == 0 and "key" not in name}
    labels = batch["label"]
    pixels = augment(controls["augment_key"], batch["index"], batch["image"], terms.data_aug)
    pixels, labels_b, lam = mix(
        jax.random.fold_in(controls["mix_key"], 5),
        pixels,
        labels,
        mixup_alpha=terms.mixup_alpha,
        cutmix_alpha=terms.cutmix_alpha,
    )
    out, lam = raw_outputs(nets, variables, pixels, {"train": True}), float(lam)
    ce = np.mean(
        lam * cross_entropy(out["student"], labels, terms.label_smoothing)
        + (1 - lam) * cross_entropy(out["student"], labels_b, terms.label_smoothing)
    )
    teachers = divided(out, controls)
    average, predictions = teachers.mean(0), teachers.argmax(-1)
    confidence = softmax(teachers / c["tau"]).max(-1)[..., None]
    share = c["average_share"] if c["gate"] else 1.0
    target = {
        "avg": average,
        "weighted_conf": (confidence * teachers).sum(0) / confidence.sum(0),
        "teacher": teachers[terms.kd_teacher_index],
        "synergy": (1 - share) * head(nets, variables, out["mu"]) + share * average,
    }[terms.kd_target]
    if terms.student_share:
        target = (1 - c["student_share"]) * target + c["student_share"] * out["student"]
    w = certainty(out["logvar"], terms.min_cw) if terms.uses_fusion and nets.ib_mbm.use_ib else np.ones(len(labels))
    disagree = {
        "": np.zeros(len(labels), bool),
        "pred": predictions[0] != predictions[1],
        "both_wrong": (predictions != labels).all(0),
        "any_wrong": (predictions != labels).any(0),
    }
    v = w * np.where(disagree[terms.disagree_mode], terms.disagree_lambda_high, terms.disagree_lambda_low)
    per_sample = kd(out["student"], target, c["tau"])
    bound = terms.kd_max_ratio * ce
    r = bound / max(per_sample.mean(), bound) if c["ratio_on"] and terms.kd_max_ratio else 1.0
    feat_kd = np.mean(w * ((out["query"] - out["mu"]) ** 2).sum(-1)) if terms.feat_kd_alpha else 0.0
    parts = {
        "ce": terms.ce_alpha * ce,
        "feat_kd": terms.feat_kd_alpha * feat_kd,
        "kd": r * c["ramp"] * terms.kd_alpha * np.mean(v / v.mean() * per_sample),
    }
    loss = sum(parts.values())
    loss *= min(1, terms.loss_clamp_max / loss) if terms.loss_clamp_max else 1
    return parts | {
        "loss": loss,
        "kd_ratio": r,
        "acc": np.mean(out["student"].argmax(-1) == labels),
        "target_acc": np.mean(target.argmax(-1) == labels),
    }


@pytest.mark.parametrize(
    "terms, controls, nets",
    [
        ({}, {}, {}),
        ({}, {"tau": 1.7}, {"use_ib": False, "student_feature": "feat_2d"}),
        ({}, {"average_share": 0.3}, {}),
        ({}, {"average_share": 0.3, "temperatures": np.array([0.5, 7.0])}, {}),
        ({}, {"gate": 0.0, "average_share": 0.3}, {}),
        ({"kd_target": "avg"}, {}, {}),
        ({"kd_target": "weighted_conf"}, {}, {}),
        ({"kd_target": "weighted_conf"}, {"temperatures": np.array([3.0, 0.5])}, {}),
        ({"kd_target": "teacher", "kd_teacher_index": 1}, {}, {}),
        ({"kd_target": "teacher", "kd_teacher_index": 1}, {"temperatures": np.array([3.0, 0.5])}, {}),
        ({"student_share": True}, {"student_share": 0.4, "average_share": 0.3}, {}),
        ({"student_share": True, "kd_target": "teacher"}, {"student_share": 0.9}, {}),
        ({"student_share": True, "kd_target": "avg"}, {"student_share": 0.0}, {}),
        ({"kd_max_ratio": 0.2}, {"ramp": 0.5, "ratio_on": 0.0}, {}),
        ({"kd_max_ratio": 0.2}, {}, {}),
        ({"kd_max_ratio": 50.0}, {}, {}),
        ({"disagree_mode": "pred", "disagree_lambda_high": 3.0, "disagree_lambda_low": 0.5}, {}, {}),
        ({"disagree_mode": "both_wrong", "disagree_lambda_high": 3.0, "disagree_lambda_low": 0.0}, {}, {}),
        ({"disagree_mode": "any_wrong", "disagree_lambda_high": 0.2, "kd_target": "avg"}, {}, {}),
        ({"feat_kd_alpha": 0.4}, {}, {}),
        ({"feat_kd_alpha": 0.4, "kd_alpha": 0.0}, {}, {}),
        ({"loss_clamp_max": 0.7}, {}, {}),
        ({"loss_clamp_max": 1000.0, "label_smoothing": 0.2}, {}, {}),
        ({"ce_alpha": 0.0, "kd_alpha": 1.0, "min_cw": 0.8}, {}, {}),
        ({"ce_alpha": 1.0, "kd_alpha": 0.0}, {}, {}),
        ({"mixup_alpha": 1.0, "data_aug": 1}, {}, {}),
        (
            {"cutmix_alpha": 1.0, "label_smoothing": 0.1, "disagree_mode": "any_wrong", "disagree_lambda_high": 3.0},
            {},
            {},
        ),
    ],
    ids=[
        "synergy",
        "without_ib",
        "share_of_average",
        "share_of_average_temperatures",
        "gate_shut",
        "avg",
        "weighted_conf",
        "weighted_conf_temperatures",
        "teacher",
        "teacher_temperatures",
        "student_share",
        "student_share_and_teacher",
        "student_share_of_none",
        "ramp",
        "ratio",
        "ratio_inactive",
        "pred",
        "both_wrong",
        "any_wrong",
        "feature_kd",
        "feature_kd_alone",
        "clamp",
        "clamp_inactive",
        "kd_alone",
        "ce_alone",
        "mixup",
        "cutmix",
    ],
)
def test_b_loss_equals_numpy(terms, controls, nets):
    terms, controls, (nets, variables) = replace(B_TERMS, **terms), b_controls(**controls), make(**nets)
    loss, (_, metrics) = b_loss(variables, controls, BATCH, nets=nets, terms=terms)
    wanted = b_reference(nets, variables, controls, terms)
    assert {"loss", "ce", "acc"} <= metrics.keys() <= wanted.keys() and ("kd" in metrics) == (terms.kd_alpha > 0)
    for name, value in metrics.items():
        np.testing.assert_allclose(value, wanted[name], rtol=2e-5, err_msg=name)
    np.testing.assert_allclose(loss, metrics["loss"])


@pytest.mark.parametrize(
    "controls", [{"gate": 0.0, "average_share": 0.3}, {"average_share": 1.0}], ids=["gate_shut", "no_share"]
)
@pytest.mark.parametrize("use_ib", [False, True])
def test_synergy_without_a_share_cannot_reach_the_student(controls, use_ib):
    """A broken head, whose share in the target is none: loss and gradient are those of the teachers' average, but for
    what XLA makes of two programs (min_cw=1 keeps the bottleneck's weights at 1)."""
    nets, variables = make(use_ib=use_ib)
    broken = jax.tree.map(lambda leaf: np.full_like(leaf, np.nan), variables.params["synergy_head"])

    def of(kd_target, head):
        terms = replace(B_TERMS, kd_target=kd_target, min_cw=1.0, kd_max_ratio=0.2)
        return jax.jit(
            jax.value_and_grad(
                lambda student: b_loss(
                    Variables({**variables.params, "synergy_head": head, "student": student}, variables.batch_stats),
                    b_controls(**controls),
                    BATCH,
                    nets=nets,
                    terms=terms,
                )[0]
            )
        )(variables.params["student"])

    shut, average = of("synergy", broken), of("avg", broken)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), shut, average)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(shut))


@pytest.mark.parametrize("kd_target", ["synergy", *targets.KD_TARGETS])
def test_b_loss_of_teachers_of_some_classes(kd_target):
    """Nobody knows class 4, of which there are images; what is averaged is what is known (by hand for `avg`)."""
    classes = ((0, 1, 2), (1, 2, 3))
    nets, variables = make(classes=classes)
    terms = replace(B_TERMS, kd_target=kd_target, kd_teacher_index=1, student_share=True, disagree_mode="pred")
    terms = replace(terms, disagree_lambda_high=3.0)
    controls = b_controls(student_share=0.4)
    loss, (_, metrics) = b_loss(variables, controls, BATCH, nets=nets, terms=terms)
    assert np.isfinite(loss) and all(np.isfinite(value) for value in metrics.values()) and metrics["kd"] > 0
    if kd_target != "avg":
        return
    out = raw_outputs(nets, variables, jnp.float32(BATCH["image"]), {"train": True})
    logs = [log_softmax(own[:, known]) for own, known in zip(out["teachers"], classes)]
    average = np.column_stack([logs[0][:, 0], (logs[0][:, 1:] + logs[1][:, :2]) / 2, logs[1][:, 2]])
    said = [np.array(known)[own.argmax(-1)] for own, known in zip(logs, classes)]
    weight = np.where((said[0] != said[1]) & (said[0] != 0) & (said[1] != 3), 3.0, 1.0)
    mixed = 0.6 * average + 0.4 * log_softmax(out["student"])[:, :4]
    log_p, tau = log_softmax(mixed / 3.0), 3.0
    kd_ = tau**2 * (np.exp(log_p) * (log_p - log_softmax(out["student"] / tau)[:, :4])).sum(-1)
    np.testing.assert_allclose(metrics["kd"], 0.35 * np.mean(weight / weight.mean() * kd_), rtol=2e-5)


@pytest.mark.parametrize("name", ["teacher1", "control"])
def test_b_loss_trains_the_network_of_any_name(name):
    """Labels alone, of the network `nets.student` with the variables under `name`: bitwise the same loss, gradient and
    statistics, which have that name."""
    nets, variables = make()

    def of(name):
        own = Variables({name: variables.params["student"]}, {name: variables.batch_stats["student"]})
        (loss, (stats, _)), gradient = jax.jit(
            jax.value_and_grad(
                lambda params: b_loss(
                    Variables(params, own.batch_stats),
                    b_controls(),
                    BATCH,
                    nets=nets,
                    terms=BTerms(data_aug=0),
                    student=name,
                ),
                has_aux=True,
            )
        )(own.params)
        assert stats.keys() == gradient.keys() == {name}
        return loss, stats[name], gradient[name]

    jax.tree.map(np.testing.assert_array_equal, of(name), of("student"))


def test_cases_of_the_b_loss_reach_what_they_name():
    """The batch has teachers that disagree, both right and wrong, so that the disagreement modes differ."""
    nets, variables = make()
    predictions = np.argmax(raw_outputs(nets, variables, jnp.float32(BATCH["image"]), {"train": True})["teachers"], -1)
    wrong = predictions != BATCH["label"]
    masks = [predictions[0] != predictions[1], wrong.all(0), wrong.any(0)]
    assert all(0 < mask.sum() < len(mask) for mask in masks) and len({mask.tobytes() for mask in masks}) == 3


def test_partner_labels_count():
    """The gradient towards the logits sums the shares of both labels (SPEC 10.3): the classifier's bias sees
    mean(softmax - lam*onehot(y) - (1-lam)*onehot(y_b)), to 1e-5."""
    nets, variables = make()
    terms, controls = BTerms(data_aug=0, mixup_alpha=1.0), b_controls()
    pixels, labels_b, lam = mix(
        jax.random.fold_in(controls["mix_key"], 5),
        jnp.float32(BATCH["image"]),
        BATCH["label"],
        mixup_alpha=terms.mixup_alpha,
        cutmix_alpha=terms.cutmix_alpha,
    )
    lam = float(lam)
    assert 0.1 < lam < 0.9 and (labels_b != BATCH["label"]).any()

    def loss(bias):
        student = variables.params["student"]
        student = {**student, "classifier": {**student["classifier"], "bias": bias}}
        return b_loss(
            Variables({**variables.params, "student": student}, variables.batch_stats),
            controls,
            jax.tree.map(jnp.asarray, BATCH),
            nets=nets,
            terms=terms,
        )[0]

    logits = raw_outputs(nets, variables, pixels, {"train": True})["student"]
    wanted = softmax(logits) - lam * ONE_HOT[BATCH["label"]] - (1 - lam) * ONE_HOT[labels_b]
    np.testing.assert_allclose(
        jax.jit(jax.grad(loss))(jnp.float32(variables.params["student"]["classifier"]["bias"])),
        wanted.mean(0),
        atol=1e-5,
    )


def test_only_the_student_gets_a_gradient_from_the_b_loss():
    """No way leads through query, mu, weights or targets to anything else. Its adapter gets feature KD's gradient and
    nothing more, 2 alpha mean(w (s - mu)) at its output, to 1e-5; so without feature KD it gets none."""
    nets, variables = make()
    terms = replace(B_TERMS, disagree_mode="pred", disagree_lambda_high=3.0, kd_max_ratio=0.2, feat_kd_alpha=0.4)
    gradient = jax.jit(
        jax.grad(
            lambda params: b_loss(
                Variables(params, variables.batch_stats), b_controls(), BATCH, nets=nets, terms=terms
            )[0]
        )
    )(variables.params)
    reached = {
        name: {any(np.any(leaf) for leaf in jax.tree.leaves(leaves)) for leaves in branch.values()}
        for name, branch in gradient.items()
    }
    assert reached == {name: {name == "student"} for name in variables.params}
    out = raw_outputs(nets, variables, jnp.float32(BATCH["image"]), {"train": True})
    w = certainty(out["logvar"], terms.min_cw)[:, None]
    np.testing.assert_allclose(
        gradient["student"]["distill_adapter"]["fc2"]["bias"],
        (2 * 0.4 * w * (out["query"] - out["mu"])).mean(0),
        rtol=1e-5,
        atol=1e-6,
    )


# Both ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("banked", [False, True])
@pytest.mark.parametrize("kind", ["a", "b"])
def test_each_network_runs_once_per_step(kind, banked):
    """Counted while tracing a whole training step (SPEC 10.9); stored teachers do not run at all."""
    nets, variables = make()
    calls = collections.Counter()

    def count(call, args, kwargs, context):
        if context.method_name == "__call__" and not isinstance(context.module.parent, nn.Module):
            calls[f"{type(context.module).__name__} {getattr(context.module, 'mean', '')}"] += 1
        return call(*args, **kwargs)

    if kind == "a":
        loss = functools.partial(a_loss, nets=nets, terms=replace(A_TERMS, feat_kd_alpha=1.0), trained=None)
        controls, mask = a_controls(), {name: name in ("ib_mbm", "synergy_head") for name in variables.params}
    else:
        loss = functools.partial(b_loss, nets=nets, terms=replace(B_TERMS, feat_kd_alpha=1.0))
        controls, mask = b_controls(), {name: name == "student" for name in variables.params}
    tx = optimizers.make_optimizer("adamw", weight_decay=0.1, grad_clip_norm=1.0)
    current, frozen = state.begin(variables, mask, ("student",) if kind == "b" else (), tx)
    batch = BATCH | (
        {"teachers": TeacherOutputs((np.zeros((8, 6)), np.zeros((8, 5))), np.zeros((8, 2, CLASSES)))} if banked else {}
    )
    with nn.intercept_methods(count):
        jax.eval_shape(make_train_step(loss, tx), current, frozen, controls | {"lr": 0.1}, batch)
    teachers = {} if banked else {f"KDModel {model.mean}": 1 for model in nets.teachers}
    assert calls == {f"KDModel {nets.student.mean}": 1, "IB_MBM ": 1, "SynergyHead ": 1, **teachers}


def test_dropout_of_what_trains_is_keyed_by_example_and_network():
    """The network that trains, the student in B, a teacher that is tuned in A, takes keys; the others take none."""
    nets, variables = make()
    taken = {}

    def take(call, args, kwargs, context):
        if context.method_name == "__call__" and type(context.module).__name__ == "KDModel":
            taken[context.module.mean] = kwargs["dropout_keys"]
        return call(*args, **kwargs)

    def of(loss, controls, **options):
        taken.clear()
        with nn.intercept_methods(take):
            loss(variables, controls, BATCH, nets=nets, **options)
        return [taken[model.mean] for model in (nets.student, *nets.teachers)]

    def same(a, b):
        return jnp.array_equal(jax.random.key_data(a), jax.random.key_data(b))

    keys = streams.per_example(streams.key(0, "dropout"), BATCH["index"])
    student, *others = of(b_loss, b_controls(), terms=B_TERMS)
    assert same(student, keys) and others == [None, None]
    student, tuned, other = of(
        a_loss, a_controls(), terms=A_TERMS, trained=None, teacher_modes=(Mode(train=True), Mode())
    )
    assert same(tuned, streams.branch(keys, "teacher1")) and student is other is None


def test_frozen_networks_are_arguments_and_get_no_update():
    """One B-step: bitwise the same frozen leaves, new student leaves by plain SGD, statistics of the batch (1e-5)."""
    nets, variables = make()
    terms = BTerms(data_aug=0)
    student = variables.params["student"]
    mask = {
        name: freezing.trainable(student, ("stage0", "stage1", "stage2"), 1) if name == "student" else False
        for name in variables.params
    }
    mask["student"]["distill_adapter"] = False
    tx = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0, momentum=0.0)
    current, frozen = state.begin(variables, mask, ("student",), tx)
    mode = Mode(train=True, frozen_stages=2)
    loss = functools.partial(b_loss, nets=nets, terms=terms, mode=mode)
    after, metrics = jax.jit(make_train_step(loss, tx))(current, frozen, b_controls() | {"lr": jnp.float32(0.5)}, BATCH)
    assert metrics["lr"] == 0.5 and metrics["skipped"] == 0
    whole = state.join(after, frozen)
    for name in variables.params:
        if name != "student":
            jax.tree.map(np.testing.assert_array_equal, whole.params[name], variables.params[name])
    pixels = jnp.float32(BATCH["image"])
    kind = {"train": True, "frozen_stages": 2}
    outputs, changed = nets.student.apply(variables.of("student"), pixels, **kind, mutable=["batch_stats"])
    error = softmax(np.float64(outputs.logit)) - ONE_HOT[BATCH["label"]]
    gradient = np.float64(outputs.feat_2d).T @ error / len(error)
    np.testing.assert_allclose(
        whole.params["student"]["classifier"]["kernel"], student["classifier"]["kernel"] - 0.5 * gradient, atol=1e-5
    )
    for stage in ("stage0", "stage1"):
        jax.tree.map(np.testing.assert_array_equal, whole.params["student"][stage], student[stage])
        jax.tree.map(
            np.testing.assert_array_equal, whole.batch_stats["student"][stage], variables.batch_stats["student"][stage]
        )
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
        whole.batch_stats["student"]["stage2"],
        changed["batch_stats"]["stage2"],
    )
    assert np.any(whole.params["student"]["stage2"]["conv"]["kernel"] != student["stage2"]["conv"]["kernel"])


def test_regulariser_is_the_mean_over_tensors_and_zero_of_none():
    """Fine-tuning at freeze level 0 without adapters trains no teacher tensor."""
    assert mean_square({"a": jnp.array([1.0, 3.0]), "b": jnp.array([[2.0]])}) == (5.0 + 4.0) / 2
    assert mean_square([{}, {}]) == 0


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_images_of_a_class_that_nobody_knows_count_for_nothing_in_synergy_s_cross_entropy(smoothing):
    """It is that of the other images alone, with equal weights; nothing of the step is infinite or NaN."""
    nets = make_networks(classes=((0, 1, 2), (1, 2, 3)))
    variables = random_variables(nets)
    batch = {name: jnp.asarray(value) for name, value in make_batch(10).items()}
    rows = np.flatnonzero(np.asarray(batch["label"]) != 4)
    assert 0 < len(rows) < 10

    def of(batch):
        def loss(fusion):
            whole = Variables({**variables.params, **fusion}, variables.batch_stats)
            terms = replace(A_TERMS, label_smoothing=smoothing)
            return a_loss(whole, a_controls(certain=0.0), batch, nets=nets, terms=terms, trained=lambda params: [])

        fusion = {name: variables.params[name] for name in ("ib_mbm", "synergy_head")}
        (_, (_, metrics)), gradient = jax.value_and_grad(loss, has_aux=True)(fusion)
        return metrics, gradient

    whole, gradient = of(batch)
    part, _ = of({name: value[rows] for name, value in batch.items()})
    np.testing.assert_allclose(whole["ce"], part["ce"], rtol=1e-5)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((whole, gradient)))
