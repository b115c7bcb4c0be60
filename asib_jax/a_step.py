"""The A-Step: fit the fusion network while teachers and student stand still (SPEC 4)."""
import dataclasses
import functools
import logging
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from flax.serialization import to_state_dict

from asib_jax import streams
from asib_jax.engine import parallel
from asib_jax.objectives import freezing, losses, schedules, state, steps
from asib_jax.engine.feed import Steps
from asib_jax.engine.loop import Part, Tally, run_epoch, run_part
from asib_jax.models.ensemble import Mode, Networks, Variables
from asib_jax.models.kd_model import stage_names
from asib_jax.engine.nonfinite import Watch
from asib_jax.recipe.recipe import Recipe
from asib_jax.run import Progress, Run, learning_rate
from asib_jax.record.snapshots import Snapshot
from asib_jax.objectives.state import TrainState
from asib_jax.objectives.steps import ATerms, BTerms, Training

logger = logging.getLogger("asib_jax")


def calibrate(run: Run, variables: Variables) -> Variables:
    """Training-mode passes of the new student that set its BatchNorm statistics and change no parameter.

    One pass over the images; more where it has fewer than 50 steps, which leave .9^50 = 0.5 % of the initial values.
    """
    axis = run.feed.axis_name
    tx = state.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0)
    loss = functools.partial(steps.b_loss, nets=run.nets, terms=BTerms(run.recipe.dataset.data_aug), axis_name=axis)
    step = run.compiled("calibrate", lambda: steps.make_train_step(loss, tx, axis_name=axis), trains_convolutions=True)
    current, frozen = state.begin(variables, {name: False for name in variables.params}, ("student",), tx)
    for number in range(math.ceil(50 / run.steps_per_epoch)):
        names = {"augment": "calibrate", "mix": "calibrate/mix", "dropout": "calibrate/dropout"}
        controls = {f"{stream}_key": streams.key(run.recipe.seed, name, number) for stream, name in names.items()}
        with run.bar("BatchNorm statistics") as bar:
            current = run_epoch(step, current, frozen, run.calls(step, "calibrate", 0, number), Tally(),
                                Watch(run.recipe.max_nonfinite_steps), phase="BatchNorm statistics", controls=controls,
                                learning_rate=lambda step: 0.0, first_step=0, on_images=bar.update)
    return state.join(current, frozen)


def trainable(recipe: Recipe, nets: Networks, params: dict, stage: int) -> tuple[dict[str, Any], tuple[Mode, ...]]:
    """What the A-Step trains, as a mask over the parameters, and how each teacher runs."""
    mask: dict[str, Any] = {name: name in ("ib_mbm", "synergy_head") for name in params}
    if recipe.student_feature == "distill_feat" and recipe.feat_kd_alpha == 0:
        mask["student"] = {child: child == "distill_adapter" for child in params["student"]}
    modes = []
    for k, (name, model) in enumerate(zip(nets.teacher_names, nets.teachers)):
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
            mask[name] = {**freezing.trainable(params[name], names, level, options.freeze_bn),
                          "classifier": jax.tree.map(lambda leaf: False, params[name]["classifier"])}
        modes.append(mode)
    return mask, tuple(modes)


def terms_of(recipe: Recipe) -> ATerms:
    """The static weights of the loss."""
    trains_teachers = recipe.use_teacher_finetuning or recipe.train_distill_adapter_only
    towards_student = recipe.teacher_adapt_alpha_kd
    _, kd_alpha = losses.renormalise_alphas(recipe.ce_alpha, recipe.kd_alpha)
    return ATerms(
        synergy_ce_alpha=recipe.synergy_ce_alpha, synergy_kd_alpha=recipe.synergy_kd_alpha,
        kd_alpha=kd_alpha if towards_student is None else towards_student,
        cccp_alpha=recipe.cccp_alpha if recipe.use_cccp else 0.0, cccp_tau=recipe.tau,
        feat_kd_alpha=recipe.feat_kd_alpha, reg_lambda=recipe.reg_lambda if trains_teachers else 0.0,
        ib_mbm_reg_lambda=recipe.ib_mbm_reg_lambda, label_smoothing=recipe.label_smoothing, min_cw=recipe.min_cw,
        data_aug=recipe.dataset.data_aug)


