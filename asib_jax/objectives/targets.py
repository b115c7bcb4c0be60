"""Whose output the student learns from: the distillation targets of SPEC 5 and 11, [B, C].

A teacher may know some of the classes only: `known` [T, C], bool, says which. Teachers are put together by their
log-probabilities over what each knows, never by logits of classes that one has never seen. To KD a target is logits; it
is -inf, and the target's probability 0, where no teacher with a weight knows the class. No gradient reaches a teacher.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

Target = Callable[[jax.Array, np.ndarray, jax.Array | float, int, jax.Array, jax.Array], jax.Array]


def log_probabilities(teacher_logits: jax.typing.ArrayLike, known: np.ndarray) -> jax.Array:
    """The log softmax of logits [B, T, C] over the classes that each teacher knows, -inf elsewhere."""
    logits = jax.lax.stop_gradient(jnp.asarray(teacher_logits, jnp.float32))
    return jnp.where(known, jax.nn.log_softmax(jnp.where(known, logits, -jnp.inf)), -jnp.inf)


def weighted_mean(logs: jax.Array, known: np.ndarray, weights: jax.Array) -> jax.Array:
    """The mean of log-probabilities [B, T, C] with weights [B, T], of each class over the teachers that know it."""
    shares = jnp.where(known, weights[..., None], 0.0)
    total = jnp.sum(shares, axis=1)
    summed = jnp.sum(jnp.where(shares == 0, 0.0, shares * logs), axis=1)  # 0 * -inf would be NaN
    return jnp.where(total == 0, -jnp.inf, summed / jnp.where(total == 0, 1.0, total))


def average(teacher_logits: jax.typing.ArrayLike, known: np.ndarray) -> jax.Array:
    """The mean of log-probabilities over the teachers that know a class: logits [B, T, C] -> [B, C]."""
    logs = log_probabilities(teacher_logits, known)
    return weighted_mean(logs, known, jnp.ones(logs.shape[:2]))


def _confidence(logs: jax.Array, tau: jax.Array | float) -> jax.Array:
    """Each teacher's largest probability at temperature `tau`, [B, T]."""
    return jnp.max(jax.nn.softmax(logs / tau), axis=-1)


def _weighted(weigh: Callable[..., jax.Array]) -> Target:
    """The target whose weights [B, T], up to their sum, are what `weigh` makes of log-probabilities and the rest."""

    def target(teacher_logits, known, tau, index, labels, student_logits):
        logs = log_probabilities(teacher_logits, known)
        return weighted_mean(logs, known, weigh(logs, known, tau, index, labels))

    return target


# The `kd_target`s that need no fusion network: from float32 teacher logits [B, T, C], known [T, C], tau,
# `kd_teacher_index`, labels [B] and the student's logits [B, C], the last without gradient.
KD_TARGETS: dict[str, Target] = {
    "avg": _weighted(lambda logs, known, tau, index, labels: jnp.ones(logs.shape[:2])),
    "weighted_conf": _weighted(lambda logs, known, tau, index, labels: _confidence(logs, tau)),
    "teacher": lambda logits, known, tau, index, labels, student: log_probabilities(logits, known)[:, index],
}


def synergy(logits: jax.Array, average: jax.Array, gate: jax.Array, average_share: jax.Array) -> jax.Array:
    """Synergy logits [B, C] mixed with `average_share` of the teachers' average [B, C]; while `gate` is 0, the average.

    Selected, not multiplied by 0: where one has no share, nothing of it counts, though it be NaN, or -inf as of classes
    that nobody knows.
    """
    share = jnp.where(gate > 0, average_share, 1.0)
    mixed = (1 - share) * logits + share * average
    return jnp.where(share <= 0, logits, jnp.where(share < 1, mixed, average))
