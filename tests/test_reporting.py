"""Progress bars, event files read back, and tables."""

import importlib.util
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from disk import longest_file
from run_contents import events, points

from asib_jax.errors import UserError
from asib_jax.record import reporting
from asib_jax.record.reporting import Reporter, table


def test_bar_is_silent_where_stderr_is_no_terminal(capsys):
    with Reporter.epoch_bar(200, "epoch") as bar:
        bar.update(200)
    assert capsys.readouterr().err == ""


def test_curves_are_written_for_tensorboard(tmp_path):
    with Reporter(tmp_path, tensorboard=True, wandb="", config={}) as reporter:
        reporter.scalars({"b/loss": np.float32(1.5), "b/val_acc": 0.25}, 4)
        reporter.scalars({"b/loss": 1.25}, 5)
    assert points(tmp_path) == [("b/loss", 4, 1.5), ("b/val_acc", 4, 0.25), ("b/loss", 5, 1.25)]


def test_a_run_that_goes_on_draws_its_earlier_epochs_and_no_other_once_more(tmp_path):
    """Of all stages on one axis, the control's on the student's."""
    with Reporter(tmp_path, tensorboard=True, wandb="", config={}) as reporter:
        reporter.scalars({"b/loss": 9.0}, 1)  # of an epoch after the snapshot
    earlier = {
        "teacher1/epoch01/loss": 4.0,
        "kept/teacher1": "digest",
        "stage1/a/before/val_synergy": 0.5,
        "stage1/a/epoch01/loss": 3.0,
        "stage1/b/epoch01/loss": 2.0,
        "time/stage1/b/epoch01/seconds": 1.0,
        "stage1/b/epoch02/loss": 1.5,
        "stage2/b/epoch01/loss": 1.25,
        "control/stage1/b/epoch01/loss": None,
        "control/stage1/b/epoch02/loss": 0.5,
    }
    with Reporter(tmp_path, tensorboard=True, wandb="", config={}, earlier=earlier) as reporter:
        reporter.scalars({"control/b/loss": 0.25}, 3)
    assert points(tmp_path) == [
        ("teacher1/loss", 1, 4.0),
        ("a/loss", 1, 3.0),
        ("b/loss", 1, 2.0),
        ("b/loss", 2, 1.5),
        ("b/loss", 3, 1.25),
        ("control/b/loss", 1, pytest.approx(math.nan, nan_ok=True)),
        ("control/b/loss", 2, 0.5),
        ("control/b/loss", 3, 0.25),
    ]


def test_final_figures_and_hyperparameters_are_of_the_same_run(tmp_path):
    from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

    settings = {"tau": 4.0, "use_ib": True, "dataset.name": "npz", "tau_schedule": (2.0, 6.0), "teacher_lr": None}
    with Reporter(tmp_path, tensorboard=True, wandb="", config={}) as reporter:
        reporter.final(settings, {"test_acc_best": 0.75})
    assert points(tmp_path) == [("final/test_acc_best", 0, 0.75)]
    assert [path.parent for path in tmp_path.rglob("events*")] == [tmp_path / "tensorboard"]
    told = {
        value.tag: HParamsPluginData.FromString(value.metadata.plugin_data.content)
        for event in events(tmp_path)
        for value in event.summary.value
        if value.metadata.plugin_data.plugin_name == "hparams"
    }
    start = told["_hparams_/session_start_info"].session_start_info.hparams
    assert {name: getattr(value, value.WhichOneof("kind")) for name, value in start.items()} == {
        "tau": 4.0,
        "use_ib": True,
        "dataset.name": "npz",
        "tau_schedule": "(2.0, 6.0)",
    }
    (metric,) = told["_hparams_/experiment"].experiment.metric_infos
    assert metric.name.tag == "final/test_acc_best" and "_hparams_/session_end_info" in told


def test_curves_that_a_disk_does_not_take_end_no_run(tmp_path, caplog):
    """However many: a thread that had ended would let the eleventh wait for ever."""
    with Reporter(tmp_path, tensorboard=True, wandb="", config={}) as reporter, longest_file(1):
        for step in range(2000):
            reporter.scalars({"b/loss": 0.5}, step)
    assert [record.message.partition(": ")[2] for record in caplog.records] == ["[Errno 27] File too large"]


def test_no_curves_unless_asked_for(tmp_path):
    with Reporter(tmp_path, tensorboard=False, wandb="", config={}) as reporter:
        reporter.scalars({"b/loss": 1.5}, 4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "optimizer, steps_run",
    [("b", 4), ("b", 2), ("a", 4), ("control/b", 4)],
    ids=["past the last step", "interrupted inside", "A-Step", "control"],
)
def test_profile_is_written_for_the_steps_asked_for(tmp_path, optimizer, steps_run, caplog, monkeypatch):
    """Those of the B-Step: other trainings count theirs apart. Where it did none of them that is told."""
    monkeypatch.setattr(reporting.logger, "propagate", True)
    with Reporter(tmp_path, tensorboard=False, wandb="", config={}, profile_steps=(1, 2)) as reporter:
        for step in range(0, steps_run, 2):  # two steps a call
            reporter.on_steps(optimizer, step, step + 1)
            jax.block_until_ready(jnp.ones(3) + step)
    assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (optimizer == "b")
    assert ["profile_steps=(1, 2)" in text and "no trace" in text for text in caplog.messages] == [True] * (
        optimizer != "b"
    )


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_wandb_asked_for_but_not_installed_names_the_key_and_the_remedy(tmp_path):
    with pytest.raises(UserError, match="wandb='distil'.*pip install wandb"):
        Reporter(tmp_path, tensorboard=False, wandb="distil", config={})


def test_table_is_aligned():
    rows = [("name", "accuracy %", "note"), ("student, best", "50.00", ""), ("teacher1", "0.00", "as given")]
    assert table(rows, "<><") == [
        "name           accuracy %  note",
        "student, best       50.00",
        "teacher1             0.00  as given",
    ]
