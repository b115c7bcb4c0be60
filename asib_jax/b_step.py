"""The B-Step: distil the student while all else stands still (SPEC 5)."""
import functools
import logging
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from asib_jax import streams
from asib_jax.engine import parallel
from asib_jax.objectives import freezing, losses, schedules, state, steps
from asib_jax.a_step import ema
from asib_jax.engine.feed import Steps
from asib_jax.engine.loop import Part, run_part
from asib_jax.models.ensemble import Mode, Networks, Variables
from asib_jax.models.kd_model import stage_names
from asib_jax.recipe.recipe import Recipe
from asib_jax.run import Progress, Run, learning_rate
from asib_jax.record.snapshots import Snapshot
from asib_jax.objectives.state import TrainState
from asib_jax.objectives.steps import BTerms, Training

logger = logging.getLogger("asib_jax")


def trainable(recipe: Recipe, nets: Networks, params: dict, stage: int) -> tuple[dict[str, Any], Mode]:
    """What the B-Step trains, as a mask over the parameters, and how the student runs."""
    names = stage_names(nets.student)
    level = freezing.level_for_stage(recipe.student_freeze_level, stage) if recipe.use_partial_freeze else -1
    frozen = freezing.frozen_stages(level, len(names), "student_freeze_level")
    student = freezing.trainable(params["student"], names, level, recipe.student_freeze_bn)
    if "distill_adapter" in student and not adapter_trains(recipe):
        student["distill_adapter"] = jax.tree.map(lambda leaf: False, student["distill_adapter"])
    mode = Mode(train=True, frozen_stages=frozen, freeze_bn=recipe.student_freeze_bn)
    return {name: student if name == "student" else False for name in params}, mode


def adapter_trains(recipe: Recipe) -> bool:
    """Whether a B-Step loss, feature KD, reaches the student's distillation adapter. Else it is the A-Step's."""
    return recipe.feat_kd_alpha > 0 and recipe.student_feature == "distill_feat"


def terms_of(recipe: Recipe) -> BTerms:
    """The static weights of the loss."""
    ce_alpha, kd_alpha = losses.renormalise_alphas(recipe.ce_alpha, recipe.kd_alpha)
    return BTerms(
        data_aug=recipe.dataset.data_aug, ce_alpha=ce_alpha, kd_alpha=kd_alpha, kd_target=recipe.kd_target,
        kd_teacher_index=recipe.kd_teacher_index, kd_max_ratio=recipe.kd_max_ratio, feat_kd_alpha=recipe.feat_kd_alpha,
        label_smoothing=recipe.ce_label_smoothing,
        loss_clamp_max=recipe.loss_clamp_max if recipe.use_loss_clamp else 0.0,
        disagree_mode=recipe.disagree_mode if recipe.use_disagree_weight else "",
        disagree_lambda_high=recipe.disagree_lambda_high, disagree_lambda_low=recipe.disagree_lambda_low,
        mixup_alpha=recipe.mixup_alpha, cutmix_alpha=recipe.cutmix_alpha_distill, min_cw=recipe.min_cw)


def controls_of(run: Run, progress: Progress, stage: int, epoch: int) -> dict:
    """Every epoch-dependent scalar of the step, and its random streams.

    While the gate is shut the target is the teachers' average; certainty weights and feature KD act all the same
    (SPEC 5).
    """
    recipe = run.recipe
    epochs = recipe.b_epochs[stage]
    gate = progress.gate(recipe.enable_kd_after_syn_acc)
    mixing = epoch < recipe.teacher_adapt_kd_warmup
    ramp, ratio_on = schedules.kd_ramp(epoch, stage, recipe.kd_warmup_epochs)
    tau = schedules.temperature(epoch, epochs, tau=recipe.tau, schedule=recipe.tau_schedule,
                                power=recipe.tau_decay_power)
    return {"tau": np.float32(tau), "gate": np.float32(gate),
            "average_share": np.float32(recipe.kd_ens_alpha if mixing else 0.0), "ramp": np.float32(ramp),
            "ratio_on": np.float32(ratio_on),
            "augment_key": run.augment_key("b", stage, epoch),
            "mix_key": streams.key(recipe.seed, "mix", stage, epoch),
            "dropout_key": streams.key(recipe.seed, "dropout/b", stage, epoch)}


def make_training(recipe: Recipe, nets: Networks, params: dict, stage: int, axis_name: str | None = None) -> Training:
    """The B-Step of a stage (from 0)."""
    mask, mode = trainable(recipe, nets, params, stage)
    tx = state.make_optimizer(recipe.optimizer, weight_decay=recipe.student_weight_decay,
                              grad_clip_norm=recipe.grad_clip_norm, momentum=recipe.momentum)
    loss = functools.partial(steps.b_loss, nets=nets, terms=terms_of(recipe), mode=mode, axis_name=axis_name)
    return Training(loss, mask, ("student",), tx)


def target_name(recipe: Recipe, controls: dict) -> str:
    """What an epoch with these controls distils from."""
    if not recipe.kd_alpha:
        return "the fusion network's features" if recipe.feat_kd_alpha else "labels only"
    if recipe.kd_target != "synergy":
        return recipe.kd_target
    if not controls["gate"]:
        return "avg (gate shut)"
    return "synergy mixed with avg" if controls["average_share"] else "synergy"


