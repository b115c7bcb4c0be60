"""Run the epochs of any training step: teachers, A-Step and B-Step alike."""
import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np
from tqdm import tqdm

from asib_jax.engine.feed import Call, Steps
from asib_jax.models.ensemble import Variables
from asib_jax.engine.nonfinite import Watch
from asib_jax.record.snapshots import Snapshot, Snapshots
from asib_jax.objectives.state import TrainState

_IN_FLIGHT = 32  # steps; CPU collectives of several devices stall beyond that. Of examples from the host: one call
_PATIENCE = 2.0  # seconds until a signal is heeded, where a call of one step does not take longer


@dataclasses.dataclass
class Tally:
    """What the steps of an epoch have come to so far. totals: sums over the steps that were not skipped."""

    steps: int = 0
    totals: dict[str, float] = dataclasses.field(default_factory=dict)

    def add(self, metrics: dict[str, np.ndarray], steps: int) -> None:
        """Add the metrics [steps] of a call; where a step was skipped some are not finite."""
        done = metrics["skipped"] == 0 if "skipped" in metrics else slice(None)
        for name, values in metrics.items():
            summed = values if name == "skipped" else values[done]
            self.totals[name] = self.totals.get(name, 0.0) + float(np.sum(summed, dtype=np.float64))
        self.steps += steps

    @property
    def means(self) -> dict[str, float]:
        """Of every metric over the steps that were not skipped, NaN if all were; "skipped" is how many were."""
        done = self.steps - self.totals.get("skipped", 0.0)
        return {name: total if name == "skipped" else total / done if done else float("nan")
                for name, total in self.totals.items()}


@dataclasses.dataclass
class Part:
    """Some epochs with one compiled step: a teacher's training, or the A- or B-Step of a stage.

    name: as `Snapshots` knows it. controls: of an epoch, arrays that are constant over it. calls: of an epoch from one
    of its steps on. learning_rate: of a step of the run. first_step: of the run, where the epoch begins that is next.
    bar: shows images done of an epoch. after: told epoch, state, controls, the metrics' means, steps and seconds; true
    ends the part. content: of a snapshot, its arrays and values, given the state. max_nonfinite_steps: as `Watch` has
    it. snapshot_at_end: where more than arrays is left on disk afterwards, which a run that goes on must not find early.
    """

    name: str
    epochs: int
    step: Steps
    frozen: Variables
    controls: Callable[[int], dict[str, Any]]
    calls: Callable[[int, int], Iterator[Call]]
    learning_rate: Callable[[int], float]
    first_step: Callable[[], int]
    bar: Callable[[int], tqdm]
    after: Callable[..., bool | None]
    content: Callable[[TrainState], tuple[dict[str, Any], dict[str, Any]]]
    max_nonfinite_steps: int
    snapshot_at_end: bool = False
    on_steps: Callable[[int, int], None] = lambda first, last: None


def run_part(part: Part, state: TrainState, snapshots: Snapshots, begun: Snapshot | None) -> TrainState:
    """All epochs of a part, or those that a snapshot leaves to do; then `state` is the snapshot's.

    Raises FloatingPointError where steps break as `Watch` says, naming the last snapshot.
    """
    epoch, tally, watch = 0, Tally(), Watch(part.max_nonfinite_steps)
    if begun:
        epoch, tally = begun.epoch, Tally(begun.tally["steps"], begun.tally["totals"])
        watch = Watch(part.max_nonfinite_steps, begun.tally["in_a_row"])
    over = False
    while epoch < part.epochs and not over:
        start, controls = time.perf_counter(), part.controls(epoch)
        with part.bar(epoch) as bar:
            def offer(state: TrainState, steps: int) -> None:
                held = {"steps": tally.steps, "totals": tally.totals, "in_a_row": watch.in_a_row}
                snapshots.offer(part.name, epoch, held, steps, lambda: part.content(state))

            try:
                state = run_epoch(part.step, state, part.frozen, part.calls(epoch, tally.steps), tally, watch,
                                  phase=f"{part.name}, epoch {epoch + 1}", controls=controls,
                                  learning_rate=part.learning_rate, first_step=part.first_step(), on_images=bar.update,
                                  on_steps=part.on_steps, offer=offer, at_most=snapshots.steps or _IN_FLIGHT)
            except FloatingPointError as error:
                snapshots.close()
                raise FloatingPointError(f"{error}. Last snapshot: {snapshots.newest() or 'none yet'}") from error
        over = part.after(epoch, state, controls, tally.means, tally.steps, time.perf_counter() - start)
        epoch, tally = epoch + 1, Tally()
    if part.snapshot_at_end:
        held = {**dataclasses.asdict(Tally()), "in_a_row": watch.in_a_row}
        snapshots.offer(part.name, part.epochs, held, 0, lambda: part.content(state), now=True)
    return state


def run_epoch(step: Steps, state: TrainState, frozen: Variables, calls: Iterable[Call], tally: Tally, watch: Watch, *,
              phase: str, controls: dict, learning_rate: Callable[[int], float], first_step: int,
              on_images: Callable[[int], None] = lambda images: None,
              on_steps: Callable[[int, int], None] = lambda first, last: None,
              offer: Callable[[TrainState, int], None] = lambda state, steps: None, at_most: int = _IN_FLIGHT
              ) -> TrainState:
    """One pass over `calls`, each prepared while the devices work on the one before.

    tally: counts its steps; watch: sees them; phase: what it is to call them. first_step: of the run, where the epoch
    begins. on_images: told how many images have been done, every few steps; on_steps: told the first and the last step
    of the run that a call is about to do. offer: given the state and the steps since the last offer, whenever no step
    is in flight, after `at_most` steps or one call.

    Raises FloatingPointError as `Watch` does.
    """
    pending, steps, window, since = [], tally.steps, 1, time.monotonic()

    def collect() -> None:
        nonlocal window, since
        before = tally.steps
        for metrics, count, images in jax.device_get(pending):
            metrics = {name: values[:count] for name, values in metrics.items()}
            watch.see(metrics, first_step + tally.steps, phase)
            tally.add(metrics, count)
            on_images(images)
        pending.clear()
        # On several hosts no clock decides: `offer` asks all of them, who have to come to it after the same steps.
        quick = jax.process_count() > 1 or time.monotonic() - since < _PATIENCE / 2
        window, since = min(2 * window if quick else max(1, window // 2), _IN_FLIGHT, at_most), time.monotonic()
        offer(state, tally.steps - before)

    for call in calls:
        if pending and (call.streamed or steps - tally.steps + call.steps > window):
            collect()
        numbers = np.arange(steps, steps + call.steps)
        on_steps(first_step + steps, first_step + steps + call.steps - 1)
        each = {"lr": np.float32([learning_rate(first_step + n) for n in numbers]), "step": np.int32(numbers)}
        state, metrics = step.run(state, frozen, controls, call, each)
        pending.append((metrics, call.steps, call.steps * call.rows.shape[1]))
        steps += call.steps
    collect()
    return state
