"""The A-Step: fit the fusion network while teachers and student stand still (SPEC 4)."""

import functools
import math
from typing import Any

import jax
import numpy as np

from asib_jax import streams
from asib_jax.build import temperatures
from asib_jax.engine.progress import Progress
from asib_jax.models.ensemble import Mode, Networks
from asib_jax.models.kd_model import stage_names
from asib_jax.objectives import freezing, losses, schedules
from asib_jax.objectives.a_loss import ATerms, a_loss
from asib_jax.objectives.b_loss import BTerms, b_loss
from asib_jax.objectives.optimizers import make_optimizer
from asib_jax.objectives.step import Training
from asib_jax.phases import Phase
from asib_jax.rates import learning_rate
from asib_jax.recipe import Recipe


def phase(
    recipe: Recipe, nets: Networks, params: dict[str, Any], stage: int, images: int, axis_name: str | None = None
) -> Phase:
    """The A-Step of a stage (from 0) over so many training images. params: arrays or their shapes."""
    lengths = (recipe.a_epochs,) * len(recipe.b_epochs)
    runs = ""
    if not recipe.a_step_views:
        runs = "a_step_views=0 asks for new views in every epoch"
    elif recipe.trains_teachers:
        runs = "use_teacher_finetuning changes them"
    name = f"stage{stage + 1}/a"
    return Phase(
        name=name,
        title=f"A-Step, stage {stage + 1}",
        epochs=recipe.a_epochs,
        network="student",
        nets=nets,
        training=make_training(recipe, nets, params, stage, axis_name),
        optimizer="a",
        split="train",
        rate=learning_rate(recipe, recipe.a_step_lr, images, sum(lengths), recipe.schedule.lr_warmup_epochs),
        controls=functools.partial(controls_of, recipe, stage),
        order=lambda epoch: streams.rng(recipe.seed, "order/a", stage, epoch),
        views=schedules.views_of_stage(lengths, stage, recipe.a_step_views),
        reads=frozenset() if runs else frozenset({"teachers", "student"}),
        runs_networks=f"the A-Step runs the teachers at every step: {runs}" if runs else "",
        score="synergy",
        best=name,
        holds_moments=True,
        watch=True,
        incoming=True,
        counts=functools.partial(_count, recipe),
    )


def make_training(
    recipe: Recipe, nets: Networks, params: dict[str, Any], stage: int, axis_name: str | None = None
) -> Training:
    """What the A-Step of a stage (from 0) trains, by which loss and optimizer."""
    mask, modes = trainable(recipe, nets, params, stage)

    def trained(params):
        return [freezing.split(params[name], mask.get(name, False))[0] for name in nets.teacher_names]

    loss = functools.partial(
        a_loss, nets=nets, terms=terms_of(recipe), trained=trained, teacher_modes=modes, axis_name=axis_name
    )
    return Training(loss, mask, nets.teacher_names if recipe.use_teacher_finetuning else (), optimizer_of(recipe))


def trainable(
    recipe: Recipe, nets: Networks, params: dict[str, Any], stage: int
) -> tuple[dict[str, Any], tuple[Mode, ...]]:
    """What the A-Step trains, as a mask over the parameters, and how each teacher runs."""
    mask: dict[str, Any] = {"ib_mbm": True, "synergy_head": True}
    if recipe.student_feature == "distill_feat" and recipe.feat_kd_alpha == 0:
        mask["student"] = {child: child == "distill_adapter" for child in params["student"]}
    modes = []
    for k, (name, model) in enumerate(zip(nets.teacher_names, nets.teachers, strict=True)):
        options = recipe.teachers[k]
        mode = Mode()
        if recipe.train_distill_adapter_only:
            mask[name] = {child: child == "distill_adapter" for child in params[name]}
        elif recipe.use_teacher_finetuning:
            names = stage_names(model)
            level = freezing.level_for_stage(options.freeze_level, stage) if recipe.use_partial_freeze else -1
            frozen = freezing.frozen_stages(level, len(names), f"{name}.freeze_level")
            mode = Mode(train=True, frozen_stages=frozen, freeze_bn=options.freeze_bn)
            # No A-Step loss reaches a teacher's classifier: its logits only ever serve as a target.
            mask[name] = {
                **freezing.trainable(params[name], names, level, options.freeze_bn),
                "classifier": jax.tree.map(lambda leaf: False, params[name]["classifier"]),
            }
        modes.append(mode)
    return mask, tuple(modes)


