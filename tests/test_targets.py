"""KD targets against float64 numpy, image by image and class by class."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from asib_jax.objectives import losses, targets

TAU = 2.0
RNG = np.random.default_rng(0)
LABELS = np.array([0, 3, 4, 1, 2, 5])
LOGITS = 3 * RNG.normal(size=(6, 3, 7))
STUDENT = 2 * RNG.normal(size=(6, 7))
# Three teachers: one knows label 0 alone, nobody label 5 and class 6, all know 3, and 4 the third alone.
SUBSETS = np.array([[1, 1, 1, 1, 0, 0, 0], [0, 1, 1, 1, 0, 0, 0], [0, 0, 1, 1, 1, 0, 0]], bool)
KNOWN = {"all": np.ones((3, 7), bool), "subsets": SUBSETS}


def log_softmax(logits, known):
    """Of one teacher on one image, over what it knows."""
    logs = np.full(logits.shape, -np.inf)
    logs[known] = logits[known] - logits[known].max()
    logs[known] -= np.log(np.exp(logs[known]).sum())
    return logs


def confidence(logits, known, k):
    return np.exp(log_softmax(logits[k] / TAU, known[k])).max()


def entropies(logits, known):
    chances = [np.exp(log_softmax(own, knows)[knows]) for own, knows in zip(logits, known)]
    return np.array([-(own * np.log(own)).sum() for own in chances])


def by_entropy(logits, known, label):
    entropy = entropies(logits, known)
    return [1.0] if len(logits) == 1 else (1 - entropy / entropy.sum()) / (len(logits) - 1)


def by_label(logits, known, label):
    who = [k for k in range(len(logits)) if known[k, label]]
    ce = {k: -log_softmax(logits[k], known[k])[label] for k in who}
    total = sum(np.exp(value) for value in ce.values())
    weights = np.zeros(len(logits))
    for k in who:
        weights[k] = (1 - np.exp(ce[k]) / total) / (len(who) - 1) if len(who) > 1 else 1
    return weights if who else np.ones(len(logits))


def by_confidence(logits, known, label):
    return [confidence(logits, known, k) for k in range(len(logits))]


WEIGHTS = {
    "avg": lambda logits, known, label: np.ones(len(logits)),
    "weighted_conf": by_confidence,
    "teacher": lambda logits, known, label: np.arange(len(logits)) == len(logits) - 1,
    "max_conf": lambda logits, known, label: np.arange(len(logits)) == np.argmax(by_confidence(logits, known, label)),
    "entropy": by_entropy,
    "label_conf": by_label,
}


def weighted_mean(logits, known, weights):
    wanted = np.full(logits.shape[1], -np.inf)
    logs = [log_softmax(own, knows) for own, knows in zip(logits, known)]
    for c in range(logits.shape[1]):
        who = [k for k in range(len(logits)) if known[k, c] and weights[k] > 0]
        shares = [weights[k] / sum(weights[j] for j in who) for k in who]
        if who:
            assert sum(shares) == pytest.approx(1)
            wanted[c] = sum(share * logs[k][c] for share, k in zip(shares, who))
    return wanted


def shortest(gradients):
    """The weights of AEKD by a general solver."""
    count = len(gradients)
    most = max(0.6, 1 / count)
    found = minimize(
        lambda a: ((a @ gradients) ** 2).sum(),
        np.full(count, 1 / count),
        jac=lambda a: 2 * gradients @ (a @ gradients),
        bounds=[(0, most)] * count,
        constraints={"type": "eq", "fun": lambda a: a.sum() - 1},
        method="SLSQP",
        options={"ftol": 1e-15, "maxiter": 500},
    )
    return found.x


@functools.cache
def program(known):
    """All targets in one; known: rows of 0 and 1."""
    known = np.array(known, bool)

    def found(logits, labels, student):
        arguments = (known, TAU, len(known) - 1, labels, student)
        return {name: target(logits, *arguments) for name, target in targets.KD_TARGETS.items()}

    return jax.jit(found)


def found(logits, known):
    """Every target by its name; the last teacher is the one of `teacher`."""
    outside = np.where(known, logits, -np.inf)
    return jax.device_get(program(tuple(map(tuple, known)))(jnp.float32(outside), LABELS, jnp.float32(STUDENT)))


def test_every_target_is_here():
    assert {*targets.KD_TARGETS} == {*WEIGHTS, "gradient"}


@pytest.mark.parametrize("which", KNOWN)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_weighted_means(count, which):
    logits, known = LOGITS[:, :count], KNOWN[which][:count]
    target = found(logits, known)
    for name, weigh in WEIGHTS.items():
        wanted = [weighted_mean(own, known, weigh(own, known, label)) for own, label in zip(logits, LABELS)]
        np.testing.assert_allclose(target[name], wanted, rtol=1e-5, atol=1e-5, err_msg=name)
    np.testing.assert_allclose(targets.average(logits, known), target["avg"], rtol=1e-6)


@pytest.mark.parametrize("which", KNOWN)
@pytest.mark.parametrize("count", [1, 2, 3])
def test_gradient_target_has_the_shortest_gradient(count, which):
    """The gradient of KD towards it is that of the weighted sum of the teachers' losses, and the shortest there is."""
    logits, known = LOGITS[:, :count], KNOWN[which][:count]
    target = found(logits, known)["gradient"]
    gradient = jax.grad(lambda student: losses.kd(student, target, TAU).sum())(jnp.float32(STUDENT))
    for n in range(len(logits)):
        chances = np.exp([log_softmax(own / TAU, knows) for own, knows in zip(logits[n], known)])
        student = np.exp(log_softmax(STUDENT[n] / TAU, np.ones(7, bool)))
        weights = shortest(student - chances)
        np.testing.assert_allclose(np.exp(target[n] / TAU), weights @ chances, rtol=1e-5, atol=2e-6)
        np.testing.assert_allclose(gradient[n] / TAU, weights @ (student - chances), rtol=1e-4, atol=5e-6)


