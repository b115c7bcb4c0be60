"""An epoch under way, of a loss of one product whose figures are exact: what is counted, offered and held, and when."""

import copy
import itertools
import types
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from epochs import BEGUN, calls_of, make_running

from asib_jax import runner
from asib_jax.objectives import optimizers
from asib_jax.record.snapshots import Snapshot

STEPS = 40
X = np.random.default_rng(0).integers(-2, 3, (STEPS, 2)).astype(np.float32)
X[[5, 20, 21]] = np.nan
SGD = optimizers.make_optimizer("sgd", weight_decay=0.0, grad_clip_norm=0.0, momentum=0.0)


def loss(variables, controls, batch):
    """The mean of w x, times 1 or 2 by the step of the epoch."""
    value = variables.params["w"]["kernel"][0] * jnp.mean(batch["x"]) * (1 + controls["step"] % 2)
    return value, ({"w": {"mean": jnp.mean(batch["x"])}}, {"ce": value, "loss": value})


class Offers:
    """What each offer of a snapshot holds, by the steps of the epoch that are done; the steps since the one before."""

    def __init__(self):
        self.held, self.since = {}, []

    def __call__(self, part, epoch, tally, steps, content, now):
        arrays, values = jax.device_get(content())
        self.held[tally["steps"]] = copy.deepcopy((part, epoch, tally, arrays["variables"], values))
        self.since.append(steps)


def run(steps_a_call=1, calls=calls_of, **options):
    """An epoch: its offers, the running phase, and the images of each notice of progress."""
    offers, images = Offers(), []
    running = make_running(
        loss, SGD, [1.0], rate=lambda step: 2.0 ** -(3 + step % 3), steps_a_call=steps_a_call, offer=offers, **options
    )
    running.run_epoch(calls(running, X), {}, images.append)
    return offers, running, images


@pytest.fixture(scope="module")
def one_by_one():
    """No step begins before the one before it has been counted, and offered."""
    offers, running, images = run(between=1)
    assert offers.since == [1] * STEPS and images == [2] * STEPS
    return offers.held, running


@pytest.mark.parametrize("steps_a_call", [1, 3, 4])
@pytest.mark.parametrize("room_gb", [0.0, 1.0], ids=["streamed", "resident"])
def test_with_several_calls_in_flight_all_is_as_with_one_step_at_a_time(one_by_one, steps_a_call, room_gb):
    """Bitwise the tally, the streak of steps that were skipped, the variables of every offer, and its position."""
    expected, reference = one_by_one
    offers, running, images = run(steps_a_call, room_gb=room_gb)
    assert max(offers.since) > 2 * steps_a_call and sum(offers.since) == STEPS == sum(images) // 2
    assert len(offers.held) == len(offers.since) and max(offers.held) == STEPS
    for steps, held in offers.held.items():
        jax.tree.map(np.testing.assert_array_equal, held, expected[steps])
    assert running.tally == reference.tally and running.progress == reference.progress
    assert running.progress.watch.skipped == {"stage1/b": 3}
    assert running.tally.lr == 2.0 ** -(3 + (BEGUN + STEPS - 1) % 3)


def test_what_is_counted_is_what_numpy_counts(one_by_one):
    """All figures are exact: w moves by the rate of the run's step, and not in a step that is skipped."""
    held, running = one_by_one
    w, total, in_a_row = 1.0, 0.0, 0
    for step in range(STEPS):
        factor, mean = 1 + step % 2, np.mean(X[step])
        bad = bool(np.isnan(mean))
        in_a_row = in_a_row + 1 if bad else 0
        if not bad:
            total += w * mean * factor
            w -= 2.0 ** -(3 + (BEGUN + step) % 3) * mean * factor
        part, epoch, tally, variables, values = held[step + 1]
        assert (part, epoch, values["steps"]) == ("stage1/b", 1, {"b": BEGUN})
        assert (tally["totals"]["loss"], values["watch"]["in_a_row"]) == (total, in_a_row)
        assert variables["params"]["w"]["kernel"] == w
    assert running.tally.means["loss"] == total / (STEPS - 3)


@pytest.mark.parametrize("steps", [4, 21, STEPS])
def test_from_a_snapshot_an_epoch_goes_on(one_by_one, steps):
    """Bitwise, with the sums so far and in the middle of a streak of two, which counts from where it began."""
    expected, reference = one_by_one
    part, epoch, tally, variables, values = expected[steps]
    begun = Snapshot(part, epoch, tally, values, {}, [], 0.0, 1, {"variables": variables})
    offers, running, _ = run(begun=copy.deepcopy(begun))
    for done, held in offers.held.items():
        jax.tree.map(np.testing.assert_array_equal, held, expected[done])
    assert (running.tally, running.progress) == (reference.tally, reference.progress)
    assert sum(offers.since) == STEPS - steps
    if steps == 21:
        with pytest.raises(FloatingPointError, match=f"2 steps in a row from step {BEGUN + 20} "):
            run(begun=copy.deepcopy(begun), limit=2)


def test_snapshots_by_steps_are_offered_that_often():
    """Never more than so many steps apart, however many could be in flight; a call of more is one."""
    assert max(run(between=5)[0].since) == 5
    assert max(run(steps_a_call=4, between=3)[0].since) == 4


@pytest.mark.parametrize("hosts, expected", [(1, 1), (2, 16)])
def test_a_slow_step_is_offered_at_once(hosts, expected, monkeypatch):
    """A signal waits for a window of steps, which grows as long as they are fast; several hosts, whose clocks differ,
    grow it alike."""
    clock = itertools.count(step=10.0)
    monkeypatch.setattr(runner, "time", types.SimpleNamespace(monotonic=lambda: next(clock)))

    def on_hosts(running, x):
        monkeypatch.setattr(jax, "process_count", lambda: hosts)
        return calls_of(running, x)

    assert max(run(calls=on_hosts)[0].since) == expected


@pytest.mark.parametrize("steps_a_call", [1, 4])
def test_the_examples_of_two_calls_at_most_are_on_the_devices(steps_a_call):
    """While one is placed there the devices may work on the one before, and on none before that."""
    placed, alive = [], []

    def watched(running, x):
        for call in calls_of(running, x):
            placed.append(weakref.ref(call.streamed["x"]))
            alive.append(sum(ref() is not None for ref in placed))
            yield call
            del call

    offers, _, _ = run(steps_a_call, calls=watched, room_gb=0.0)
    assert max(alive) == 2 and len(placed) == STEPS // steps_a_call and max(offers.since) > 2 * steps_a_call
