"""Whose output the student learns from: the distillation targets of SPEC 5 and 11, [B, C].

A teacher may know some of the classes only: `known` [T, C], bool, says which. Teachers are put together by their
log-probabilities over what each knows, never by logits of classes that one has never seen. To KD a target is logits; it
is -inf, and the target's probability 0, where no teacher with a weight knows the class. Nothing here has a gradient.
"""

import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from asib_jax.models.pools import Known, log_probabilities, weighted_mean

Target = Callable[[jax.Array, Known, jax.Array | float, int, jax.Array, jax.Array], jax.Array]


def average(teacher_logits: jax.typing.ArrayLike, known: Known) -> jax.Array:
    """The mean of log-probabilities over the teachers that know a class: logits [B, T, C] -> [B, C]."""
    logs = log_probabilities(teacher_logits, known)
    return weighted_mean(logs, known, jnp.ones(logs.shape[:2]))


def _confidence(logs: jax.Array, tau: jax.Array | float) -> jax.Array:
    """Each teacher's largest probability at temperature `tau`, [B, T]."""
    return jnp.max(jax.nn.softmax(logs / tau), axis=-1)


def _most_confident(logs: jax.Array, tau: jax.Array | float) -> jax.Array:
    """1 for the teacher whose largest probability at `tau` is the largest, the first of equal ones; 0 for others."""
    return jax.nn.one_hot(jnp.argmax(_confidence(logs, tau), axis=1), logs.shape[1])


def _certainty(logs: jax.Array) -> jax.Array:
    """EBKD's weights (Kwon et al., 2020), larger the smaller a teacher's entropy at temperature 1:
    (1 - H_k / sum H) / (T - 1), as CA-MKD's code has them but for their sum."""
    count = logs.shape[1]
    if count == 1:
        return jnp.ones(logs.shape[:2])
    probabilities = jnp.exp(logs)
    entropy = -jnp.sum(jnp.where(probabilities == 0, 0.0, probabilities * logs), axis=-1)
    total = jnp.sum(entropy, axis=1, keepdims=True)
    return (1 - jnp.where(total == 0, 1 / count, entropy / jnp.where(total == 0, 1.0, total))) / (count - 1)


def _by_label(logs: jax.Array, known: Known, labels: jax.Array) -> jax.Array:
    """CA-MKD's weights of logits (Zhang et al., 2022): (1 - softmax_k(CE_k)) / (K - 1) over the K teachers that know
    the label, 1 if one alone does; where nobody does all weigh the same."""
    ce = -jnp.take_along_axis(logs, labels[:, None, None], axis=-1)[..., 0]
    knows = jnp.asarray(known.T)[labels]  # [B, T]
    count = jnp.sum(knows, axis=1, keepdims=True)
    shares = jax.nn.softmax(jnp.where(knows, ce, jnp.where(count == 0, 0.0, -jnp.inf)), axis=1)
    weights = jnp.where(knows, 1 - shares, 0.0) / jnp.maximum(count - 1, 1)
    return jnp.where(count > 1, weights, jnp.where(count == 1, knows, 1.0))


def _weighted(weigh: Callable[..., jax.Array]) -> Target:
    """The target whose weights [B, T] are what `weigh` makes of log-probabilities and the rest, with sum 1 over the
    teachers that know a class."""

    def target(teacher_logits, known, tau, index, labels, student_logits):
        logs = log_probabilities(teacher_logits, known)
        return weighted_mean(logs, known, weigh(logs, known, tau, index, labels))

    return target


AEKD_BOUND = 0.6  # C, the largest weight of a teacher, in the experiments of Du et al. (2020)
_SWEEPS = 20  # over pairs of three teachers and more