def test_two_teachers_in_closed_form():
    """Free, at the bound, and equal."""
    one, other = np.array([1.0, 0.0]), np.array([0.0, 1.0])
    cases = [([one, other], 0.5), ([one, 1.1 * other], 1.21 / 2.21), ([one, 3 * one], 0.6), ([one, one], 0.5)]
    for gradients, weight in cases:
        weights = targets.min_norm_weights(jnp.float32(gradients)[None])
        np.testing.assert_allclose(weights, [[weight, 1 - weight]], rtol=1e-6)


@pytest.mark.parametrize("knows", [np.ones(7, bool), SUBSETS[0]], ids=["all", "some"])
def test_equal_teachers_give_that_teacher(knows):
    """So the weights sum to 1."""
    wanted = [log_softmax(own, knows) for own in LOGITS[:, 0]]
    for name, target in found(np.repeat(LOGITS[:, :1], 3, axis=1), np.tile(knows, (3, 1))).items():
        np.testing.assert_allclose(jax.nn.log_softmax(target), wanted, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("which", KNOWN)
@pytest.mark.parametrize("scale", [1e4, 65504.0, 1e-3])
def test_extreme_logits_stay_finite(scale, which):
    """Between the teachers that know a class, and nothing elsewhere; the loss and its gradient are finite."""
    known = KNOWN[which]
    logits = np.clip(LOGITS, -3, 3) / 3 * scale
    logs = np.array([[log_softmax(*teacher) for teacher in zip(own, known)] for own in logits])
    low, high = np.where(known, logs, np.inf).min(axis=1), logs.max(axis=1)
    for name, target in found(logits, known).items():
        assert not np.isnan(target).any() and np.all(target[:, ~known.any(axis=0)] == -np.inf), name
        # Those of most targets may leave out a teacher, and what it alone knows.
        if which == "all" or name in ("avg", "weighted_conf"):
            assert np.isfinite(target[:, known.any(axis=0)]).all(), name
        loss, gradient = jax.value_and_grad(lambda student: losses.kd(student, target, TAU).sum())(jnp.float32(STUDENT))
        assert np.isfinite(loss) and np.isfinite(gradient).all() and np.isfinite(target.max(axis=1)).all(), name
        inside, slack = np.isfinite(target), np.inf if name == "gradient" else 1e-5 * (1 + scale)
        assert np.all(target[inside] >= low[inside] - slack) and np.all(target[inside] <= high[inside] + slack), name


def test_no_gradient_reaches_teachers_or_student():
    def total(logits, student):
        target = jnp.stack([*program(tuple(map(tuple, SUBSETS)))(logits, LABELS, student).values()])
        return jnp.sum(jnp.where(jnp.isfinite(target), target, 0.0))

    logits = jnp.float32(np.where(SUBSETS, LOGITS, -np.inf))
    for gradient in jax.grad(total, (0, 1))(logits, jnp.float32(STUDENT)):
        np.testing.assert_array_equal(gradient, 0)


def test_a_broken_teacher_is_not_hidden():
    """NaN of a class it knows is NaN in the target, unless another teacher is the target."""
    logits = LOGITS.copy()
    logits[0, 1, 3] = np.nan
    for name, target in found(logits, KNOWN["all"]).items():
        assert np.isnan(target[0]).any() == (name != "teacher") and np.isfinite(target[1:]).all(), name


@pytest.mark.parametrize("which", KNOWN)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.999])
def test_students_share(share, which):
    """At temperature 1 the gradient of KD is q - p, p proportional to t^(1 - s) q^s; without a share a student that is
    not finite changes nothing."""
    target = found(LOGITS, KNOWN[which])["avg"]
    student = np.exp([log_softmax(own, np.ones(7, bool)) for own in STUDENT])
    wanted = np.exp(target) ** (1 - share) * student**share
    wanted /= wanted.sum(axis=1, keepdims=True)

    def loss(logits):
        return losses.kd(logits, targets.with_student(target, logits, jnp.float32(share)), 1.0).sum()

    gradient = jax.grad(loss)(jnp.float32(STUDENT))
    np.testing.assert_allclose(gradient, student - wanted, atol=2e-6)
    assert np.all(targets.with_student(target, STUDENT, share)[~np.isfinite(target)] == -np.inf)
    if not share:
        np.testing.assert_array_equal(targets.with_student(target, STUDENT * np.nan, share), target)
