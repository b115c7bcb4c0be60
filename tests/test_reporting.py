"""Progress bars, event files read back, and tables."""

import importlib.util
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.errors import UserError
from asib_jax.record.reporting import Reporter, table


def test_bar_is_silent_where_stderr_is_no_terminal(capsys):
    with Reporter.epoch_bar(200, "epoch") as bar:
        bar.update(200)
    assert capsys.readouterr().err == ""


def read_scalars(folder):
    """(name, step, value) of all points in TensorBoard event files: records framed by length and checksums."""
    from tensorboardX.proto.event_pb2 import Event

    points = []
    for file in folder.iterdir():
        content, start = file.read_bytes(), 0
        while start < len(content):
            (length,) = struct.unpack_from("<Q", content, start)
            event = Event.FromString(content[start + 12 : start + 12 + length])
            points += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            start += length + 16
    return points


def test_curves_are_written_for_tensorboard(tmp_path):
    with Reporter(tmp_path, tensorboard=True, wandb="", config={}) as reporter:
        reporter.scalars({"b/loss": np.float32(1.5), "b/val_acc": 0.25}, step=4)
        reporter.scalars({"b/loss": 1.25}, step=5)
    assert read_scalars(tmp_path / "tensorboard") == [("b/loss", 4, 1.5), ("b/val_acc", 4, 0.25), ("b/loss", 5, 1.25)]


def test_no_curves_unless_asked_for(tmp_path):
    with Reporter(tmp_path, tensorboard=False, wandb="", config={}) as reporter:
        reporter.scalars({"b/loss": 1.5}, step=4)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "curve, steps_run",
    [("b", 4), ("b", 2), ("a", 4), ("control/b", 4)],
    ids=["past the last step", "interrupted inside", "A-Step", "control"],
)
def test_profile_is_written_for_the_steps_asked_for(tmp_path, curve, steps_run):
    """Those of the B-Step: other trainings count theirs apart."""
    with Reporter(tmp_path, tensorboard=False, wandb="", config={}, profile_steps=(1, 2)) as reporter:
        for step in range(0, steps_run, 2):  # two steps a call
            reporter.on_steps(curve, step, step + 1)
            jax.block_until_ready(jnp.ones(3) + step)
    assert bool(list(tmp_path.rglob("*.xplane.pb"))) == (curve == "b")


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