def min_norm_weights(gradients: jax.Array) -> jax.Array:
    """Weights [B, T] in [0, `AEKD_BOUND`] of sum 1 whose mean of the gradients [B, T, C] is the shortest.

    Pair after pair moves weight from one to the other as far as that shortens the mean: of two teachers once, which is
    exact, of more in sweeps. A minimum over the pairs is one over all (the problem is convex).
    """
    count = gradients.shape[1]
    most = max(AEKD_BOUND, 1 / count)

    def sweep(_, weights):
        for i, j in itertools.combinations(range(count), 2):
            apart = gradients[:, i] - gradients[:, j]
            mean = jnp.sum(weights[..., None] * gradients, axis=1)
            square = jnp.sum(apart**2, axis=-1)
            step = -jnp.sum(apart * mean, axis=-1) / jnp.where(square == 0, 1.0, square)
            lowest = jnp.maximum(-weights[:, i], weights[:, j] - most)
            step = jnp.clip(step, lowest, jnp.minimum(most - weights[:, i], weights[:, j]))
            weights = weights.at[:, i].add(step).at[:, j].add(-step)
        return weights

    return jax.lax.fori_loop(0, _SWEEPS if count > 2 else 1, sweep, jnp.full(gradients.shape[:2], 1 / count))


def agreeing(logs: jax.Array, tau: jax.Array | float, student_logits: jax.Array) -> jax.Array:
    """AEKD's target (Du et al., 2020) of each image: the mixture of the teachers' probabilities at `tau` whose KD
    gradient at the student's logits, q - sum_k a_k p_k, is the shortest. So much for the sum of the teachers' losses
    with weights a_k: it has the same gradient. (The published code weighs by a batch's mean gradient.)"""
    logs = jax.nn.log_softmax(logs / tau)
    student = jax.nn.softmax(jax.lax.stop_gradient(student_logits) / tau)
    weights = min_norm_weights(student[:, None] - jnp.exp(logs))
    return tau * jax.nn.logsumexp(logs, axis=1, b=weights[..., None])


# The `kd_target`s that need no fusion network: from float32 teacher logits [B, T, C], known [T, C], tau,
# `kd_teacher_index`, labels [B] and the student's logits [B, C].
KD_TARGETS: dict[str, Target] = {
    "avg": _weighted(lambda logs, known, tau, index, labels: jnp.ones(logs.shape[:2])),
    "weighted_conf": _weighted(lambda logs, known, tau, index, labels: _confidence(logs, tau)),
    "teacher": lambda logits, known, tau, index, labels, student: log_probabilities(logits, known)[:, index],
    "max_conf": _weighted(lambda logs, known, tau, index, labels: _most_confident(logs, tau)),
    "entropy": _weighted(lambda logs, known, tau, index, labels: _certainty(logs)),
    "label_conf": _weighted(lambda logs, known, tau, index, labels: _by_label(logs, known, labels)),
    "gradient": lambda logits, known, tau, index, labels, student: agreeing(
        log_probabilities(logits, known), tau, student
    ),
}


TRAINING_FREE = ("avg", "weighted_conf", "max_conf", "entropy")
"""Of these, those that put teachers together and ask neither labels nor the student: predictions of their own."""


def synergy(logits: jax.Array, average: jax.Array, gate: jax.Array, average_share: jax.Array) -> jax.Array:
    """Synergy logits [B, C] mixed with `average_share` of the teachers' average [B, C]; while `gate` is 0, the average.

    Selected, not multiplied by 0: where one has no share, nothing of it counts, though it be NaN, or -inf as of classes
    that nobody knows.
    """
    share = jnp.where(gate > 0, average_share, 1.0)
    mixed = (1 - share) * logits + share * average
    return jnp.where(share <= 0, logits, jnp.where(share < 1, mixed, average))


def with_student(target: jax.Array, student_logits: jax.Array, share: jax.Array) -> jax.Array:
    """(1 - share) target + share log-probabilities of the student, [B, C], share in [0, 1), without gradient:
    interpolated distillation (Shing et al., 2025). Classes that the target leaves out stay out."""
    own = jax.nn.log_softmax(jax.lax.stop_gradient(student_logits))
    return jnp.where(share > 0, (1 - share) * target + share * own, target)
