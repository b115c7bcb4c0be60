"""The fusion network (SPEC 1): IB_MBM reads the teachers' features for the student, SynergyHead classifies the code."""

import math
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from asib_jax.errors import UserError
from asib_jax.models.layers import dropout, linear, symmetric_uniform
from asib_jax.models.pools import Known, mixture, remaining, weighted_mean

FEATURE_NORMS = ("none", "l2")
KEYS = ("feat", "feat_prob")
BASES = ("none", "avg", "mixture")


class Latent(NamedTuple):
    """What IB_MBM makes of a batch: a diagonal normal per example, or a point without the bottleneck.

    mu: [B, d]. Without `use_ib` the other two are None:
    logvar: [B, d], the clipped log-variance; clipped: [B], the share of its entries that the clip moved.
    """

    mu: jax.Array
    logvar: jax.Array | None
    clipped: jax.Array | None


def sample(latent: Latent, noise: jax.Array) -> jax.Array:
    """z = mu + exp(logvar / 2) * noise, [B, d]; `noise` is standard normal, keyed per example by the caller."""
    return latent.mu + jnp.exp(latent.logvar / 2) * noise


def _normalise(x: jax.Array, kind: str) -> jax.Array:
    x = x.astype(jnp.float32)
    if kind == "none":
        return x
    # The bound keeps value and gradient finite where a feature is zero.
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(x * x, axis=-1, keepdims=True), 1e-12))


def _layer_norm(x: jax.Array, name: str) -> jax.Array:
    return nn.LayerNorm(epsilon=1e-5, use_fast_variance=False, name=name)(x)


