"""SIGKILL at random moments of a real run, and what it comes to in the end: bit for bit what it would have been."""

import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
from launching import ROOT
from run_contents import assert_same
from tiny_runs import SMALL, write_data

from asib_jax.record import experiment, signals, snapshots

TESTS = pathlib.Path(__file__).resolve().parent
TINY = (
    SMALL
    | {
        "teacher_adapt_epochs": 4,
        "student_epochs_per_stage": (1, 16),
        "train_control": False,
        "tensorboard": False,
        "checkpoint_steps": 4,
    }
    | {f"teacher{k}.{key}": value for k in (1, 2) for key, value in (("train_epochs", 3), ("warmup_epochs", 0))}
)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A run that takes seconds: `one_host.py` on one device, its configuration and what is changed in it."""
    data = write_data(tmp_path_factory.mktemp("data"))
    changes = TINY | {"dataset.path": data}
    return [
        TESTS / "one_host.py",
        "1",
        f"--config={ROOT}/configs/l2_cccp.py",
        *(f"--config.{key}={value}" for key, value in changes.items()),
    ]


DIGITS = [ROOT / "launch" / "main.py", f"--config={ROOT}/configs/l2_cccp.py:digits", "--config.checkpoint_steps=7"]


def start(command, results, *flags):
    """The run as a process, its output in results.log."""
    return subprocess.Popen(
        [sys.executable, *command, "--config.exp_id=run", f"--config.results_dir={results}", *flags],
        stdout=open(f"{results}.log", "a"),
        stderr=subprocess.STDOUT,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"},
    )


def lines_of(results):
    path = results / "run" / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def begin(command, results, *flags, until):
    """The process, once `until` is true of the lines that it has added to the log, or once it has ended."""
    before, process = len(lines_of(results)), start(command, results, *flags)
    while not until(lines_of(results)[before:]) and process.poll() is None:
        time.sleep(0.01)
    return process


def to_the_end(*run):
    assert start(*run).wait() == 0, pathlib.Path(f"{run[1]}.log").read_text()[-3000:]


def killed(*run, delay, until):
    """Whether SIGKILL came `delay` seconds after that, or the run had ended by then."""
    process = begin(*run, until=until)
    try:
        assert process.wait(delay) == 0, pathlib.Path(f"{run[1]}.log").read_text()[-3000:]
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


def reached(text):
    return lambda lines: any(text in line for line in lines)


def test_killed_and_stopped_a_run_ends_as_if_it_had_been_left_alone(tiny, tmp_path):
    """SIGKILL within an epoch of a teacher and of the A-Step, then SIGTERM in the B-Step, which leaves a snapshot and
    an exit status of its own. What goes on begins at the last snapshot; a run that has finished is not begun again."""
    whole, results = tmp_path / "whole", tmp_path / "results"
    to_the_end(tiny, whole)
    parts = []
    for flags, line in (((), "teacher1/epoch01"), (("--resume",), "stage1/a/epoch02")):
        assert killed(tiny, results, *flags, delay=0.02, until=reached(line))
        assert experiment.read_about(results / "run")["status"] == "running"  # nobody could write anything else
        last = snapshots.last_whole(results / "run")
        parts.append(last.part if last else "none")
    assert parts[0] != parts[1]  # it came forward
    process = begin(tiny, results, "--resume", until=reached("stage2/b/epoch01"))
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == signals.EXIT_INTERRUPTED
    assert experiment.read_about(results / "run")["status"] == "interrupted"
    assert snapshots.last_whole(results / "run").part == "stage2/b"
    to_the_end(tiny, results, "--resume")
    assert_same(whole, results)
    before = lines_of(results)
    to_the_end(tiny, results, "--resume")
    assert lines_of(results) == before and "has finished" in pathlib.Path(f"{results}.log").read_text()


@pytest.mark.slow
def test_killed_in_every_twentieth_of_the_run(tmp_path):
    """The digits run as it is shipped, 20 times: killed in its own twentieth, by the lines of its log, at a random
    moment, and resumed."""
    to_the_end(DIGITS, tmp_path / "whole")
    length, draw, parts = len(lines_of(tmp_path / "whole")), random.Random(), []
    for number in range(20):
        results = tmp_path / f"results{number}"
        line = round((number + draw.random()) / 20 * length)
        while not killed(DIGITS, results, delay=draw.uniform(0, 0.1), until=lambda lines: len(lines) >= line):
            shutil.rmtree(results)
            line -= 1  # the last ones come all at once
        last = snapshots.last_whole(results / "run")
        parts.append(f"{last.part} {last.epoch + 1}:{last.tally['steps']}" if last else "none")
        to_the_end(DIGITS, results, "--resume")
        assert_same(tmp_path / "whole", results)
        print(f"kill {number + 1} after line {line} of {length}, last snapshot {parts[-1]}: bitwise equal", flush=True)
    assert len(parts) == 20
