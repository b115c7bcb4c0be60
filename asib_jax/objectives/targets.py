"""Whose output the student learns from: the distillation targets of SPEC 5, logits [B, C]."""

from collections.abc import Callable

import jax
import jax.numpy as jnp


def average(teacher_logits: jax.Array) -> jax.Array:
    """The mean of the teachers' logits [B, T, C]."""
    return jnp.mean(teacher_logits, axis=1)


def weighted_by_confidence(teacher_logits: jax.Array, tau: jax.Array | float) -> jax.Array:
    """The mean of the teachers' logits [B, T, C], each weighted by its largest probability at temperature `tau`."""
    confidence = jnp.max(jax.nn.softmax(teacher_logits / tau), axis=-1, keepdims=True)
    return jnp.sum(teacher_logits * confidence / jnp.sum(confidence, axis=1, keepdims=True), axis=1)


# The `kd_target`s that need no fusion network: from float32 teacher logits [B, T, C], tau and `kd_teacher_index`.
KD_TARGETS: dict[str, Callable[[jax.Array, jax.Array | float, int], jax.Array]] = {
    "avg": lambda teacher_logits, tau, index: average(teacher_logits),
    "weighted_conf": lambda teacher_logits, tau, index: weighted_by_confidence(teacher_logits, tau),
    "teacher": lambda teacher_logits, tau, index: teacher_logits[:, index],
}


def synergy(logits: jax.Array, average: jax.Array, gate: jax.Array, average_share: jax.Array) -> jax.Array:
    """Synergy logits [B, C] mixed with `average_share` of the teachers' average [B, C]; while `gate` is 0, the average.

    Selected, not multiplied by 0: where synergy has no share, nothing of it counts, though it be NaN.
    """
    share = jnp.where(gate > 0, average_share, 1.0)
    return jnp.where(share < 1, (1 - share) * logits + share * average, average)
