"""Epochs of any loss of one parameter "w" on examples of its own, run as a phase runs them."""

import collections
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
from networks import make_feed

from asib_jax.engine.nonfinite import Watch
from asib_jax.engine.progress import Progress, overlay
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.objectives.step import Loss, Training
from asib_jax.phases import Phase
from asib_jax.record.snapshots import Snapshot
from asib_jax.runner import Running

BEGUN = 7  # steps of its optimizer in epochs before


def make_running(
    loss: Loss,
    tx: Any,
    w: Any,
    *,
    rate: Callable[[int], float],
    devices: int = 1,
    steps_a_call: int = 0,
    room_gb: float = 1.0,
    limit: int = 20,
    dtype: str = "float32",
    between: int = 0,
    offer: Callable[..., None] = lambda *what: None,
    begun: Snapshot | None = None,
) -> Running:
    """The second epoch of "stage1/b", of a network that has a mean beside `w`, about to begin or to go on.

    limit: of steps in a row that are not finite; between: steps from snapshot to snapshot at the most; offer: is told
    what `Snapshots.offer` is; begun: to go on from, with its `w`.
    """
    feed = make_feed(devices, steps=steps_a_call, room_gb=room_gb)
    context = SimpleNamespace(
        feed=feed,
        data=SimpleNamespace(train=SimpleNamespace(label=())),
        nets=Networks(None),
        recipe=SimpleNamespace(compute_dtype=dtype, max_nonfinite_steps=limit, trains_teachers=False),
        reporter=SimpleNamespace(on_steps=lambda curve, first, last: None),
        snapshots=SimpleNamespace(steps=between, offer=offer),
        compiled=lambda key, make, trains_convolutions: feed.compile(make(), donate_carry=True),
    )
    phase = Phase(
        name="stage1/b",
        title="",
        epochs=2,
        network="w",
        nets=Networks(None),
        training=Training(loss, {"w": True}, ("w",), tx),
        optimizer="b",
        rate=rate,
        controls=lambda progress, epoch: {},
        split="train",
        order=np.random.default_rng,
    )
    variables = Variables({"w": {"kernel": np.float32(w)}}, {"w": {"mean": np.float32(0)}})
    if begun:
        variables = overlay(variables, begun.arrays["variables"])
    watch = Progress.restored({}, begun.values).watch if begun else Watch()
    running = Running(context, phase, variables, Progress(steps=collections.Counter(b=BEGUN), watch=watch), begun)
    running.epoch = 1
    return running


def calls_of(running: Running, x: Any) -> Any:
    """The calls of what is left of an epoch over x [S, 2], two examples a step."""
    placed = running.context.feed.place(x=np.float32(x).ravel(), label=np.zeros(np.size(x)))
    rows = np.arange(np.size(x)).reshape(-1, 2)[running.tally.steps :]
    return running.context.feed.calls(running.step, rows, placed)