def begin(run: Run, variables: Variables, progress: Progress, stage: int, snapshot: Snapshot | None = None
          ) -> tuple[TrainState, Variables, Steps, Callable[[int], float]]:
    """The B-Step of a stage before its first epoch: what it trains, what stands still, the compiled step, its rate."""
    recipe = run.recipe
    training = make_training(recipe, run.nets, variables.params, stage, run.feed.axis_name)
    current, frozen, step = run.begin("b", training, variables, progress.b_opt_state, snapshot)
    rate = learning_rate(recipe, base=recipe.student_lr, steps_per_epoch=run.steps_per_epoch,
                         epochs=sum(recipe.b_epochs), warmup_epochs=recipe.schedule.lr_warmup_epochs,
                         devices=len(run.feed.devices))
    return current, frozen, step, rate


def run_b_step(run: Run, variables: Variables, progress: Progress, stage: int) -> Variables:
    """Distil the student for the B-epochs of one stage.

    `progress` gets the last student, the best one on validation over the run, and the steps distilled from each target.
    With `restore_best` the best one continues, with fresh moments.
    """
    recipe, epochs = run.recipe, run.recipe.b_epochs[stage]
    if snapshot := run.snapshots.take(run.part("b", stage)):
        variables = run.resume(snapshot, progress, variables)
        if recipe.trains_teachers:
            run.validation.read_teachers(variables)
    current, frozen, step, rate = begin(run, variables, progress, stage, snapshot)
    run.log_parameters(f"stage {stage + 1} B-Step", variables.params, current.params)
    if run.nets.ib_mbm is not None and not snapshot:
        watched = run.validation.accuracies(variables)
        run.log_scalars(f"stage{stage + 1}/b/before", {f"val_{name}": value for name, value in watched.items()})

    def after(epoch: int, current: TrainState, controls: dict, metrics: dict, steps: int, seconds: float) -> None:
        progress.b_steps, progress.epochs = progress.b_steps + steps, progress.epochs + 1
        progress.b_epochs += 1
        progress.distilled_steps[target_name(recipe, controls)] += steps
        watch(run, progress, state.join(current, frozen), stage, epoch, {
            **metrics, "tau": float(controls["tau"]), "gate": float(controls["gate"]),
            "lr": rate(progress.b_steps - 1)}, seconds)

    current = run_part(Part(
        name=run.part("b", stage), epochs=epochs, step=step, frozen=frozen, learning_rate=rate,
        controls=lambda epoch: controls_of(run, progress, stage, epoch), first_step=lambda: progress.b_steps,
        calls=lambda epoch, first: run.calls(step, "b", stage, epoch, first),
        bar=lambda epoch: run.bar(f"{run.prefix}stage {stage + 1} B {epoch + 1}/{epochs}"), after=after,
        content=lambda current: run.snapshot("b", progress, state.join(current, frozen), current),
        max_nonfinite_steps=recipe.max_nonfinite_steps, on_steps=run.reporter.on_steps),
        current, run.snapshots, snapshot)
    return _end_stage(run, state.join(current, frozen), current.opt_state, progress)


def watch(run: Run, progress: Progress, variables: Variables, stage: int, epoch: int, scalars: dict,
          seconds: float) -> None:
    """Measure on validation after a B-epoch: the student, and the target it learns from; keep the best student."""
    accuracies = {f"val_{name}": value for name, value in run.validation.accuracies(variables).items()}
    student = accuracies["val_student"]
    if "val_synergy" in accuracies:
        progress.synergy_acc = ema(progress.synergy_acc, accuracies["val_synergy"], run.recipe.synergy_ema_alpha)
    run.log_epoch("b", stage, epoch, {**scalars, **accuracies}, seconds=seconds, total=progress.epochs)
    if student > progress.best_acc:
        progress.best_acc, progress.best_epoch = student, f"stage {stage + 1}, epoch {epoch + 1}"
        progress.best_student = _student(run, variables)


def _student(run: Run, variables: Variables) -> dict:
    """The student's variables on the host, without an adapter that is not the B-Step's to restore."""
    student = jax.device_get(variables.of("student"))
    if not adapter_trains(run.recipe):
        student["params"].pop("distill_adapter", None)
    return student


def _end_stage(run: Run, variables: Variables, opt_state: Any, progress: Progress) -> Variables:
    progress.last_student, progress.b_opt_state = _student(run, variables), opt_state
    if run.recipe.restore_best:
        variables, progress.b_opt_state = with_student(variables, progress.best_student), None
    logger.info("%sstudent: best validation accuracy %.2f %% (%s)", run.prefix, 100 * progress.best_acc,
                progress.best_epoch)
    return parallel.replicate(variables, run.feed.devices)


def with_student(variables: Variables, student: dict) -> Variables:
    """The variables with another student (`Progress.last_student` or `best_student`) in its place."""
    params = {**variables.params["student"], **student["params"]}
    return Variables({**variables.params, "student": params},
                     {**variables.batch_stats, "student": student["batch_stats"]})