class TeacherAttention(nn.Module):
    """Multi-head scaled dot-product attention of one query per example over T teachers.

    query [B, d], teachers [B, T, d] -> [B, d]. As PyTorch's `nn.MultiheadAttention`, but without a key bias: it adds
    the same to every score of a query, so that its gradient is exactly zero.

    Initialisers: query, key and value kernels U(-b, b) with b = sqrt(6 / (d + 3d)) (PyTorch's Xavier bound of its one
    joint d -> 3d kernel); output kernel U(-1/sqrt(d), 1/sqrt(d)); biases zero.
    """

    num_heads: int

    @nn.compact
    def __call__(self, query: jax.Array, teachers: jax.Array) -> jax.Array:
        dim = query.shape[-1]

        def project(x: jax.Array, name: str, use_bias: bool) -> jax.Array:
            x = nn.Dense(dim, use_bias=use_bias, kernel_init=symmetric_uniform((6 / (4 * dim)) ** 0.5), name=name)(x)
            return x.reshape(*x.shape[:-1], self.num_heads, dim // self.num_heads)

        q, k, v = project(query, "query", True), project(teachers, "key", False), project(teachers, "value", True)
        scores = jnp.einsum("bhe,bthe->bht", q, k) * (dim // self.num_heads) ** -0.5
        read = jnp.einsum("bht,bthe->bhe", jax.nn.softmax(scores), v)
        return nn.Dense(dim, kernel_init=symmetric_uniform(dim**-0.5), name="out")(read.reshape(query.shape))


class IB_MBM(nn.Module):
    """Information-bottleneck multi-teacher fusion: q [B, Dq], kv [B, T, Dk] -> Latent, all float32.

    dim: d; num_heads must divide it. feature_norm: one of FEATURE_NORMS, applied to q and kv over features.
    use_ib: without it there is no log-variance layer.
    residual: LayerNorm(attention + q') in place of the attention alone.
    logvar_clip, min_std: logvar is clipped to [max(-logvar_clip, 2 ln min_std), logvar_clip].

    Dense layers start as PyTorch's `nn.Linear` (see `linear`), LayerNorms from scale 1, bias 0, the attention as its
    own docstring says.

    Raises UserError if num_heads does not divide dim or feature_norm is unknown.
    """

    dim: int
    num_heads: int
    use_ib: bool
    feature_norm: str
    logvar_clip: float
    min_std: float
    residual: bool = True

    def __post_init__(self):
        if self.dim % self.num_heads:
            raise UserError(f"ib_mbm_n_head = {self.num_heads} does not divide ib_mbm_out_dim = {self.dim}")
        if self.feature_norm not in FEATURE_NORMS:
            raise UserError(f"ib_mbm_feature_norm = {self.feature_norm!r} must be one of {', '.join(FEATURE_NORMS)}")
        super().__post_init__()

    @nn.compact
    def __call__(self, q: jax.Array, kv: jax.Array) -> Latent:
        query = linear(_normalise(q, self.feature_norm), self.dim, name="query")
        teachers = linear(_normalise(kv, self.feature_norm), self.dim, name="teachers")
        s = TeacherAttention(self.num_heads, name="attention")(
            _layer_norm(query, "query_norm"), _layer_norm(teachers, "teachers_norm")
        )
        if self.residual:
            s = _layer_norm(s + query, "norm")
        mu = linear(s, self.dim, name="mu")
        if not self.use_ib:
            return Latent(mu, None, None)
        raw = linear(s, self.dim, name="logvar")
        logvar = jnp.clip(raw, max(-self.logvar_clip, 2 * math.log(self.min_std)), self.logvar_clip)
        return Latent(mu, logvar, jnp.mean(logvar != raw, axis=-1, dtype=jnp.float32))


def _masked(x: jax.Array, mask: np.ndarray, value: float) -> jax.Array:
    return jnp.where(mask, value, x) if mask.any() else x


class SynergyHead(nn.Module):
    """Dense(d)-relu-dropout-Dense(C) on a code z [B, d], added to what the teachers say together: synergy logits
    [B, C], float32 (SPEC 12).

    base: one of BASES, what the output is added to: nothing, the teachers' average, or their mixture, log sum_k pi_k
    p_k with pi = softmax(Dense(T)(z)). With a base the last layer starts at zero, and so does the router that gives pi:
    synergy starts as the base. Else dense layers start as PyTorch's `nn.Linear` (see `linear`).
    learnable_temperature: the sum is divided by exp(t), t a scalar parameter that starts at 0.
    """

    num_classes: int
    dim: int
    dropout: float
    learnable_temperature: bool
    base: str = "none"
    num_teachers: int = 1

    def setup(self):
        if self.base == "mixture":
            self.router = nn.Dense(self.num_teachers, kernel_init=nn.initializers.zeros)

    @nn.compact
    def __call__(
        self,
        z: jax.Array,
        logs: jax.Array | None = None,
        known: np.ndarray | None = None,
        kept: jax.Array | None = None,
        *,
        dropout_keys: jax.Array | None = None,
    ) -> jax.Array:
        """logs: [B, T, C] log-probabilities of the teachers over what each knows, see `pools.py`; None: the base is
        the uniform distribution. known: [T, C], who knows what: synergy is -inf where nobody does; None: all know all.
        kept: [B, T] of bool, the teachers that are in the base; None: all. dropout_keys: [B] typed keys, one per
        example, so that a mask depends on no device; None: no dropout."""
        known = np.ones((self.num_teachers, self.num_classes), bool) if known is None else known
        nobody: np.ndarray = np.logical_not(known.any(axis=0))
        hidden = dropout(nn.relu(linear(z, self.dim, name="fc1")), self.dropout, dropout_keys)
        logits = linear(hidden, self.num_classes, name="fc2", zero=self.base != "none")
        if self.base != "none" and logs is not None:
            sharing = known if kept is None else remaining(known, kept)
            logits += _masked(self.pool(z, logs, sharing), nobody, 0.0)
        if self.learnable_temperature:
            logits /= jnp.exp(self.param("log_temperature", nn.initializers.zeros, ()))
        return _masked(logits, nobody, -jnp.inf)  # last: 0 * -inf in the gradient of t would be NaN

    def pool(self, z: jax.Array, logs: jax.Array, known: Known) -> jax.Array:
        """The base alone, [B, C]."""
        if self.base == "mixture":
            return mixture(logs, known, jax.nn.log_softmax(self.router(z)))
        return weighted_mean(logs, known, jnp.ones(logs.shape[:2]))