def make_optimizer(recipe: Recipe):
    """AdamW whose rate, `a_step_lr`, is scaled for each network (SPEC 4)."""
    teacher_lr = recipe.a_step_lr if recipe.teacher_lr is None else recipe.teacher_lr
    factors = {"ib_mbm": recipe.ib_mbm_lr_factor, "synergy_head": recipe.ib_mbm_lr_factor}
    factors |= {f"teacher{k}": teacher_lr / recipe.a_step_lr for k in range(1, len(recipe.teachers) + 1)}
    return state.make_optimizer("adamw", weight_decay=recipe.a_step_weight_decay, grad_clip_norm=recipe.grad_clip_norm,
                                factors=factors)


def controls_of(run: Run, progress: Progress, stage: int, epoch: int) -> dict:
    """Every epoch-dependent scalar of the step, and its random streams."""
    recipe = run.recipe
    warm = stage == 0 and epoch < recipe.synergy_only_epochs
    gate = progress.gate(recipe.enable_kd_after_syn_acc) and progress.b_epochs > 0  # of a student that has learnt
    beta = schedules.ib_beta(progress.ib_epochs, beta=recipe.ib_beta, warmup_epochs=recipe.ib_beta_warmup_epochs,
                             schedule=recipe.beta_schedule)
    tau = schedules.temperature(epoch, recipe.a_epochs, tau=recipe.tau, schedule=recipe.tau_schedule,
                                power=recipe.tau_decay_power)
    return {"tau": np.float32(tau), "beta": np.float32(0.0 if warm else beta), "certain": np.float32(not warm),
            "open": np.float32(gate and not warm),
            "augment_key": run.augment_key("a", stage, epoch),
            "noise_key": streams.key(recipe.seed, "noise", stage, epoch),
            "dropout_key": streams.key(recipe.seed, "dropout", stage, epoch)}


def make_training(recipe: Recipe, nets: Networks, params: dict, stage: int, axis_name: str | None = None) -> Training:
    """The A-Step of a stage (from 0)."""
    mask, modes = trainable(recipe, nets, params, stage)

    def trained(params):
        return [freezing.split(params[name], mask[name])[0] for name in nets.teacher_names]

    loss = functools.partial(steps.a_loss, nets=nets, terms=terms_of(recipe), trained=trained, teacher_modes=modes,
                             axis_name=axis_name)
    return Training(loss, mask, nets.teacher_names if recipe.use_teacher_finetuning else (), make_optimizer(recipe))


def ema(old: float | None, new: float, alpha: float) -> float:
    """`last_synergy_acc` after a measurement: alpha*new + (1-alpha)*old, the first taken whole (SPEC 4)."""
    return new if old is None else alpha * new + (1 - alpha) * old


def begin(run: Run, variables: Variables, progress: Progress, stage: int, snapshot: Snapshot | None = None
          ) -> tuple[TrainState, Variables, Steps, Callable[[int], float]]:
    """The A-Step of a stage before its first epoch: what it trains, what stands still, the compiled step, its rate."""
    recipe = run.recipe
    training = make_training(recipe, run.nets, variables.params, stage, run.feed.axis_name)
    current, frozen, step = run.begin("a", training, variables, progress.a_opt_state, snapshot)
    rate = learning_rate(recipe, base=recipe.a_step_lr, steps_per_epoch=run.steps_per_epoch,
                         epochs=recipe.a_epochs * len(recipe.b_epochs), warmup_epochs=recipe.schedule.lr_warmup_epochs,
                         devices=len(run.feed.devices))
    return current, frozen, step, rate


