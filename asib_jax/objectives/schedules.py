"""Every quantity that depends on the epoch or step, as plain Python floats computed on the host (SPEC 3).

They enter the jitted step as array arguments, so no schedule causes recompilation. Epochs, steps and stages count
from 0.
"""

import math
from collections.abc import Sequence

from asib_jax.errors import UserError

SCHEDULES = ("cosine", "step", "multistep")


def ib_beta(n: int, *, beta: float, warmup_epochs: int, schedule: Sequence[float] | None) -> float:
    """Weight of the information-bottleneck term in the n-th A-epoch of the run with the bottleneck active.

    `schedule` = (start, end, epochs) is linear, then constant, and beats `beta`, which is reached linearly from 0.
    """
    if schedule:
        start, end, total = schedule
        return start + min(n / max(total, 1), 1.0) * (end - start)
    return beta * min(n / warmup_epochs, 1.0) if warmup_epochs else beta


def temperature(epoch: int, epochs: int, *, tau: float, schedule: Sequence[float] | None, power: float) -> float:
    """Distillation temperature in `epoch` of the `epochs` of this step of this stage.

    `schedule` = (start, end) beats `tau`: start in the first epoch, end in the last, in between
    start + (end - start) * progress**power. A single epoch runs at start.
    """
    if not schedule:
        return tau
    start, end = schedule
    return start + (end - start) * (epoch / max(epochs - 1, 1)) ** power


def kd_ramp(epoch: int, stage: int, warmup_epochs: int) -> tuple[float, bool]:
    """Ramp on the KD term, and whether it is over: only then does `kd_max_ratio` hold the term (SPEC 5)."""
    if stage > 0 or epoch >= warmup_epochs:
        return 1.0, True
    return (epoch + 1) / warmup_epochs, False


def student_share(epoch: int, epochs: int, *, start: float, end: float | None) -> float:
    """Share of the student's own logits in what it learns from, in `epoch` of the `epochs` of all B-Steps of the run:
    linear from `start` in the first to `end` in the last; None: `start` in all. A single epoch has `start`.
    """
    return start if end is None else start + (end - start) * epoch / max(epochs - 1, 1)


def learning_rate(
    step: int,
    *,
    base: float,
    steps_per_epoch: int,
    epochs: int,
    warmup_epochs: int,
    kind: str,
    min_lr: float,
    step_size: int,
    gamma: float,
    milestones: Sequence[int],
) -> float:
    """Learning rate of an optimiser step, for an optimiser that sees `epochs` epochs over the whole run.

    Linear warm-up, whose last step runs at `base`, then one of SCHEDULES: `cosine` (Loshchilov and Hutter, 2017) from
    `base` to `min_lr`; `step`, times `gamma` every `step_size` epochs; `multistep`, times `gamma` at each epoch in
    `milestones`. The last two count epochs from the start of training, warm-up included.

    Raises:
        UserError: the warm-up is longer than the training, the kind is unknown, or cosine would end above `base`.
    """
    if warmup_epochs > epochs:
        raise UserError(
            f"schedule.lr_warmup_epochs={warmup_epochs} is longer than the training, {epochs} epochs; "
            f"set --config.schedule.lr_warmup_epochs={epochs} or fewer"
        )
    warmup = warmup_epochs * steps_per_epoch
    if step < warmup:
        return base * (step + 1) / warmup
    epoch = step // steps_per_epoch
    if kind == "cosine":
        if min_lr > base:
            raise UserError(f"schedule.min_lr={min_lr} is above the learning rate it follows, {base}")
        progress = min((step - warmup) / max(1, epochs * steps_per_epoch - warmup), 1.0)
        return min_lr + (base - min_lr) * 0.5 * (1 + math.cos(math.pi * progress))
    if kind == "step":
        return base * gamma ** (epoch // step_size)
    if kind == "multistep":
        return base * gamma ** sum(epoch >= milestone for milestone in milestones)
    raise UserError(f"schedule.type={kind!r}: choose one of {', '.join(SCHEDULES)}")


def view_of(lengths: Sequence[int], stage: int, epoch: int, views: int) -> tuple[int, int]:
    """The (stage, epoch) whose augmentation an epoch of a step uses, `lengths` being its epochs in each stage.

    Its own with `views` = 0; else that of the epoch of the run whose number is this one's modulo `views`, so that as
    many views as epochs are one for each.
    """
    if not views:
        return stage, epoch
    number, stage = (sum(lengths[:stage]) + epoch) % views, 0
    while number >= lengths[stage]:
        number, stage = number - lengths[stage], stage + 1
    return stage, number


def views_of_stage(lengths: Sequence[int], stage: int, views: int) -> tuple[tuple[int, int], ...]:
    """`view_of` of each epoch of a stage."""
    return tuple(view_of(lengths, stage, epoch, views) for epoch in range(lengths[stage]))
