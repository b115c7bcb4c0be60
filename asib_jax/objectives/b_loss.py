"""The B-Step's loss of the student, and plain supervised training as its simplest case (SPEC 5)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from asib_jax import streams
from asib_jax.data.augment import mix
from asib_jax.models.ensemble import (
    Mode,
    Networks,
    TeacherOutputs,
    Variables,
    classify,
    fuse,
    keys_and_values,
    query,
    run_network,
)
from asib_jax.models.ib_mbm import Latent
from asib_jax.models.kd_model import known
from asib_jax.objectives import inputs, losses, targets

TRAINING = Mode(train=True)


@dataclasses.dataclass(frozen=True)
class BTerms:
    """Static weights of the B-Step's loss, under their names in SPEC 5. The defaults are plain supervised training."""

    data_aug: int
    ce_alpha: float = 1.0
    kd_alpha: float = 0.0
    kd_target: str = "avg"
    kd_teacher_index: int = 0
    student_share: bool = False  # whether controls["student_share"] acts
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


def b_loss(
    variables: Variables,
    controls: dict,
    batch: dict,
    *,
    nets: Networks,
    terms: BTerms,
    mode: Mode = TRAINING,
    student: str = "student",
    axis_name: str | None = None,
) -> tuple[jax.Array, tuple[dict, dict]]:
    """The loss, the student's batch statistics under its name, and metrics, as `step.Loss` has them.

    student: the name that the variables of `nets.student` have; only "student" can ask the fusion network.
    controls: tau, temperatures, gate (1: distil from synergy, 0: from the average), average_share (of `kd_ens_alpha`),
    student_share (where the terms say so), ramp, ratio_on, augment_key, mix_key, dropout_key, step (within the epoch).
    metrics: the parts that the loss is the sum of (`step.TERMS`), before the clamp; loss; acc; with KD also `kd_ratio`,
    the factor r, and `target_acc`, the target's accuracy. Nothing but the student's own outputs gets a gradient.
    """
    mean, labels = losses.batch_mean(axis_name), batch["label"]
    mix_key = jax.random.fold_in(controls["mix_key"], controls["step"])
    pixels = inputs.augmented(controls, batch, terms.data_aug)
    alphas = {"mixup_alpha": terms.mixup_alpha, "cutmix_alpha": terms.cutmix_alpha}
    pixels, labels_b, lam = mix(mix_key, pixels, labels, **alphas, axis_name=axis_name)
    dropout_keys = streams.per_example(controls["dropout_key"], batch["index"])
    own, stats = run_network(nets.student, variables.of(student), pixels, mode, dropout_keys)
    ce = _cross_entropy(own.logit, labels, labels_b, lam, terms, known(nets.student))
    parts, metrics = {"ce": terms.ce_alpha * ce}, {"acc": losses.accuracy(own.logit, labels)}
    certainty, latent = jnp.ones(()), None
    if terms.kd_alpha or terms.feat_kd_alpha:
        teachers, _ = inputs.teacher_outputs(nets, variables, controls, pixels, batch)
    if terms.uses_fusion:
        feature = query(nets, variables, own.feat_2d)
        latent = fuse(nets, variables, jax.lax.stop_gradient(feature), keys_and_values(nets, variables, teachers))
        if nets.ib_mbm.use_ib:
            certainty = losses.certainty_weight(latent.logvar, terms.min_cw, mean)
    if terms.kd_alpha:
        target = _target(variables, controls, teachers, latent, own.logit, labels, nets, terms)
        weight = certainty * jnp.ones_like(labels, jnp.float32)
        if terms.disagree_mode:
            high, low = terms.disagree_lambda_high, terms.disagree_lambda_low
            weight *= losses.disagreement_weight(teachers.logits, nets.known, labels, terms.disagree_mode, high, low)
        kd, ratio = losses.kd(own.logit, target, controls["tau"]), jnp.ones(())
        if terms.kd_max_ratio:
            bound = losses.kd_ratio(mean(ce), mean(kd), terms.kd_max_ratio)
            ratio = jnp.where(controls["ratio_on"] > 0, bound, 1.0)
        weighted = jnp.mean(losses.normalise_weights(weight, mean) * kd)
        parts["kd"] = ratio * controls["ramp"] * terms.kd_alpha * weighted
        metrics |= {"kd_ratio": ratio, "target_acc": losses.accuracy(target, labels)}
    if terms.feat_kd_alpha:
        parts["feat_kd"] = terms.feat_kd_alpha * jnp.mean(certainty * losses.feature_kd(feature, latent.mu))
    loss = sum(parts.values(), jnp.zeros(()))
    if terms.loss_clamp_max:
        loss *= losses.clamp_factor(mean(loss), terms.loss_clamp_max)
    return loss, ({student: stats}, {**parts, **metrics, "loss": loss})


def _target(
    variables: Variables,
    controls: dict,
    teachers: TeacherOutputs,
    latent: Latent | None,
    logits: jax.Array,
    labels: jax.Array,
    nets: Networks,
    terms: BTerms,
) -> jax.Array:
    """What `kd_target` distils from, [B, C]. latent: the fusion network's, for synergy; logits: the student's."""
    if terms.kd_target == "synergy":
        fused = classify(nets, variables, latent.mu, teachers.logits)
        average = targets.average(teachers.logits, nets.known)
        target = targets.synergy(fused, average, controls["gate"], controls["average_share"])
    else:
        of_teachers = targets.KD_TARGETS[terms.kd_target]
        target = of_teachers(teachers.logits, nets.known, controls["tau"], terms.kd_teacher_index, labels, logits)
    return targets.with_student(target, logits, controls["student_share"]) if terms.student_share else target


def _cross_entropy(
    logits: jax.Array, labels: jax.Array, labels_b: jax.Array, lam: jax.Array | float, terms: BTerms, known: np.ndarray
) -> jax.Array:
    """The mean over the batch, of mixed images with the shares `lam` and 1 - `lam` of both labels."""
    ce = lam * losses.cross_entropy(logits, labels, terms.label_smoothing, known)
    if terms.mixup_alpha or terms.cutmix_alpha:
        ce += (1 - lam) * losses.cross_entropy(logits, labels_b, terms.label_smoothing, known)
    return jnp.mean(ce)
