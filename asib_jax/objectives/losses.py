"""Per-sample loss terms and the weights on them (SPEC 2 and 5).

Every loss maps a batch to [B] float32 whatever the compute dtype; callers weight the samples and take the mean last.
Functions that need a statistic of the batch take `mean`, a callable from [B] to the mean over the *global* batch, as
`batch_mean` gives it.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from asib_jax.errors import UserError

Mean = Callable[[jax.Array], jax.Array]


def batch_mean(axis: str | None) -> Mean:
    """The mean over the global batch of a [B / devices] array, inside a step that reduces over `axis`; None: of [B].

    For values without gradient only: a loss is averaged locally and its gradients are reduced afterwards.
    """

    def mean(x: jax.Array) -> jax.Array:
        return jnp.mean(x) if axis is None else jax.lax.pmean(jnp.mean(x), axis)

    return mean


def cross_entropy(
    logits: jax.Array, labels: jax.Array, smoothing: float = 0.0, known: np.ndarray | None = None
) -> jax.Array:
    """Cross entropy of integer labels [B] under logits [B, C], in nats: [B].

    `smoothing` (a Python float) is spread evenly over the classes that the network knows, the true one included
    (Szegedy et al., 2016). known: which these are, [C] of bool; None: all. Elsewhere logits are -inf, and a label there
    makes the result infinite or meaningless, but no gradient NaN.
    """
    logits = logits.astype(jnp.float32)
    if smoothing == 0:
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    hot = jax.nn.one_hot(labels, logits.shape[-1])
    if known is not None and not known.all():  # 0 * -inf would be NaN
        logits, hot = logits[:, known], hot[:, known]
    targets = optax.losses.smooth_labels(hot, smoothing)
    return optax.softmax_cross_entropy(logits, targets)


def kd(logits: jax.Array, target_logits: jax.Array, tau: jax.Array | float) -> jax.Array:
    """Distillation loss tau^2 KL(p || q), p = softmax(target/tau), q = softmax(logits/tau) (Hinton et al., 2015).

    Logits [B, C] -> [B]. No gradient reaches the target. Classes to which the target gives no mass contribute zero,
    also where a log-probability is -inf; NaN in either distribution is NaN.
    """
    target = jax.lax.stop_gradient(target_logits).astype(jnp.float32)
    log_p = jax.nn.log_softmax(target / tau)
    log_q = jax.nn.log_softmax(logits.astype(jnp.float32) / tau)
    p = jnp.exp(log_p)
    return tau**2 * jnp.sum(jnp.where(p == 0, 0.0, p * (log_p - log_q)), axis=-1)


def gaussian_kl(mu: jax.Array, logvar: jax.Array) -> jax.Array:
    """KL(N(mu, exp(logvar)) || N(0, 1)) summed over features (Kingma and Welling, 2014): [B, d], [B, d] -> [B]."""
    mu, logvar = mu.astype(jnp.float32), logvar.astype(jnp.float32)
    return -0.5 * jnp.sum(1 + logvar - mu**2 - jnp.exp(logvar), axis=-1)


def feature_kd(feature: jax.Array, target: jax.Array) -> jax.Array:
    """Squared distance to the target, which gets no gradient: [B, D], [B, D] -> [B]. Unequal shapes are an error."""
    target = jax.lax.stop_gradient(target).astype(jnp.float32)
    return jnp.sum(optax.squared_error(feature.astype(jnp.float32), target), axis=-1)


def certainty_weight(logvar: jax.Array, min_cw: float, mean: Mean) -> jax.Array:
    """Weight of each sample by the precision of its code: logvar [B, d] -> [B] in [min_cw, 1/min_cw].

    Relative to the batch and without gradient, so that neither a common scale nor inflating the variance pays (SPEC 2).
    """
    precision = jnp.exp(-jnp.mean(logvar.astype(jnp.float32), axis=-1))
    return jax.lax.stop_gradient(jnp.clip(precision / mean(precision), min_cw, 1 / min_cw))


def _predictions_differ(predictions: jax.Array, labels: jax.Array, known: np.ndarray) -> jax.Array:
    knows = jnp.asarray(known.T)[predictions]  # [B, j, i]: teacher i knows what j predicts
    differ = predictions[:, :, None] != predictions[:, None, :]
    return jnp.any(differ & knows & knows.swapaxes(1, 2), axis=(1, 2))


# Predictions [B, T], labels [B] and known [T, C] -> [B], true where the teachers count as disagreeing: two predict
# classes that differ and that both know; of those that know the label all are wrong (nobody may know it), or one is.
DISAGREE_MODES: dict[str, Callable[[jax.Array, jax.Array, np.ndarray], jax.Array]] = {
    "pred": _predictions_differ,
    "both_wrong": lambda predictions, labels, known: jnp.all(predictions != labels[:, None], axis=1),
    "any_wrong": lambda predictions, labels, known: jnp.any(
        jnp.asarray(known.T)[labels] & (predictions != labels[:, None]), axis=1
    ),
}


def disagreement_weight(
    teacher_logits: jax.Array, known: np.ndarray, labels: jax.Array, mode: str, high: float, low: float
) -> jax.Array:
    """`high` where the teachers disagree in the sense of `mode` (a name in DISAGREE_MODES), else `low`.

    Teacher logits [B, T, C], known [T, C] of bool, labels [B] -> [B]. On mixed images the labels are those of the first
    image.
    """
    predictions = jnp.argmax(jnp.where(known, teacher_logits, -jnp.inf), axis=-1)
    return jnp.where(DISAGREE_MODES[mode](predictions, labels, known), jnp.float32(high), jnp.float32(low))


def normalise_weights(weights: jax.Array, mean: Mean) -> jax.Array:
    """Weights [B] scaled to global batch mean 1; a batch of zeros (`disagree_lambda_low` 0) stays zero."""
    return weights / jnp.maximum(mean(weights), 1e-12)


def accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    """The share of labels [B] that have the largest of the logits [B, C]."""
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)


def kd_ratio(ce: jax.Array, kd: jax.Array, max_ratio: float) -> jax.Array:
    """Factor in [0, 1] that holds the scalar KD mean below `max_ratio` times the scalar CE mean, without gradient."""
    ceiling = max_ratio * ce
    return jax.lax.stop_gradient(ceiling / jnp.maximum(jnp.maximum(kd, ceiling), 1e-12))


def clamp_factor(loss: jax.Array, maximum: float) -> jax.Array:
    """min(1, maximum/loss) without gradient: multiplying by it bounds the loss but keeps its gradient's direction."""
    return jax.lax.stop_gradient(maximum / jnp.maximum(loss, maximum))


def renormalise_alphas(ce_alpha: float, kd_alpha: float) -> tuple[float, float]:
    """The two loss weights, scaled to sum 1 only where both are positive and do not (SPEC 2).

    Raises:
        UserError: one is negative, or both are zero, which would leave nothing to learn from; or their sum is infinite.
    """
    if not (ce_alpha >= 0 and kd_alpha >= 0 and 0 < ce_alpha + kd_alpha < math.inf):
        raise UserError(
            f"ce_alpha={ce_alpha}, kd_alpha={kd_alpha}: both must be at least 0, their sum positive and finite"
        )
    total = ce_alpha + kd_alpha
    if ce_alpha == 0 or kd_alpha == 0 or math.isclose(total, 1.0):
        return ce_alpha, kd_alpha
    return ce_alpha / total, kd_alpha / total
