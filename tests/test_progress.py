"""What a run remembers of how far it has come: sums, best states, the synergy that opens the gate."""

import json

import numpy as np
import pytest

from asib_jax.engine.progress import Best, Progress, Tally, of_network, overlay
from asib_jax.models.ensemble import Variables


def test_an_equal_score_is_no_better_one():
    """The first of equal states is the best; only a better one is to be held."""
    best = Best()
    assert [best.see(score, f"epoch {epoch}") for epoch, score in enumerate((0.2, 0.5, 0.5, 0.4, 0.6), 1)] == [
        True,
        True,
        False,
        False,
        True,
    ]
    assert (best.score, best.when) == (0.6, "epoch 5")


@pytest.mark.parametrize("margin, waited", [(0.0, [0, 0, 1, 0, 0]), (0.1, [0, 1, 2, 0, 1]), (0.3, [0, 1, 2, 0, 1])])
def test_epochs_wait_for_a_score_that_is_better_by_a_margin(margin, waited):
    """Than the last one that was, so that small steps add up; what is best is better by anything."""
    best, seen = Best(), []
    for score in (0.25, 0.3125, 0.3125, 0.75, 0.8125):
        best.see(score, "", margin)
        seen.append(best.waited)
    assert seen == waited and best.score == 0.8125


def test_synergy_is_averaged_and_the_gate_opens_at_its_threshold():
    """The first measurement counts whole (SPEC 4)."""
    progress = Progress()
    assert not progress.gate(0.0)
    progress.measured_synergy(0.5, 0.75)
    assert progress.synergy_acc == 0.5
    progress.measured_synergy(0.25, 0.75)
    assert progress.synergy_acc == 0.75 * 0.25 + 0.25 * 0.5
    assert progress.gate(0.3125) and not progress.gate(0.3126)


def test_means_are_over_the_steps_that_were_not_skipped():
    tally = Tally()
    for loss, skipped, lr in (([1, np.nan, 3], [0, 1, 0], [0.5, 0.25, 0.125]), ([8], [0], [2])):
        tally.add({"loss": np.float32(loss), "skipped": np.float32(skipped), "lr": np.float32(lr)})
    assert tally.means == {"loss": 4, "skipped": 1, "lr": 2} and tally.steps == 4


def test_a_snapshot_holds_all_of_it():
    """Its arrays as they are, everything else through JSON; a best state may have none yet."""
    held = {"params": {"student": {"w": np.float32([1, 2])}}, "batch_stats": {"student": {"m": np.float32(3)}}}
    best = {"student": Best(0.7, "epoch 2", held, 0.6, 1), "stage1/a": Best()}
    progress = Progress(
        ib_epochs=3,
        synergy_acc=0.5,
        temperatures=[1.0, 3.7],
        opt_states={"a": {"mu": 2}},
        best=best,
        last={"student": held},
    )
    progress.steps["a"], progress.epochs["b"], progress.distilled_steps["avg"] = 20, 2, 10
    arrays, values = progress.content()
    found = Progress.restored(arrays, json.loads(json.dumps(values)))
    assert found == progress
    found.steps["new"] += 1  # still a counter


def test_held_leaves_take_their_places():
    """Of a network whose other leaves stay, and of one without statistics."""
    variables = Variables(
        {"student": {"stage0": {"w": 1, "b": 2}, "adapter": {"w": 3}}, "teacher1": {"w": 4}},
        {"student": {"m": 5}, "teacher1": {}},
    )
    held = {"params": {"student": {"stage0": {"w": 10}}}, "batch_stats": {"student": {"m": 50}}}
    assert overlay(variables, held) == Variables(
        {"student": {"stage0": {"w": 10, "b": 2}, "adapter": {"w": 3}}, "teacher1": {"w": 4}},
        {"student": {"m": 50}, "teacher1": {}},
    )
    assert overlay(variables, {"params": {}}) == variables
    assert of_network(held, "student") == {"params": {"stage0": {"w": 10}}, "batch_stats": {"m": 50}}
    assert of_network({"params": {"plain": {"w": 1}}}, "plain") == {"params": {"w": 1}, "batch_stats": {}}
