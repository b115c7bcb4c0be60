"""The A-Step and B-Step as pure functions (SPEC 4 and 5), and the one factory that makes a training step of a loss.

A loss is `(variables, controls, batch) -> (scalar, (batch_stats, metrics))`. `batch` holds image [B, H, W, ch] uint8,
label and index [B], and, where networks were run beforehand, their outputs under "teachers" and "student"; with both
the A-Step needs no image. `controls` holds every scalar that depends on the epoch, as arrays, so that no schedule
recompiles.
"""
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from asib_jax import streams
from asib_jax.engine import parallel
from asib_jax.objectives import losses
from asib_jax.data.augment import augment, mix
from asib_jax.models.ensemble import (Mode, Networks, TeacherOutputs, Variables, classify, fuse, keys_and_values, query,
                                      run_network, run_student, run_teachers)
from asib_jax.models.ib_mbm import sample
from asib_jax.objectives.state import TrainState, join

TERMS = ("ce", "kd_average", "kd_student", "gaussian_kl", "cccp", "kd", "feat_kd", "reg", "ib_mbm_reg")
"""The metrics that a loss is the sum of, in the order in which it adds them up; other metrics follow from them."""

Loss = Callable[[Variables, dict, dict], tuple[jax.Array, tuple[dict, dict]]]


class Training(NamedTuple):
    """What a training step is made of. mask: what it trains, over all parameters; trained_stats: the networks whose
    batch statistics it updates; tx: from gradients to directions."""

    loss: Loss
    mask: dict[str, Any]
    trained_stats: tuple[str, ...]
    tx: optax.GradientTransformation


@dataclasses.dataclass(frozen=True)
class ATerms:
    """Static weights of the A-Step loss, under their names in SPEC 4; a weight of 0 drops its term at trace time."""

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


@dataclasses.dataclass(frozen=True)
class BTerms:
    """Static weights of the B-Step loss, under their names in SPEC 5. The defaults are plain supervised training."""

    data_aug: int
    ce_alpha: float = 1.0
    kd_alpha: float = 0.0
    kd_target: str = "avg"
    kd_teacher_index: int = 0
    kd_max_ratio: float = 0.0
    feat_kd_alpha: float = 0.0
    label_smoothing: float = 0.0
    loss_clamp_max: float = 0.0  # 0 without use_loss_clamp
    disagree_mode: str = ""  # "" without use_disagree_weight
    disagree_lambda_high: float = 1.0
    disagree_lambda_low: float = 1.0
    mixup_alpha: float = 0.0
    cutmix_alpha: float = 0.0
    min_cw: float = 0.1

    @property
    def uses_fusion(self) -> bool:
        return (self.kd_alpha > 0 and self.kd_target == "synergy") or self.feat_kd_alpha > 0


def make_train_step(loss: Loss, tx: optax.GradientTransformation, *, axis_name: str | None = None) -> Callable:
    """`step(state, frozen, controls, batch) -> (state, metrics)`: one update of `state.params` at controls["lr"].

    Metrics are means over the global batch. Frozen leaves are arguments, never differentiated. A step changes nothing
    but the loss scale, if there is one, where the loss, a batch statistic or the gradient's norm is not finite on any
    device; the metric "skipped" is then 1, else 0.
    """
    def step(state: TrainState, frozen: Variables, controls: dict, batch: dict) -> tuple[TrainState, dict]:
        def objective(params):
            return loss(join(state._replace(params=params), frozen), controls, batch)

        loss_scale = None
        if state.loss_scale is None:
            (value, (stats, metrics)), grads = jax.value_and_grad(objective, has_aux=True)(state.params)
            grads = jax.lax.pmean(grads, axis_name) if axis_name else grads
        else:
            differentiate = state.loss_scale.value_and_grad(objective, has_aux=True, axis_name=axis_name)
            loss_scale, _, (value, (stats, metrics)), grads = differentiate(state.params)  # unscaled means over the axis
        if axis_name:
            value, metrics = jax.lax.pmean((value, metrics), axis_name)
        stats = {name: stats[name] for name in state.batch_stats}
        # The norm is the one that clipping takes; a gradient whose square overflows would ruin AdamW's moments as well.
        finite = _all_finite((value, optax.tree.norm(grads), stats))
        directions, opt_state = tx.update(grads, state.opt_state, state.params)
        params = jax.tree.map(lambda p, d: p - controls["lr"] * d, state.params, directions)
        new, old = TrainState(params, stats, opt_state, loss_scale), state._replace(loss_scale=loss_scale)
        state = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)
        return state, {**metrics, "skipped": 1 - jnp.float32(finite)}
    return step


