"""What teachers say together: opinion pools of their log-probabilities (SPEC 11 and 12).

A teacher may know some of the classes only: `known`, bool, [T, C] or per example [B, T, C], says which. No gradient
reaches a teacher's logits.
"""

import jax
import jax.numpy as jnp
import numpy as np

Known = np.ndarray | jax.Array


def log_probabilities(teacher_logits: jax.typing.ArrayLike, known: Known) -> jax.Array:
    """The log softmax of logits [B, T, C] over the classes that each teacher knows, [T, C], and -inf elsewhere."""
    logits = jax.lax.stop_gradient(jnp.asarray(teacher_logits, jnp.float32))
    return jnp.where(known, jax.nn.log_softmax(jnp.where(known, logits, -jnp.inf)), -jnp.inf)


def draw_kept(keys: jax.Array, count: int, rate: float) -> jax.Array:
    """Which of so many teachers stay in each example, [B, T] of bool: each is left out with probability `rate`, by the
    example's own of `keys` [B]. Where that would be all of them none is."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, (count,)))(keys)
    return kept | ~jnp.any(kept, axis=1, keepdims=True)


def remaining(known: np.ndarray, kept: jax.Array) -> jax.Array:
    """Who speaks of which class, [B, T, C], where `kept` [B, T] teachers do: known [T, C] without the others.

    Of a class that only the others know all who know it speak: else a label's loss would be infinite.
    """
    left = known & kept[..., None]
    return jnp.where(jnp.any(left, axis=1, keepdims=True), left, known)


def weighted_mean(logs: jax.Array, known: Known, weights: jax.Array) -> jax.Array:
    """The mean of log-probabilities [B, T, C] with weights [B, T], of each class over the teachers that know it.

    -inf where no teacher with a weight knows the class.
    """
    shares = jnp.where(known, weights[..., None], 0.0)
    total = jnp.sum(shares, axis=1)
    summed = jnp.sum(jnp.where(shares == 0, 0.0, shares * logs), axis=1)  # 0 * -inf would be NaN
    return jnp.where(total == 0, -jnp.inf, summed / jnp.where(total == 0, 1.0, total))


def mixture(logs: jax.Array, known: Known, log_weights: jax.Array) -> jax.Array:
    """log sum_k weight_k p_k of log-probabilities [B, T, C] and log weights [B, T], p_k = 0 outside what teacher k
    knows: [B, C], -inf where nobody knows the class."""
    somebody = jnp.any(known, axis=-2)
    # Finite throughout at classes that nobody knows: their gradient would be NaN.
    joint = log_weights[..., None] + jnp.where(known, logs, 0.0)
    joint = jnp.where(known | ~somebody[..., None, :], joint, -jnp.inf)
    return jnp.where(somebody, jax.nn.logsumexp(joint, axis=1), -jnp.inf)
