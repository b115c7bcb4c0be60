"""The A-Step's loss: fits IB_MBM, head and adapters to labels and to soft targets (SPEC 4)."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from asib_jax import streams
from asib_jax.models.ensemble import Mode, Networks, Variables, classify, fuse, keys_and_values, query, run_student
from asib_jax.models.ib_mbm import sample
from asib_jax.models.pools import draw_kept
from asib_jax.objectives import inputs, losses, targets


@dataclasses.dataclass(frozen=True)
class ATerms:
    """Static weights of the A-Step's loss, under their names in SPEC 4; a weight of 0 drops its term at trace time."""

    synergy_ce_alpha: float
    synergy_kd_alpha: float
    kd_alpha: float  # a_kd: towards the student
    cccp_alpha: float  # 0 without use_cccp
    cccp_tau: float
    feat_kd_alpha: float
    reg_lambda: float
    ib_mbm_reg_lambda: float
    label_smoothing: float
    min_cw: float
    data_aug: int
    teacher_dropout: float = 0.0  # the rate at which teachers are left out of examples


def a_loss(
    variables: Variables,
    controls: dict,
    batch: dict,
    *,
    nets: Networks,
    terms: ATerms,
    trained: Callable[[Any], Any],
    teacher_modes: tuple[Mode, ...] = (),
    axis_name: str | None = None,
) -> tuple[jax.Array, tuple[dict, dict]]:
    """The loss, the batch statistics of teachers in training, and metrics, as `step.Loss` has them.

    trained: selects from the parameters the trained teacher leaves that `reg_lambda` acts on.
    controls: tau, temperatures, beta, open (o), certain (0 during the synergy-only epochs, when w = 1), augment_key,
    noise_key, dropout_key. While `open` is 0 the student's logits are not read; while `beta` is 0 neither is the
    Gaussian KL.
    metrics: the parts that the loss is the sum of (`step.TERMS`); loss; acc, of synergy; with the bottleneck also
    `clipped`, the share of log-variances at a bound, and `certainty_sd`, the spread of w.
    """
    mean = losses.batch_mean(axis_name)
    pixels = inputs.augmented(controls, batch, terms.data_aug)
    dropout_keys = streams.per_example(controls["dropout_key"], batch["index"])
    teachers, stats = inputs.teacher_outputs(nets, variables, controls, pixels, batch, teacher_modes, dropout_keys)
    student = batch["student"] if "student" in batch else run_student(nets, variables, pixels)
    asks = query(nets, variables, student.feat)
    kv, kept = _some(keys_and_values(nets, variables, teachers), dropout_keys, terms.teacher_dropout)
    latent = fuse(nets, variables, asks, kv)
    z, weight = latent.mu, jnp.ones(())
    if nets.ib_mbm.use_ib:
        z = sample(latent, _noise(streams.per_example(controls["noise_key"], batch["index"]), z.shape[1:]))
        certainty = losses.certainty_weight(latent.logvar, terms.min_cw, mean)
        weight = jnp.where(controls["certain"] > 0, certainty, 1.0)
    logits = classify(nets, variables, z, teachers.logits, dropout_keys, kept)
    student_logit = jnp.where(controls["open"] > 0, student.logit, 0.0)  # 0 * NaN would be NaN, in the gradient, too
    student_logit = jnp.where(nets.covered, student_logit, -jnp.inf)  # of the others synergy can say nothing
    parts = {"ce": terms.synergy_ce_alpha * _cross_entropy(logits, batch["label"], weight, nets, terms, mean)}
    if terms.synergy_kd_alpha:
        kd = losses.kd(logits, targets.average(teachers.logits, nets.known), controls["tau"])
        parts["kd_average"] = terms.synergy_kd_alpha * jnp.mean(weight * kd)
    if terms.kd_alpha:
        kd = losses.kd(logits, student_logit, controls["tau"])
        parts["kd_student"] = controls["open"] * terms.kd_alpha * jnp.mean(weight * kd)
    if nets.ib_mbm.use_ib:
        kl = jnp.mean(losses.gaussian_kl(latent.mu, latent.logvar))
        parts["gaussian_kl"] = jnp.where(controls["beta"] > 0, controls["beta"] * kl, 0.0)
    if terms.cccp_alpha:
        parts["cccp"] = controls["open"] * jnp.mean(cccp(logits, student_logit, terms.cccp_alpha, terms.cccp_tau))
    if terms.feat_kd_alpha:
        parts["feat_kd"] = terms.feat_kd_alpha * jnp.mean(weight * losses.feature_kd(latent.mu, asks))
    if terms.reg_lambda:
        parts["reg"] = terms.reg_lambda * mean_square(trained(variables.params))
    if terms.ib_mbm_reg_lambda:
        fusion = {name: variables.params[name] for name in ("ib_mbm", "synergy_head")}
        parts["ib_mbm_reg"] = terms.ib_mbm_reg_lambda * mean_square(fusion)
    loss = sum(parts.values(), jnp.zeros(()))
    metrics = {**parts, "loss": loss, "acc": losses.accuracy(logits, batch["label"])}
    if nets.ib_mbm.use_ib:
        metrics |= {"clipped": jnp.mean(latent.clipped), "certainty_sd": jnp.sqrt(mean((weight - 1) ** 2))}
    return loss, (stats, metrics)


def _some(kv: jax.Array, keys: jax.Array, rate: float) -> tuple[jax.Array, jax.Array | None]:
    """The teachers' kv [B, T, Dk], zero where one is left out of an example, and which are kept, [B, T]; None: all."""
    if not rate:
        return kv, None
    kept = draw_kept(streams.branch(keys, "teachers"), kv.shape[1], rate)
    return jnp.where(kept[..., None], kv, 0.0), kept


def _noise(keys: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Standard normal [B, *shape], by the keys [B]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


def _cross_entropy(
    logits: jax.Array, labels: jax.Array, weight: jax.Array, nets: Networks, terms: ATerms, mean: losses.Mean
) -> jax.Array:
    """The weighted mean over the images whose class some teacher knows (SPEC 11)."""
    ce = losses.cross_entropy(logits, labels, terms.label_smoothing, nets.covered)
    if not nets.covered.all():
        counted = jnp.asarray(nets.covered)[labels]
        ce = jnp.where(counted, ce, 0.0)  # not infinity times 0
        weight *= losses.normalise_weights(counted.astype(jnp.float32), mean)
    return jnp.mean(weight * ce)


def cccp(logits: jax.Array, student_logits: jax.Array, alpha: float, tau: float) -> jax.Array:
    """The CCCP surrogate [B]: alpha times KD of the synergy logits towards the student's, at the fixed `tau`.

    It is the A-Step's KD towards the student once more, at another temperature; both are logged (SPEC 2).
    """
    return alpha * losses.kd(logits, student_logits, tau)


def mean_square(params: Any) -> jax.Array:
    """The mean over tensors of each tensor's mean square: the regulariser of SPEC 4. Of no tensors: 0."""
    squares = [jnp.mean(leaf**2) for leaf in jax.tree.leaves(params)]
    return jnp.mean(jnp.stack(squares)) if squares else jnp.zeros(())
