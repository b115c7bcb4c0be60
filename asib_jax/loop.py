"""Run epochs of any training step: teachers, A-Step and B-Step alike."""
import math
from collections.abc import Callable, Iterable

import jax
import numpy as np

from asib_jax.feed import Call, Steps
from asib_jax.models.ensemble import Variables
from asib_jax.state import TrainState

_IN_FLIGHT = 32  # steps; CPU collectives of several devices stall beyond that. Of examples from the host: one call


def run_epoch(step: Steps, state: TrainState, frozen: Variables, calls: Iterable[Call], *, controls: dict,
              learning_rate: Callable[[int], float], first_step: int,
              on_images: Callable[[int], None] = lambda images: None,
              on_steps: Callable[[int, int], None] = lambda first, last: None
              ) -> tuple[TrainState, dict[str, float], int]:
    """One pass over `calls`, each prepared while the devices work on the one before.

    controls: arrays constant over the epoch; learning_rate: of a step of the run, which starts here at `first_step`.
    on_images: told how many images have been done, every few steps; on_steps: told the first and the last step of the
    run that a call is about to do.

    Returns the state, every metric's mean over the steps, and the number of steps. Steps that a loss scale skipped
    count as steps, but in no mean; the metric "skipped" is how many they were.
    Raises FloatingPointError naming the metrics that are not finite, or if every step was skipped.
    """
    totals: dict[str, float] = {}
    pending, images, steps, collected = [], 0, 0, 0

    def collect():
        for metrics, count in jax.device_get(pending):
            _add(totals, {name: values[:count] for name, values in metrics.items()})
        pending.clear()

    for call in calls:
        if steps > collected and (call.streamed or steps - collected + call.steps > _IN_FLIGHT):
            collect()
            on_images(images)
            images, collected = 0, steps
        numbers = np.arange(call.steps)
        on_steps(first_step + steps, first_step + steps + call.steps - 1)
        each = {"lr": np.float32([learning_rate(first_step + steps + n) for n in numbers]),
                "step": np.int32(steps + numbers)}
        state, metrics = step.run(state, frozen, controls, call, each)
        pending.append((metrics, call.steps))
        steps, images = steps + call.steps, images + call.steps * call.rows.shape[1]
    collect()
    on_images(images)
    return state, _means(totals, steps, first_step), steps


def _add(totals: dict[str, float], metrics: dict[str, np.ndarray]) -> None:
    """Add up the metrics [steps] of a call; where a step was skipped they are of a loss that overflowed."""
    done = metrics["skipped"] == 0 if "skipped" in metrics else slice(None)
    for name, values in metrics.items():
        summed = values if name == "skipped" else values[done]
        totals[name] = totals.get(name, 0.0) + float(np.sum(summed, dtype=np.float64))


def _means(totals: dict[str, float], steps: int, first_step: int) -> dict[str, float]:
    skipped = totals.get("skipped", 0.0)
    if 0 < steps == skipped:
        raise FloatingPointError(f"all {steps} steps from step {first_step} overflow float16 at any loss scale tried; "
                                 f"set amp_dtype='bfloat16' or lower the learning rate")
    means = {name: total if name == "skipped" else total / (steps - skipped) for name, total in totals.items()}
    broken = [name for name, value in means.items() if not math.isfinite(value)]
    if broken:
        raise FloatingPointError(f"not finite: {', '.join(broken)} in the {steps} steps from step {first_step}; "
                                 f"lower the learning rate or set grad_clip_norm")
    return means