def terms_of(recipe: Recipe) -> ATerms:
    """The static weights of the loss."""
    trains_teachers = recipe.use_teacher_finetuning or recipe.train_distill_adapter_only
    towards_student = recipe.teacher_adapt_alpha_kd
    _, kd_alpha = losses.renormalise_alphas(recipe.ce_alpha, recipe.kd_alpha)
    return ATerms(
        synergy_ce_alpha=recipe.synergy_ce_alpha,
        synergy_kd_alpha=recipe.synergy_kd_alpha,
        kd_alpha=kd_alpha if towards_student is None else towards_student,
        cccp_alpha=recipe.cccp_alpha if recipe.use_cccp else 0.0,
        cccp_tau=recipe.tau,
        feat_kd_alpha=recipe.feat_kd_alpha,
        reg_lambda=recipe.reg_lambda if trains_teachers else 0.0,
        ib_mbm_reg_lambda=recipe.ib_mbm_reg_lambda,
        label_smoothing=recipe.label_smoothing,
        min_cw=recipe.min_cw,
        data_aug=recipe.dataset.data_aug,
        teacher_dropout=recipe.ib_mbm_teacher_dropout,
    )


def optimizer_of(recipe: Recipe):
    """AdamW whose rate, `a_step_lr`, is scaled for each network (SPEC 4)."""
    teacher_lr = recipe.a_step_lr if recipe.teacher_lr is None else recipe.teacher_lr
    factors = {"ib_mbm": recipe.ib_mbm_lr_factor, "synergy_head": recipe.ib_mbm_lr_factor}
    factors |= {f"teacher{k}": teacher_lr / recipe.a_step_lr for k in range(1, len(recipe.teachers) + 1)}
    return make_optimizer(
        "adamw", weight_decay=recipe.a_step_weight_decay, grad_clip_norm=recipe.grad_clip_norm, factors=factors
    )


def controls_of(recipe: Recipe, stage: int, progress: Progress, epoch: int) -> dict[str, Any]:
    """Every scalar of the step that depends on the epoch, and its random streams."""
    warm = stage == 0 and epoch < recipe.synergy_only_epochs
    gate = progress.gate(recipe.gate) and progress.epochs["b"] > 0  # of a student that has learnt
    beta = schedules.ib_beta(
        progress.ib_epochs,
        beta=recipe.ib_beta,
        warmup_epochs=recipe.ib_beta_warmup_epochs,
        schedule=recipe.beta_schedule,
    )
    tau = schedules.temperature(
        epoch, recipe.a_epochs, tau=recipe.tau, schedule=recipe.tau_schedule, power=recipe.tau_decay_power
    )
    view = schedules.view_of((recipe.a_epochs,) * len(recipe.b_epochs), stage, epoch, recipe.a_step_views)
    return {
        "tau": np.float32(tau),
        "temperatures": temperatures(recipe, progress.temperatures),
        "beta": np.float32(0.0 if warm else beta),
        "certain": np.float32(not warm),
        "open": np.float32(gate and not warm),
        "augment_key": streams.key(recipe.seed, "augment", *view),
        "noise_key": streams.key(recipe.seed, "noise", stage, epoch),
        "dropout_key": streams.key(recipe.seed, "dropout", stage, epoch),
    }


def _count(recipe: Recipe, progress: Progress, controls: dict[str, Any], steps: int) -> None:
    progress.ib_epochs += int(recipe.use_ib and controls["certain"])


def calibration(recipe: Recipe, nets: Networks, images: int, axis_name: str | None = None) -> Phase:
    """Training-mode passes of a new student that set its BatchNorm statistics and change no parameter (SPEC 4).

    One pass over the images; more where it has fewer than 50 steps, which leave .9^50 = 0.5 % of the initial values.
    """

    def controls(progress: Progress, epoch: int) -> dict[str, Any]:
        names = {"augment": "calibrate", "mix": "calibrate/mix", "dropout": "calibrate/dropout"}
        return {f"{stream}_key": streams.key(recipe.seed, name, epoch) for stream, name in names.items()}

    loss = functools.partial(b_loss, nets=nets, terms=BTerms(recipe.dataset.data_aug), axis_name=axis_name)
    tx = make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0)
    return Phase(
        name="calibration",
        title="BatchNorm statistics",
        epochs=math.ceil(50 / (images // recipe.dataset.batch_size)),
        network="student",
        nets=Networks(nets.student),
        training=Training(loss, {}, ("student",), tx),
        optimizer="calibration",
        rate=lambda step: 0.0,
        controls=controls,
        split="train",
        order=lambda epoch: streams.rng(recipe.seed, "order/calibrate", 0, epoch),
    )
