"""Log lines, progress bars on a real terminal, event files read back, and the table's interval."""

import importlib.util
import logging
import os
import re
import struct
import sys
import termios

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.errors import UserError
from asib_jax.record.reporting import Reporter, setup_logging, table


@pytest.fixture
def logger_after_use():
    logger = logging.getLogger("asib_jax")
    yield logger
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True


def test_log_lines_carry_time_and_level_and_move_with_the_run(tmp_path, capsys, logger_after_use):
    for run in ("one", "two"):
        (tmp_path / run).mkdir()
        logger = setup_logging(tmp_path / run)
        logger.info("epoch %d: accuracy %.3f", 3, 0.5)
        logger.warning("key tau has no effect in run %s", run)
    assert logger is logger_after_use
    for run in ("one", "two"):
        lines = (tmp_path / run / "log.txt").read_text().splitlines()
        stamp = r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d"
        assert re.fullmatch(stamp + " INFO epoch 3: accuracy 0.500", lines[0])
        assert re.fullmatch(f"{stamp} WARNING key tau has no effect in run {run}", lines[1])
        assert len(lines) == 2
    shown = capsys.readouterr().err.splitlines()
    assert shown[1::2] == ["key tau has no effect in run one", "key tau has no effect in run two"]


def test_bar_shows_rate_and_leaves_log_lines_whole(tmp_path, monkeypatch, logger_after_use):
    logger = setup_logging(tmp_path)
    terminal, end = os.openpty()
    os.set_blocking(terminal, False)
    termios.tcsetwinsize(end, (24, 100))
    with open(end, "w") as stderr:
        monkeypatch.setattr(sys, "stderr", stderr)
        with Reporter.epoch_bar(200, "stage 1 B epoch 2") as bar:
            for _ in range(2):
                bar.update(100)
                bar.refresh()
            logger.info("epoch 2 done")
        output = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert "stage 1 B epoch 2: 100%" in output and "200/200" in output
    assert re.search(r"\[\d+:\d+<\d+:\d+, +[\d.]+k? images/s\]", output)
    assert "epoch 2 done" in re.split(r"[\r\n]+", output)


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
