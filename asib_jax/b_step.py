"""The B-Step: distil the student while all else stands still (SPEC 5)."""

import functools
import logging
from typing import Any

import jax
import numpy as np

from asib_jax import streams
from asib_jax.build import temperatures
from asib_jax.context import Context
from asib_jax.engine.progress import Progress, of_network
from asib_jax.models.ensemble import Mode, Networks, Variables
from asib_jax.models.kd_model import stage_names
from asib_jax.objectives import freezing, losses, schedules
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.optimizers import make_optimizer
from asib_jax.objectives.step import Training
from asib_jax.phases import Phase
from asib_jax.rates import learning_rate
from asib_jax.recipe import Recipe
from asib_jax.weights import checkpoint

logger = logging.getLogger("asib_jax")


def phase(
    recipe: Recipe,
    nets: Networks,
    params: dict[str, Any],
    stage: int,
    images: int,
    axis_name: str | None = None,
    student: str = "student",
) -> Phase:
    """The B-Step of a stage (from 0) over so many training images. params: arrays or their shapes.

    student: the network it trains; "control" is the same student in a run of its own beside this one.
    """
    prefix = "" if student == "student" else f"{student}/"
    runs = _runs_networks(recipe) if nets.teachers and recipe.reads_teachers_in_b else ""
    reads = frozenset({"teachers"} if nets.teachers and recipe.reads_teachers_in_b and not runs else ())
    mask, _ = trainable(recipe, nets, params, stage, student)
    pretrained = bool(recipe.model.student.weights) and stage == 0
    chosen = {student: {child: child != "distill_adapter" or adapter_trains(recipe) for child in mask[student]}}
    return Phase(
        name=f"{prefix}stage{stage + 1}/b",
        title=f"{student if prefix else 'B-Step'}, stage {stage + 1}",
        epochs=recipe.b_epochs[stage],
        network=student,
        nets=nets,
        split="train",
        optimizer=f"{prefix}b",
        training=make_training(recipe, nets, params, stage, axis_name, student),
        rate=learning_rate(recipe, recipe.student_lr, images, sum(recipe.b_epochs), recipe.schedule.lr_warmup_epochs),
        controls=functools.partial(controls_of, recipe, stage),
        order=lambda epoch: streams.rng(recipe.seed, "order/b", stage, epoch),
        views=schedules.views_of_stage(recipe.b_epochs, stage, recipe.b_step_views),
        reads=reads,
        runs_networks=f"the B-Step runs the teachers at every step: {runs}" if runs else "",
        score=student,
        best=student,
        chosen=chosen,
        restore=recipe.restore_best,
        watch=nets.ib_mbm is not None or pretrained,
        incoming=pretrained,
        counts=functools.partial(_count, recipe) if not prefix else Phase.counts,
        finish=functools.partial(_save_students, f"{prefix.replace('/', '_')}stage{stage + 1}", student),
    )


def _runs_networks(recipe: Recipe) -> str:
    """Why the teachers are to be run at every step; "": they need not."""
    if not recipe.b_step_views:
        return "b_step_views=0 asks for new views in every epoch"
    if recipe.trains_teachers:
        return "use_teacher_finetuning changes them"
    if recipe.mixes:
        return "they have to see the images that mixup_alpha or cutmix_alpha_distill mixes"
    return ""


def make_training(
    recipe: Recipe,
    nets: Networks,
    params: dict[str, Any],
    stage: int,
    axis_name: str | None = None,
    student: str = "student",
) -> Training:
    """What the B-Step of a stage (from 0) trains, by which loss and optimizer."""
    mask, mode = trainable(recipe, nets, params, stage, student)
    tx = make_optimizer(
        recipe.optimizer,
        weight_decay=recipe.student_weight_decay,
        grad_clip_norm=recipe.grad_clip_norm,
        momentum=recipe.momentum,
    )
    loss = functools.partial(b_loss, nets=nets, terms=terms_of(recipe), mode=mode, axis_name=axis_name, student=student)
    return Training(loss, mask, (student,), tx)


def trainable(
    recipe: Recipe, nets: Networks, params: dict[str, Any], stage: int, student: str = "student"
) -> tuple[dict[str, Any], Mode]:
    """What the B-Step trains, as a mask over the parameters, and how the student runs."""
    names = stage_names(nets.student)
    level = freezing.level_for_stage(recipe.student_freeze_level, stage) if recipe.use_partial_freeze else -1
    frozen = freezing.frozen_stages(level, len(names), "student_freeze_level")
    mask = freezing.trainable(params[student], names, level, recipe.student_freeze_bn)
    if "distill_adapter" in mask and not adapter_trains(recipe):
        mask["distill_adapter"] = jax.tree.map(lambda leaf: False, mask["distill_adapter"])
    return {student: mask}, Mode(train=True, frozen_stages=frozen, freeze_bn=recipe.student_freeze_bn)