def run_a_step(run: Run, variables: Variables, progress: Progress, stage: int) -> Variables:
    """Fit the fusion network for the A-epochs of one stage.

    Returns the best state on validation, perhaps the incoming one; `progress.synergy_acc` becomes its accuracy.
    """
    recipe, title = run.recipe, f"stage {stage + 1} A"
    if snapshot := run.snapshots.take(run.part("a", stage)):
        variables = run.resume(snapshot, progress, variables)
    current, frozen, step, rate = begin(run, variables, progress, stage, snapshot)
    run.log_parameters(f"stage {stage + 1} A-Step", variables.params, current.params)
    run.stored.read_student(variables, stage)
    run.validation.read_student(variables)
    if snapshot:
        best = _Best(snapshot.values["best_synergy_acc"], {"batch_stats": {}, **snapshot.arrays["best"]})
    else:  # the incoming state competes, but opens no gate
        best = _Best(run.validation.accuracies(variables)["synergy"], _held(current))

    def after(epoch: int, current: TrainState, controls: dict, metrics: dict, steps: int, seconds: float) -> None:
        progress.a_steps, progress.epochs = progress.a_steps + steps, progress.epochs + 1
        progress.ib_epochs += int(recipe.use_ib and controls["certain"])
        accuracy = _watch(run, progress, current, frozen)
        scalars = {name: float(controls[name]) for name in ("tau", "beta", "open")}
        scalars |= {"lr": rate(progress.a_steps - 1), "val_synergy_acc": accuracy}
        run.log_epoch("a", stage, epoch, {**metrics, **scalars}, seconds=seconds, total=progress.epochs)
        if accuracy > best.accuracy:
            best.accuracy, best.held = accuracy, _held(current)

    def content(current: TrainState) -> tuple[dict, dict]:
        arrays, values = run.snapshot("a", progress, state.join(current, frozen), current)
        return {**arrays, "best": best.held}, {**values, "best_synergy_acc": best.accuracy}

    current = run_part(Part(
        name=run.part("a", stage), epochs=recipe.a_epochs, step=step, frozen=frozen, learning_rate=rate,
        controls=lambda epoch: controls_of(run, progress, stage, epoch), first_step=lambda: progress.a_steps,
        calls=lambda epoch, first: run.calls(step, "a", stage, epoch, first),
        bar=lambda epoch: run.bar(f"{title} {epoch + 1}/{recipe.a_epochs}"), after=after, content=content,
        max_nonfinite_steps=recipe.max_nonfinite_steps), current, run.snapshots, snapshot)
    return _end(run, progress, current, frozen, best, stage)


@dataclasses.dataclass
class _Best:
    """held: on the host, what the best state has that a step changes."""

    accuracy: float
    held: dict[str, Any]


def _held(current: TrainState) -> dict[str, Any]:
    return jax.device_get({"params": current.params, "batch_stats": current.batch_stats,
                           "opt_state": to_state_dict(current.opt_state)})


def _watch(run: Run, progress: Progress, current: TrainState, frozen: Variables) -> float:
    """Measure the synergy ensemble on validation after an A-epoch."""
    whole = state.join(current, frozen)
    if current.batch_stats:  # the teachers train
        run.validation.read_teachers(whole)
    accuracy = run.validation.accuracies(whole)["synergy"]
    progress.synergy_acc = ema(progress.synergy_acc, accuracy, run.recipe.synergy_ema_alpha)
    return accuracy


def _end(run: Run, progress: Progress, current: TrainState, frozen: Variables, best: _Best, stage: int) -> Variables:
    """All variables, with the best state in place."""
    run.stored.drop_student()
    run.validation.drop_student()
    progress.synergy_acc, progress.a_opt_state = best.accuracy, best.held["opt_state"]
    variables = state.join(current._replace(params=best.held["params"], batch_stats=best.held["batch_stats"]), frozen)
    if current.batch_stats:  # the teachers train
        run.validation.read_teachers(variables)
    logger.info("stage %d A-Step: best validation accuracy of the synergy ensemble %.2f %%", stage + 1,
                100 * best.accuracy)
    return parallel.share(variables, run.feed.devices)
