"""Run epochs of any training step: teachers, A-Step and B-Step alike."""
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from asib_jax import parallel
from asib_jax.models.ensemble import Variables
from asib_jax.state import TrainState

_BLOCK = 32  # steps in flight; CPU collectives of several devices stall beyond that


def run_epoch(step: Callable, state: TrainState, frozen: Variables, batches: Iterable[dict], *, controls: dict,
              learning_rate: Callable[[int], float], first_step: int, devices: list[jax.Device],
              on_images: Callable[[int], None] = lambda images: None,
              on_step: Callable[[int], None] = lambda step: None) -> tuple[TrainState, dict[str, float], int]:
    """One pass over `batches`.

    controls: arrays constant over the epoch; learning_rate: of a step of the run, which starts here at `first_step`.
    on_images: told how many images have been done, every few steps; on_step: told each step of the run before it.

    Returns the state, every metric's mean over the steps, and the number of steps. Steps that a loss scale skipped
    count as steps, but in no mean; the metric "skipped" is how many they were.
    Raises FloatingPointError naming the metrics that are not finite, or if every step was skipped.
    """
    totals: dict[str, float] = {}
    pending, images, steps = [], 0, 0

    def collect():
        for metrics in jax.device_get(pending):
            if metrics.get("skipped"):  # the others are of a loss that overflowed
                metrics = {"skipped": metrics["skipped"]}
            for name, value in metrics.items():
                totals[name] = totals.get(name, 0.0) + float(value)
        pending.clear()

    for batch in batches:
        on_step(first_step + steps)
        now = {**controls, "lr": np.float32(learning_rate(first_step + steps)), "step": np.int32(steps)}
        state, metrics = step(state, frozen, now, parallel.shard(batch, devices))
        pending.append(metrics)
        steps, images = steps + 1, images + len(batch["label"])
        if len(pending) == _BLOCK:
            collect()
            on_images(images)
            images = 0
    collect()
    on_images(images)
    skipped = totals.get("skipped", 0.0)
    if 0 < steps == skipped:
        raise FloatingPointError(f"all {steps} steps from step {first_step} overflow float16 at any loss scale tried; "
                                 f"set amp_dtype='bfloat16' or lower the learning rate")
    means = {name: total if name == "skipped" else total / (steps - skipped) for name, total in totals.items()}
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(f"not finite: {', '.join(broken)} in the {steps} steps from step {first_step}; "
                                 f"lower the learning rate or set grad_clip_norm")
    return state, means, steps