def _all_finite(tree: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def a_loss(variables: Variables, controls: dict, batch: dict, *, nets: Networks, terms: ATerms,
           trained: Callable[[Any], Any], teacher_modes: tuple[Mode, ...] = (), axis_name: str | None = None):
    """The A-Step loss: fits IB_MBM, head and adapters to labels and to soft targets (SPEC 4).

    trained: selects from the parameters the trained teacher leaves that `reg_lambda` acts on.
    controls: tau, beta, open (o), certain (0 during the synergy-only epochs, when w = 1), augment_key, noise_key,
    dropout_key.
    """
    mean = parallel.batch_mean(axis_name)
    pixels = _pixels(controls, batch, terms.data_aug)
    dropout_keys = streams.per_example(controls["dropout_key"], batch["index"])
    teachers, stats = _teachers(nets, variables, pixels, batch, teacher_modes, dropout_keys)
    student = batch["student"] if "student" in batch else run_student(nets, variables, pixels)
    asks = query(nets, variables, student.feat)
    latent = fuse(nets, variables, asks, keys_and_values(nets, variables, teachers.feats))
    z, weight = latent.mu, jnp.ones(())
    if nets.ib_mbm.use_ib:
        keys = streams.per_example(controls["noise_key"], batch["index"])
        z = sample(latent, jax.vmap(lambda key: jax.random.normal(key, z.shape[1:]))(keys))
        certainty = losses.certainty_weight(latent.logvar, terms.min_cw, mean)
        weight = jnp.where(controls["certain"] > 0, certainty, 1.0)
    logits = classify(nets, variables, z, dropout_keys)

    def weighted(per_sample):
        return jnp.mean(weight * per_sample)

    ce = weighted(losses.cross_entropy(logits, batch["label"], terms.label_smoothing))
    parts = {"ce": terms.synergy_ce_alpha * ce}
    if terms.synergy_kd_alpha:
        average = jnp.mean(teachers.logits, axis=1)
        parts["kd_average"] = terms.synergy_kd_alpha * weighted(losses.kd(logits, average, controls["tau"]))
    if terms.kd_alpha:
        kd = weighted(losses.kd(logits, student.logit, controls["tau"]))
        parts["kd_student"] = controls["open"] * terms.kd_alpha * kd
    if nets.ib_mbm.use_ib:
        parts["gaussian_kl"] = controls["beta"] * jnp.mean(losses.gaussian_kl(latent.mu, latent.logvar))
    if terms.cccp_alpha:
        parts["cccp"] = controls["open"] * jnp.mean(cccp(logits, student.logit, terms.cccp_alpha, terms.cccp_tau))
    if terms.feat_kd_alpha:
        parts["feat_kd"] = terms.feat_kd_alpha * weighted(losses.feature_kd(latent.mu, asks))
    if terms.reg_lambda:
        parts["reg"] = terms.reg_lambda * mean_square(trained(variables.params))
    if terms.ib_mbm_reg_lambda:
        fusion = {name: variables.params[name] for name in ("ib_mbm", "synergy_head")}
        parts["ib_mbm_reg"] = terms.ib_mbm_reg_lambda * mean_square(fusion)
    loss = sum(parts.values())
    metrics = {**parts, "loss": loss, "acc": _accuracy(logits, batch["label"])}
    if nets.ib_mbm.use_ib:
        metrics |= {"clipped": jnp.mean(latent.clipped), "certainty_sd": jnp.sqrt(mean((weight - 1) ** 2))}
    return loss, (stats, metrics)


def b_loss(variables: Variables, controls: dict, batch: dict, *, nets: Networks, terms: BTerms,
           mode: Mode = Mode(train=True), axis_name: str | None = None):
    """The B-Step loss of the student (SPEC 5). With the default terms: supervised training of any network as "student".

    controls: tau, gate (1: distil from synergy, 0: from the average), average_share (of `kd_ens_alpha`), ramp,
    ratio_on, augment_key, mix_key, dropout_key, step (within the epoch).
    """
    mean = parallel.batch_mean(axis_name)
    pixels = _pixels(controls, batch, terms.data_aug)
    labels = batch["label"]
    mix_key = jax.random.fold_in(controls["mix_key"], controls["step"])
    pixels, labels_b, lam = mix(mix_key, pixels, labels, mixup_alpha=terms.mixup_alpha,
                                cutmix_alpha=terms.cutmix_alpha, axis_name=axis_name)
    dropout_keys = streams.per_example(controls["dropout_key"], batch["index"])
    student, stats = run_network(nets.student, variables.of("student"), pixels, mode, dropout_keys)
    ce = lam * losses.cross_entropy(student.logit, labels, terms.label_smoothing)
    if terms.mixup_alpha or terms.cutmix_alpha:
        ce += (1 - lam) * losses.cross_entropy(student.logit, labels_b, terms.label_smoothing)
    ce = jnp.mean(ce)
    loss, metrics = terms.ce_alpha * ce, {"ce": ce, "acc": _accuracy(student.logit, labels)}
    if terms.kd_alpha or terms.feat_kd_alpha:
        teachers, _ = _teachers(nets, variables, pixels, batch)
        distilled, more = _distillation(variables, controls, student, teachers, labels, ce, nets, terms, mean)
        loss, metrics = loss + distilled, metrics | more
    if terms.loss_clamp_max:
        loss *= losses.clamp_factor(mean(loss), terms.loss_clamp_max)
    return loss, ({"student": stats}, {**metrics, "loss": loss})


def _distillation(variables, controls, student, teachers, labels, ce, nets, terms, mean):
    """The KD and feature-KD terms of the B-Step. Nothing here but `student` gets a gradient."""
    certainty, total, metrics = jnp.ones(()), 0.0, {}
    by_teacher = jnp.moveaxis(teachers.logits, 1, 0)
    if terms.uses_fusion:
        feature = query(nets, variables, student.feat_2d)
        latent = fuse(nets, variables, jax.lax.stop_gradient(feature), keys_and_values(nets, variables, teachers.feats))
        if nets.ib_mbm.use_ib:
            certainty = losses.certainty_weight(latent.logvar, terms.min_cw, mean)
    if terms.kd_alpha:
        if terms.kd_target == "synergy":
            average = losses.KD_TARGETS["avg"](by_teacher, controls["tau"], 0)
            share = jnp.where(controls["gate"] > 0, controls["average_share"], 1.0)
            target = (1 - share) * classify(nets, variables, latent.mu) + share * average
        else:
            target = losses.KD_TARGETS[terms.kd_target](by_teacher, controls["tau"], terms.kd_teacher_index)
        weight = certainty * jnp.ones_like(labels, jnp.float32)
        if terms.disagree_mode:
            weight *= losses.disagreement_weight(by_teacher, labels, terms.disagree_mode, terms.disagree_lambda_high,
                                                 terms.disagree_lambda_low)
        kd = losses.kd(student.logit, target, controls["tau"])
        ratio = jnp.ones(())
        if terms.kd_max_ratio:
            bound = losses.kd_ratio(mean(ce), mean(kd), terms.kd_max_ratio)
            ratio = jnp.where(controls["ratio_on"] > 0, bound, 1.0)
        total += (ratio * controls["ramp"] * terms.kd_alpha
                  * jnp.mean(losses.normalise_weights(weight, mean) * kd))
        metrics |= {"kd": jnp.mean(kd), "kd_ratio": ratio, "target_acc": _accuracy(target, labels)}
    if terms.feat_kd_alpha:
        feat_kd = jnp.mean(certainty * losses.feature_kd(feature, latent.mu))
        total += terms.feat_kd_alpha * feat_kd
        metrics["feat_kd"] = feat_kd
    return total, metrics


def cccp(logits: jax.Array, student_logits: jax.Array, alpha: float, tau: float) -> jax.Array:
    """The CCCP surrogate [B]: alpha times KD of the synergy logits towards the student's, at the fixed `tau`.

    It is the A-Step's KD towards the student once more, at another temperature; both are logged (SPEC 2).
    """
    return alpha * losses.kd(logits, student_logits, tau)


def mean_square(params: Any) -> jax.Array:
    """The mean over tensors of each tensor's mean square: the regulariser of SPEC 4. Of no tensors: 0."""
    squares = [jnp.mean(leaf ** 2) for leaf in jax.tree.leaves(params)]
    return jnp.mean(jnp.stack(squares)) if squares else jnp.zeros(())


def _pixels(controls: dict, batch: dict, data_aug: int) -> jax.Array | None:
    """The augmented images; None where the batch has none."""
    return augment(controls["augment_key"], batch["index"], batch["image"], data_aug) if "image" in batch else None


def _teachers(nets: Networks, variables: Variables, pixels: jax.Array | None, batch: dict, modes: tuple[Mode, ...] = (),
              dropout_keys: jax.Array | None = None) -> tuple[TeacherOutputs, dict]:
    """The teachers' outputs on the batch: stored ones if it brings them, else run now."""
    if "teachers" in batch:
        return batch["teachers"], {}
    return run_teachers(nets, variables, pixels, modes, dropout_keys)


def _accuracy(logits: jax.Array, labels: jax.Array) -> jax.Array:
    return jnp.mean(jnp.argmax(logits, axis=-1) == labels)
