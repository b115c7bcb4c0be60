"""Losses against float64 numpy: values and gradients (central differences or closed forms)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.objectives import losses

RNG = np.random.default_rng(0)
LOGITS, TARGET = 2 * RNG.normal(size=(2, 4, 5))
LABELS = np.array([0, 3, 4, 1])
EXTREME = np.array([[1e4, -1e4, 0.0], [-3e3, 2e3, 2e3 - 1], [1e38, -1e38, 0.0]])


def log_softmax(x):
    shifted = x - x.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def softmax(x):
    return np.exp(log_softmax(x))


def one_hot(labels, classes):
    return np.eye(classes)[labels]


def central_difference(function, x, step=1e-6):
    """Gradient of sum(function(x)) in float64."""
    gradient = np.zeros_like(x)
    for position in np.ndindex(x.shape):
        delta = np.zeros_like(x)
        delta[position] = step
        gradient[position] = (function(x + delta) - function(x - delta)).sum() / (2 * step)
    return gradient


def value_and_grad(function, x):
    """Per-sample values and the gradient of their sum, jitted, from a float32 input."""

    def total(x):
        value = function(x)
        return value.sum(), value

    (_, value), gradient = jax.jit(jax.value_and_grad(total, has_aux=True))(jnp.asarray(x, jnp.float32))
    assert value.dtype == jnp.float32 and value.shape == x.shape[:1]
    return value, gradient


def smoothed_ce(x, smoothing, labels=LABELS):
    classes = x.shape[-1]
    target = (1 - smoothing) * one_hot(labels, classes) + smoothing / classes
    return -(target * log_softmax(x)).sum(-1)


def kl(x, target, tau):
    log_p, log_q = log_softmax(target / tau), log_softmax(x / tau)
    return tau**2 * (np.exp(log_p) * (log_p - log_q)).sum(-1)


@pytest.mark.parametrize(
    "function, reference, x",
    [
        (lambda x: losses.cross_entropy(x, LABELS), lambda x: smoothed_ce(x, 0), LOGITS),
        (lambda x: losses.cross_entropy(x, LABELS, 0.1), lambda x: smoothed_ce(x, 0.1), LOGITS),
        (lambda x: losses.kd(x, TARGET, 3.0), lambda x: kl(x, TARGET, 3.0), LOGITS),
        (
            lambda mu: losses.gaussian_kl(mu, TARGET),
            lambda mu: -0.5 * (1 + TARGET - mu**2 - np.exp(TARGET)).sum(-1),
            LOGITS,
        ),
        (
            lambda logvar: losses.gaussian_kl(LOGITS, logvar),
            lambda logvar: -0.5 * (1 + logvar - LOGITS**2 - np.exp(logvar)).sum(-1),
            TARGET,
        ),
        (lambda x: losses.feature_kd(x, TARGET), lambda x: ((x - TARGET) ** 2).sum(-1), LOGITS),
    ],
    ids=["ce", "smoothed_ce", "kd", "gaussian_kl_mu", "gaussian_kl_logvar", "feature_kd"],
)
def test_value_and_gradient_match_float64(function, reference, x):
    value, gradient = value_and_grad(function, x)
    np.testing.assert_allclose(value, reference(x), rtol=2e-5)
    np.testing.assert_allclose(gradient, central_difference(reference, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_of_a_network_that_knows_some_classes(smoothing):
    """It is that of the known alone, smoothing included; a label outside breaks no gradient of the others."""
    known, labels = np.array([True, False, True, True, False]), np.array([0, 3, 2, 1])
    logits, own = np.where(known, LOGITS, -np.inf), np.array([0, 2, 1])
    value, gradient = value_and_grad(lambda x: losses.cross_entropy(x, labels, smoothing, known), logits)
    np.testing.assert_allclose(value[:3], smoothed_ce(LOGITS[:3, known], smoothing, own), rtol=2e-6)
    wanted = central_difference(lambda x: smoothed_ce(x, smoothing, own), LOGITS[:3, known])
    np.testing.assert_allclose(gradient[:3, known], wanted, rtol=1e-4, atol=1e-6)
    assert not gradient[:, ~known][:3].any() and not np.isnan(gradient).any()


def test_smoothed_cross_entropy_keeps_its_gradient_where_the_wrong_class_is_certain():
    """A clamp on the log-probabilities would make the loss constant here (SPEC 10.1)."""
    logits, labels = np.array([[0.0, 200.0, -50.0]]), np.array([0])
    value, gradient = value_and_grad(lambda x: losses.cross_entropy(x, labels, 0.3), logits)
    np.testing.assert_allclose(value, [0.8 * 200 + 0.1 * 250], rtol=1e-6)
    np.testing.assert_allclose(gradient, [[-0.8, 0.9, -0.1]], rtol=1e-6)


@pytest.mark.parametrize("tau", [1.0, 4.0])
def test_kd_is_finite_with_full_gradient_at_extreme_logits(tau):
    """d/dlogits = tau (q - p) exactly, also where probabilities underflow (SPEC 10.1)."""
    student = EXTREME[:2, ::-1].copy()
    value, gradient = value_and_grad(lambda x: losses.kd(x, EXTREME[:2], tau), student)
    np.testing.assert_allclose(value, kl(student, EXTREME[:2], tau), rtol=1e-5)
    assert np.abs(gradient).max() > 0.9 * tau
    np.testing.assert_allclose(
        gradient, tau * (softmax(student / tau) - softmax(EXTREME[:2] / tau)), rtol=1e-3, atol=1e-6
    )


def test_kd_is_zero_not_nan_where_target_and_student_exclude_a_class():
    value, gradient = value_and_grad(lambda x: losses.kd(x, jnp.float32(EXTREME[2:]), 0.5), EXTREME[2:])
    np.testing.assert_array_equal(value, [0.0])
    np.testing.assert_array_equal(gradient, np.zeros((1, 3)))
    excluded = jnp.array([[0.0, 1.0, -jnp.inf]])
    np.testing.assert_allclose(losses.kd(excluded + 1, excluded, 2.0), [0.0], atol=1e-6)


def test_kd_of_what_is_not_a_number_is_not_a_number():
    """A broken teacher must not look like one that is already matched."""
    finite, broken = jnp.array([[0.0, 1.0, 2.0]]), jnp.array([[0.0, jnp.nan, 2.0]])
    assert np.isnan(losses.kd(finite, broken, 2.0)) and np.isnan(losses.kd(broken, finite, 2.0))


def test_kd_temperature_may_be_traced_and_target_gets_no_gradient():
    traced = jax.jit(losses.kd)(LOGITS, TARGET, jnp.float32(2.5))
    np.testing.assert_allclose(traced, kl(LOGITS, TARGET, 2.5), rtol=2e-5)
    gradient = jax.grad(lambda t: losses.kd(jnp.float32(LOGITS), t, 2.5).sum())(jnp.float32(TARGET))
    np.testing.assert_array_equal(gradient, np.zeros_like(TARGET))


def test_feature_kd_target_gets_no_gradient_and_widths_must_match():
    gradient = jax.grad(lambda t: losses.feature_kd(jnp.float32(LOGITS), t).sum())(jnp.float32(TARGET))
    np.testing.assert_array_equal(gradient, np.zeros_like(TARGET))
    with pytest.raises(ValueError, match="(?s)4, 5.*4, 1"):
        losses.feature_kd(jnp.float32(LOGITS), jnp.float32(TARGET[:, :1]))


def test_losses_are_float32_sums_of_bfloat16_inputs():
    """Each input is rounded once; the arithmetic after that is float32 (a bfloat16 sum would be 1e-2 off)."""
    half, target = jnp.asarray(LOGITS, jnp.bfloat16), jnp.asarray(TARGET, jnp.bfloat16)
    x, y = np.asarray(half, np.float64), np.asarray(target, np.float64)
    for got, want in [
        (losses.cross_entropy(half, LABELS), smoothed_ce(x, 0)),
        (losses.cross_entropy(half, LABELS, 0.1), smoothed_ce(x, 0.1)),
        (losses.kd(half, target, 3.0), kl(x, y, 3.0)),
        (losses.gaussian_kl(half, target), -0.5 * (1 + y - x**2 - np.exp(y)).sum(-1)),
        (losses.feature_kd(half, target), ((x - y) ** 2).sum(-1)),
    ]:
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got, want, rtol=2e-5)


def test_certainty_weight_values():
    precision = np.exp(-TARGET.mean(-1))
    weight = losses.certainty_weight(jnp.float32(TARGET), 0.1, jnp.mean)
    np.testing.assert_allclose(weight, np.clip(precision / precision.mean(), 0.1, 10), rtol=1e-5)
    np.testing.assert_allclose(weight.mean(), 1, rtol=1e-5)  # nothing was clipped here
    shared = losses.certainty_weight(jnp.float32(TARGET), 0.1, lambda u: jnp.float32(2.0))  # a mean over other devices
    np.testing.assert_allclose(shared, np.clip(precision / 2, 0.1, 10), rtol=1e-5)


def test_certainty_weight_spreads_clips_and_cannot_be_gamed():
    """Clipping u itself at 1 would make every weight 1; a gradient would reward inflating the variance (SPEC 10.4)."""
    logvar = jnp.array([[-6.0, -6.0], [-2.0, -2.0], [-2.5, -1.5], [3.0, 3.0]])
    weight = losses.certainty_weight(logvar, 0.05, jnp.mean)
    precision = np.exp([6.0, 2.0, 2.0, -3.0])
    np.testing.assert_allclose(weight, np.maximum(precision / precision.mean(), 0.05), rtol=1e-5)
    assert weight[0] / weight[3] > 50
    np.testing.assert_allclose(losses.certainty_weight(logvar + 3, 0.05, jnp.mean), weight, rtol=1e-5)
    one_sure = jnp.where(jnp.arange(50)[:, None] == 0, -6.0, jnp.zeros((50, 2)))
    np.testing.assert_allclose(losses.certainty_weight(one_sure, 0.25, jnp.mean), [4.0] + [0.25] * 49)
    gradient = jax.grad(lambda v: losses.certainty_weight(v, 0.05, jnp.mean)[1])(logvar)
    np.testing.assert_array_equal(gradient, np.zeros((4, 2)))


@pytest.mark.parametrize(
    "mode, disagree",
    [
        ("pred", [False, True, True, False]),
        ("both_wrong", [False, False, True, True]),
        ("any_wrong", [False, True, True, True]),
    ],
)
def test_disagreement_weight(mode, disagree):
    predictions = np.array([[0, 0, 2, 2], [0, 1, 1, 2], [0, 0, 2, 2]])  # three teachers, four samples, all labelled 0
    logits, everything = one_hot(predictions.T, 3), np.ones((3, 3), bool)
    weight = losses.disagreement_weight(logits, everything, np.zeros(4, int), mode, 2.0, 0.5)
    np.testing.assert_array_equal(weight, np.where(disagree, 2.0, 0.5))


DISAGREE = {
    "pred": lambda said, label, knows: any(
        said[i] != said[j] and said[j] in knows[i] and said[i] in knows[j] for i in range(3) for j in range(i)
    ),
    "both_wrong": lambda said, label, knows: all(said[k] != label for k in range(3) if label in knows[k]),
    "any_wrong": lambda said, label, knows: any(said[k] != label for k in range(3) if label in knows[k]),
}


@pytest.mark.parametrize("mode", DISAGREE)
def test_teachers_disagree_about_what_they_know(mode):
    """All that three teachers of some classes can say, for every label, one of which nobody knows; a logit of a class
    that a teacher does not know is nothing it says."""
    knows = ({0, 1}, {1, 2}, {0, 1, 2})
    said, labels = map(np.array, zip(*((case[:3], case[3]) for case in itertools.product(*knows, range(4)))))
    known = np.array([[c in own for c in range(4)] for own in knows])
    logits = np.where(known, one_hot(said, 4), 9.0)
    wanted = [DISAGREE[mode](*case, knows) for case in zip(said, labels)]
    weight = losses.disagreement_weight(logits, known, labels, mode, 2.0, 0.5)
    np.testing.assert_array_equal(weight, np.where(wanted, 2.0, 0.5))
    assert 0 < np.mean(wanted) < 1


def test_normalised_weights_have_global_mean_one():
    np.testing.assert_allclose(losses.normalise_weights(jnp.array([1.0, 3.0]), jnp.mean), [0.5, 1.5])
    np.testing.assert_allclose(losses.normalise_weights(jnp.array([1.0, 3.0]), lambda v: jnp.float32(4)), [0.25, 0.75])
    np.testing.assert_array_equal(losses.normalise_weights(jnp.zeros(3), jnp.mean), np.zeros(3))


def test_accuracy_is_the_share_of_labels_with_the_largest_logit():
    assert losses.accuracy(one_hot(np.array([0, 3, 4, 2]), 5), LABELS) == 0.75


@pytest.mark.parametrize(
    "ce, kd, ratio", [(1.0, 8.0, 0.25), (1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (0.0, 5.0, 0.0), (0.0, 0.0, 0.0)]
)
def test_kd_ratio_holds_kd_below_twice_ce_without_gradient(ce, kd, ratio):
    assert losses.kd_ratio(jnp.float32(ce), jnp.float32(kd), 2.0) == ratio
    np.testing.assert_array_equal(jax.grad(losses.kd_ratio, (0, 1))(ce, kd, 2.0), [0, 0])


@pytest.mark.parametrize("loss, factor", [(4.0, 0.25), (0.5, 1.0), (0.0, 1.0), (-1e-7, 1.0)])
def test_clamp_factor_scales_the_gradient_instead_of_cutting_it(loss, factor):
    value, gradient = jax.value_and_grad(lambda x: losses.clamp_factor(x, 1.0) * x)(loss)
    np.testing.assert_allclose([value, gradient], [factor * loss, factor])


def test_alphas_are_renormalised_only_where_both_count():
    assert losses.renormalise_alphas(0.65, 0.35) == (0.65, 0.35)
    assert losses.renormalise_alphas(1.0, 3.0) == (0.25, 0.75)
    assert losses.renormalise_alphas(0.5, 0.0) == (0.5, 0.0)
    assert losses.renormalise_alphas(0.0, 0.2) == (0.0, 0.2)
    for alphas in [(0.0, 0.0), (-0.1, 1.1), (0.5, -0.5), (float("nan"), 1.0), (1e308, 1e308)]:
        with pytest.raises(ValueError, match="ce_alpha=.*kd_alpha="):
            losses.renormalise_alphas(*alphas)
