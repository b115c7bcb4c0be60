"""Run epochs of any training step: teachers, A-Step and B-Step alike."""
from collections.abc import Callable, Iterable

import jax
import numpy as np

from asib_jax.feed import Call, Steps
from asib_jax.models.ensemble import Variables
from asib_jax.nonfinite import Watch
from asib_jax.state import TrainState

_IN_FLIGHT = 32  # steps; CPU collectives of several devices stall beyond that. Of examples from the host: one call


def run_epoch(step: Steps, state: TrainState, frozen: Variables, calls: Iterable[Call], *, controls: dict,
              learning_rate: Callable[[int], float], first_step: int, watch: Watch, phase: str = "",
              on_images: Callable[[int], None] = lambda images: None,
              on_steps: Callable[[int, int], None] = lambda first, last: None
              ) -> tuple[TrainState, dict[str, float], int]:
    """One pass over `calls`, each prepared while the devices work on the one before.

    controls: arrays constant over the epoch; learning_rate: of a step of the run, which starts here at `first_step`.
    on_images: told how many images have been done, every few steps; on_steps: told the first and the last step of the
    run that a call is about to do. watch: sees every step; phase: what it is to call them.

    Returns the state, every metric's mean over the steps, and the number of steps. Steps that were skipped count as
    steps, but in no mean; the metric "skipped" is how many they were. Where all were, the means are NaN.
    Raises FloatingPointError as `Watch` does.
    """
    totals: dict[str, float] = {}
    pending, images, steps, collected = [], 0, 0, 0

    def collect():
        for metrics, count, first in jax.device_get(pending):
            metrics = {name: values[:count] for name, values in metrics.items()}
            watch.see(metrics, first, phase)
            _add(totals, metrics)
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
        pending.append((metrics, call.steps, first_step + steps))
        steps, images = steps + call.steps, images + call.steps * call.rows.shape[1]
    collect()
    on_images(images)
    return state, _means(totals, steps), steps


def _add(totals: dict[str, float], metrics: dict[str, np.ndarray]) -> None:
    """Add up the metrics [steps] of a call; where a step was skipped some are not finite."""
    done = metrics["skipped"] == 0 if "skipped" in metrics else slice(None)
    for name, values in metrics.items():
        summed = values if name == "skipped" else values[done]
        totals[name] = totals.get(name, 0.0) + float(np.sum(summed, dtype=np.float64))


def _means(totals: dict[str, float], steps: int) -> dict[str, float]:
    done = steps - totals.get("skipped", 0.0)
    return {name: total if name == "skipped" else total / done if done else float("nan")
            for name, total in totals.items()}
