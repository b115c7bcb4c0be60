"""What teachers say together, and synergy on top of it, against numpy in float64; gradients against differences."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.models.ib_mbm import BASES, SynergyHead
from asib_jax.models.pools import log_probabilities, mixture, weighted_mean

BATCH, CLASSES, DIM = 6, 5, 8
GENERATOR = np.random.default_rng(0)
Z = GENERATOR.normal(size=(BATCH, DIM)).astype(np.float32)
LOGITS = (3 * GENERATOR.normal(size=(BATCH, 3, CLASSES))).astype(np.float32)
ALL = np.ones((3, CLASSES), bool)
SOME = np.array([[1, 1, 0, 0, 0], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0]], bool)  # nobody knows the last
KNOWN = pytest.mark.parametrize("known", [ALL, SOME], ids=["all", "some"])


def probabilities(logits, known):
    """[B, T, C] in float64; 0 outside what a teacher knows."""
    p = np.where(known, np.exp(np.float64(logits) - np.float64(logits).max(axis=-1, keepdims=True)), 0)
    return p / p.sum(axis=-1, keepdims=True)


def by_hand(kind, logits, known, weights):
    """A pool [B, C], teacher by teacher and class by class."""
    p, out = probabilities(logits, known), np.full((len(logits), CLASSES), -np.inf)
    for b, c in np.ndindex(out.shape):
        knows = np.flatnonzero(known[:, c])
        if len(knows) and kind == "avg":
            out[b, c] = np.average(np.log(p[b, knows, c]), weights=weights[b, knows])
        elif len(knows):
            out[b, c] = np.log(sum(weights[b, k] * p[b, k, c] for k in knows))
    return out


@KNOWN
def test_pools_equal_numpy(known):
    """Of logits that are -inf, or anything, where a teacher does not know the class."""
    weights = GENERATOR.dirichlet(np.ones(3), BATCH).astype(np.float32)
    for elsewhere in (-np.inf, 7.0):
        logs = log_probabilities(np.where(known, LOGITS, np.float32(elsewhere)), known)
        assert (np.isneginf(logs) == np.broadcast_to(~known, logs.shape)).all()
        for found, kind in ((weighted_mean(logs, known, weights), "avg"), (mixture(logs, known, np.log(weights)), "")):
            np.testing.assert_allclose(found, by_hand(kind, LOGITS, known, weights), rtol=1e-5, atol=1e-5)
        per_example = np.broadcast_to(known, (BATCH, 3, CLASSES))
        np.testing.assert_array_equal(mixture(logs, per_example, np.log(weights)), found)


def synergy_by_hand(base, params, z, known):
    """(base + head) / exp(t) in float64, -inf where nobody knows; with base "none" nothing is added."""
    logits = np.maximum(z @ params["fc1"]["kernel"] + params["fc1"]["bias"], 0)
    logits = logits @ params["fc2"]["kernel"] + params["fc2"]["bias"]
    if base != "none":
        weights = np.full((BATCH, 3), 1 / 3)
        if base == "mixture":
            scores = np.exp(z @ params["router"]["kernel"] + params["router"]["bias"])
            weights = scores / scores.sum(axis=1, keepdims=True)
        logits = logits + by_hand(base, LOGITS, known, weights)
    return np.where(known.any(axis=0), logits / np.exp(params["log_temperature"]), -np.inf)


@KNOWN
@pytest.mark.parametrize("base", BASES)
def test_the_head_adds_to_its_base(base, known):
    """At first, whatever the code, synergy is exactly the base; then what numpy says."""
    head = SynergyHead(CLASSES, DIM, 0.0, True, base, 3)
    logs = log_probabilities(LOGITS, known)
    fresh = head.init(jax.random.key(0), Z, logs, known)
    if base != "none":
        pool = head.apply(fresh, Z, logs, known, method="pool")
        np.testing.assert_array_equal(head.apply(fresh, Z, logs, known), pool)
        thirds = np.full((BATCH, 3), 1 / 3)
        np.testing.assert_allclose(pool, by_hand(base, LOGITS, known, thirds), rtol=1e-5, atol=1e-5)
    moved = jax.tree.map(lambda leaf: leaf + GENERATOR.normal(size=leaf.shape).astype(np.float32), fresh)
    params = jax.tree.map(np.float64, moved["params"])
    for given, on in ((logs, base), (None, "none")):  # None: as if there were no teachers
        found = head.apply(moved, Z, given, known)
        np.testing.assert_allclose(found, synergy_by_hand(on, params, Z, known), rtol=1e-4, atol=1e-4)


@KNOWN
@pytest.mark.parametrize("base", BASES)
def test_gradients_are_differences(base, known):
    """Of a cross entropy towards known labels: finite though a logit be -inf; teachers get none."""
    head = SynergyHead(CLASSES, DIM, 0.0, True, base, 3)
    labels = np.arange(BATCH) % known.any(axis=0).sum()
    shapes = jax.eval_shape(partial(head.init, known=known), jax.random.key(0), Z, LOGITS)
    variables = jax.tree.map(lambda leaf: GENERATOR.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)

    def loss(variables, z, logits):
        synergy = head.apply(variables, z, log_probabilities(logits, known), known)
        return -jnp.mean(jax.nn.log_softmax(synergy)[np.arange(BATCH), labels])

    def value(variables, z):
        synergy = synergy_by_hand(base, variables["params"], z, known)
        return np.mean(np.log(np.exp(synergy).sum(axis=1)) - synergy[np.arange(BATCH), labels])

    gradients = jax.jit(jax.grad(loss, (0, 1, 2)))(variables, Z, np.where(known, LOGITS, -np.inf))
    assert not np.asarray(gradients[2]).any()
    at = jax.tree.map(np.float64, (variables, Z))
    for _ in range(3):
        towards = jax.tree.map(lambda leaf: GENERATOR.normal(size=leaf.shape), at)
        ends = [value(*jax.tree.map(lambda leaf, way: leaf + step * way, at, towards)) for step in (1e-6, -1e-6)]
        products = jax.tree.map(lambda a, b: np.sum(np.float64(a) * b), gradients[:2], towards)
        np.testing.assert_allclose(sum(jax.tree.leaves(products)), (ends[0] - ends[1]) / 2e-6, rtol=1e-4, atol=1e-5)
