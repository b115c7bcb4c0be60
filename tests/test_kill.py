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

from asib_jax.record import experiment, signals, snapshots
from run_contents import assert_same

ROOT = pathlib.Path(__file__).resolve().parents[1]
SHORT = ("teacher1.train_epochs=4", "teacher2.train_epochs=4", "student_epochs_per_stage=(6, 6)",
         "teacher_adapt_epochs=3", "synergy_only_epochs=1")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    """Where these processes keep what they compile."""
    return tmp_path_factory.mktemp("programs")


def start(results, programs, changes, *flags):
    """`launch/main.py` on the digits as a process, its output in results.log."""
    keys = ("exp_id=run", f"results_dir={results}", f"compilation_cache={programs}", "checkpoint_steps=7", *changes)
    command = [sys.executable, str(ROOT / "launch" / "main.py"), f"--config={ROOT}/configs/l2_cccp.py:digits", *flags,
               *(f"--config.{key}" for key in keys)]
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    return subprocess.Popen(command, stdout=open(f"{results}.log", "a"), stderr=subprocess.STDOUT,
                            env=environment | {"JAX_PLATFORMS": "cpu", "PYTHONUNBUFFERED": "1"})


def lines_of(results):
    path = results / "run" / "log.txt"
    return path.read_text().splitlines() if path.exists() else []


def begin(results, programs, changes, *flags, until=len):
    """The process, once `until` is true of the lines that it has added to the log, or once it has ended."""
    before, process = len(lines_of(results)), start(results, programs, changes, *flags)
    while not until(lines_of(results)[before:]) and process.poll() is None:
        time.sleep(0.01)
    return process


def to_the_end(results, programs, changes, *flags):
    """The seconds between the first line of the log and the end."""
    process, begun = begin(results, programs, changes, *flags), time.monotonic()
    assert process.wait() == 0, pathlib.Path(f"{results}.log").read_text()[-3000:]
    return time.monotonic() - begun


def killed(results, programs, changes, delay, *flags, until):
    """Whether SIGKILL came `delay` seconds after that, or the run had ended by then."""
    process = begin(results, programs, changes, *flags, until=until)
    try:
        assert process.wait(delay) == 0, pathlib.Path(f"{results}.log").read_text()[-3000:]
        return False
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.wait()
        return True


@pytest.fixture(scope="module")
def untouched(tmp_path_factory, programs):
    """A short run that nobody disturbs: its folder, and how long it takes with everything compiled."""
    folder = tmp_path_factory.mktemp("untouched")
    to_the_end(folder / "compiled", programs, SHORT)
    seconds = to_the_end(folder / "results", programs, SHORT)
    assert_same(folder / "compiled", folder / "results")
    return folder / "results", seconds


def test_killed_five_times_a_run_ends_as_if_it_had_not_been(untouched, programs, tmp_path):
    """Each life lasts for an epoch and a random share of the whole, and begins at the last snapshot of the one before."""
    whole, seconds = untouched
    results, draw = tmp_path / "results", random.Random(0)
    flags, parts = (), []
    for _ in range(5):
        assert killed(results, programs, SHORT, draw.uniform(0, 0.15) * seconds, *flags,
                      until=lambda lines: any("loss" in line for line in lines))
        assert experiment.read_about(results / "run")["status"] == "running"  # nobody could write anything else
        last = snapshots.last_whole(results / "run")
        parts.append(last.part if last else "none")
        flags = ("--resume",)
    to_the_end(results, programs, SHORT, "--resume")
    assert_same(whole, results)
    assert len(set(parts)) > 1, parts  # it came forward


def test_sigterm_ends_a_run_with_a_snapshot_and_its_own_exit_status(untouched, programs, tmp_path):
    """Within the step; a run that has finished is not begun again."""
    whole, seconds = untouched
    results = tmp_path / "results"
    process = start(results, programs, (*SHORT, "checkpoint_steps=0"))
    while not any("stage1/b/epoch02" in line for line in lines_of(results)):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(30) == signals.EXIT_INTERRUPTED
    assert experiment.read_about(results / "run")["status"] == "interrupted"
    assert snapshots.last_whole(results / "run").part == "stage1/b"
    to_the_end(results, programs, SHORT, "--resume")
    assert_same(whole, results)
    before = lines_of(results)
    to_the_end(results, programs, SHORT, "--resume")
    assert lines_of(results) == before and "has finished" in pathlib.Path(f"{results}.log").read_text()


@pytest.mark.slow
def test_killed_in_every_twentieth_of_the_run(tmp_path, programs):
    """The digits run as it is shipped, 20 times: killed in its own twentieth, by the lines of its log, at a random
    moment, and resumed."""
    to_the_end(tmp_path / "whole", programs, ())
    length, draw, parts = len(lines_of(tmp_path / "whole")), random.Random(), []
    for number in range(20):
        results = tmp_path / f"results{number}"
        reached = round((number + draw.random()) / 20 * length)
        while not killed(results, programs, (), draw.uniform(0, 0.1), until=lambda lines: len(lines) >= reached):
            shutil.rmtree(results)
            reached -= 1  # the last lines come all at once
        last = snapshots.last_whole(results / "run")
        parts.append(f"{last.part} {last.epoch + 1}:{last.tally['steps']}" if last else "none")
        to_the_end(results, programs, (), "--resume")
        assert_same(tmp_path / "whole", results)
        print(f"kill {number + 1} after line {reached} of {length}, last snapshot {parts[-1]}: bitwise equal", flush=True)
    assert len(parts) == 20