def adapter_trains(recipe: Recipe) -> bool:
    """Whether a B-Step loss, feature KD, reaches the student's distillation adapter. Else it is the A-Step's."""
    return recipe.feat_kd_alpha > 0 and recipe.student_feature == "distill_feat"


def terms_of(recipe: Recipe) -> BTerms:
    """The static weights of the loss."""
    ce_alpha, kd_alpha = losses.renormalise_alphas(recipe.ce_alpha, recipe.kd_alpha)
    return BTerms(
        data_aug=recipe.dataset.data_aug,
        ce_alpha=ce_alpha,
        kd_alpha=kd_alpha,
        kd_target=recipe.kd_target,
        kd_teacher_index=recipe.kd_teacher_index,
        student_share=recipe.student_shares,
        kd_max_ratio=recipe.kd_max_ratio,
        feat_kd_alpha=recipe.feat_kd_alpha,
        label_smoothing=recipe.ce_label_smoothing,
        loss_clamp_max=recipe.loss_clamp_max if recipe.use_loss_clamp else 0.0,
        disagree_mode=recipe.disagree_mode if recipe.use_disagree_weight else "",
        disagree_lambda_high=recipe.disagree_lambda_high,
        disagree_lambda_low=recipe.disagree_lambda_low,
        mixup_alpha=recipe.mixup_alpha,
        cutmix_alpha=recipe.cutmix_alpha_distill,
        min_cw=recipe.min_cw,
    )


def controls_of(recipe: Recipe, stage: int, progress: Progress, epoch: int) -> dict[str, Any]:
    """Every scalar of the step that depends on the epoch, and its random streams.

    While the gate is shut the target is the teachers' average; certainty weights and feature KD act all the same
    (SPEC 5).
    """
    gate = progress.gate(recipe.gate)
    mixing = epoch < recipe.teacher_adapt_kd_warmup
    ramp, ratio_on = schedules.kd_ramp(epoch, stage, recipe.kd_warmup_epochs)
    tau = schedules.temperature(
        epoch, recipe.b_epochs[stage], tau=recipe.tau, schedule=recipe.tau_schedule, power=recipe.tau_decay_power
    )
    view, shares = schedules.view_of(recipe.b_epochs, stage, epoch, recipe.b_step_views), {}
    if recipe.student_shares:
        number, total = sum(recipe.b_epochs[:stage]) + epoch, sum(recipe.b_epochs)
        ends = {"start": recipe.kd_student_share, "end": recipe.kd_student_share_end}
        shares = {"student_share": np.float32(schedules.student_share(number, total, **ends))}
    return {
        **shares,
        "tau": np.float32(tau),
        "temperatures": temperatures(recipe, progress.temperatures),
        "gate": np.float32(gate),
        "average_share": np.float32(recipe.kd_ens_alpha if mixing else 0.0),
        "ramp": np.float32(ramp),
        "ratio_on": np.float32(ratio_on),
        "augment_key": streams.key(recipe.seed, "augment", *view),
        "mix_key": streams.key(recipe.seed, "mix", stage, epoch),
        "dropout_key": streams.key(recipe.seed, "dropout/b", stage, epoch),
    }


def _count(recipe: Recipe, progress: Progress, controls: dict[str, Any], steps: int) -> None:
    progress.distilled_steps[target_name(recipe, controls)] += steps


def target_name(recipe: Recipe, controls: dict[str, Any]) -> str:
    """What an epoch with these controls distils from."""
    if not recipe.kd_alpha:
        return "the fusion network's features" if recipe.feat_kd_alpha else "labels only"
    if recipe.kd_target != "synergy":
        return recipe.kd_target
    if not controls["gate"]:
        return "avg (gate shut)"
    return "synergy mixed with avg" if controls["average_share"] else "synergy"


def _save_students(name: str, student: str, context: Context, variables: Variables, progress: Progress) -> Variables:
    folder = context.record.folder / "checkpoints"
    checkpoint.save(folder / f"{name}_last", of_network(progress.last[student], student))
    best = progress.best[student]
    checkpoint.save(folder / f"{name}_best", of_network(best.held, student))
    if best.began is not None and best.latest < 0.9 * best.began:
        logger.warning(
            "%s: ends at %.2f %% on validation, far below the %.2f %% that its given weights had; a lower student_lr "
            "may keep what they know",
            name,
            100 * best.latest,
            100 * best.began,
        )
    return variables
