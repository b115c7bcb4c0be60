"""Several hosts, as processes of this machine: they compute what one does, agree first, and end together."""

import csv
import os
import pathlib
import signal
import socket
import subprocess
import sys
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from networks import make_split

from asib_jax.engine import devices as placing, hosts
from asib_jax.record import signals, snapshots
from asib_jax.weights import checkpoint

TESTS = pathlib.Path(__file__).resolve().parent
FLAGS = {
    "dataset.name": "npz",
    "dataset.path": "colours.npz",
    "dataset.batch_size": 8,
    "dataset.data_aug": 0,
    "dataset.val_fraction": 0.2,
    "model.student.name": "tiny",
    "teacher1.name": "tiny_teacher",
    "teacher2.name": "tiny_teacher",
    **{
        f"teacher{k}.{key}": value
        for k in (1, 2)
        for key, value in (("weights", ""), ("finetune_epochs", 0), ("train_epochs", 1), ("warmup_epochs", 0))
    },
    "distill_out_dim": 8,
    "ib_mbm_out_dim": 8,
    "ib_mbm_n_head": 2,
    "use_amp": False,
    "teacher_adapt_epochs": 1,
    "student_epochs_per_stage": "(1,)",
    "synergy_only_epochs": 0,
    "enable_kd_after_syn_acc": 0.2,
    "schedule.lr_warmup_epochs": 0,
    "optimizer": "sgd",
    "exp_id": "run",
}


@pytest.fixture
def launch(tmp_path):
    """Start l1_ib in processes of two devices each, of which `num_devices` train; killed at the end at the latest."""
    training, test = make_split(50), make_split(10, seed=1)
    started = []

    def start(results: str, *own: tuple[dict, bool]) -> list[subprocess.Popen]:
        """own: the flags of each process, and whether the folder it runs in holds the data."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = "127.0.0.1:%d" % free.getsockname()[1]
        for number, (flags, has_data) in enumerate(own):
            folder = tmp_path / f"{results.replace('/', '_')}-{number}"
            folder.mkdir()
            if has_data:
                np.savez(
                    folder / "colours.npz",
                    x_train=training.image,
                    y_train=training.label,
                    x_test=test.image,
                    y_test=test.label,
                )
            flags = FLAGS | {"results_dir": tmp_path / results} | flags
            joined = [f"--coordinator={address}", f"--processes={len(own)}", f"--process={number}"] * (len(own) > 1)
            started.append(
                subprocess.Popen(
                    [
                        sys.executable,
                        TESTS / "one_host.py",
                        "2",
                        f"--config={TESTS.parent}/configs/l1_ib.py",
                        *joined,
                        *(f"--config.{key}={value}" for key, value in flags.items()),
                    ],
                    cwd=folder,
                    env=os.environ | {"JAX_PLATFORMS": "cpu"},
                    text=True,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                )
            )
        return started[-len(own) :]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str]]:
    """(exit status, output) of each."""
    told = [process.communicate(timeout=150)[0] for process in processes]
    return [(process.returncode, output) for process, output in zip(processes, told)]


def row(folder: pathlib.Path) -> dict[str, str]:
    with open(folder / "summary.csv", newline="") as file:
        (found,) = csv.DictReader(file)
    own = ("minutes", "data", "overrides")  # a path of each host, and how many devices
    return {key: value for key, value in found.items() if key not in own}


def test_two_hosts_train_what_one_does_though_a_signal_stops_them(launch, tmp_path):
    """Teachers, A-Step, B-Step, evaluation on one device of each of two hosts, and on two devices of one: bitwise the
    same variables, for a sum of two is exact in any order. A signal to the second alone, during the B-Step, stops both
    with the status of an interrupted run; started again they go on. The first host alone writes, and it writes once."""
    config, folder = {"student_epochs_per_stage": "(30,)"}, tmp_path / "two"

    def both(attempt, resume):
        own = config | {"num_devices": 1, "results_dir": folder, "resume": resume}
        return launch(attempt, (own, True), (own, True))

    processes, log = both("first", "latest"), folder / "run" / "log.txt"
    while "stage1/b/epoch02" not in (log.read_text() if log.exists() else ""):
        assert all(process.poll() is None for process in processes), ends(processes)
        time.sleep(0.02)
    processes[1].send_signal(signal.SIGTERM)
    for status, told in ends(processes):
        assert status == signals.EXIT_INTERRUPTED and "stopped by " in told, told
    assert row(folder)["status"] == "interrupted"
    assert snapshots.last_whole(folder / "run").part == "stage1/b"
    ((status, told),) = ends(launch("one", (config | {"num_devices": 2}, True)))
    assert status == 0, told
    (first, told), (second, silent) = ends(both("second", str(folder / "run")))
    assert (first, second) == (0, 0), told + silent
    assert "devices: 2 x cpu on 2 hosts" in log.read_text() and "teacher1 (tiny_teacher)" in told
    assert "teacher1" not in silent  # no log lines, no table
    one, two = (checkpoint.restore(tmp_path / name / "run" / "checkpoints" / "final") for name in ("one", "two"))
    assert {"ib_mbm", "teacher1", "student"} <= one["variables"].keys()
    jax.tree.map(np.testing.assert_array_equal, two, one)
    assert row(folder) == row(tmp_path / "one")
    assert {path.name for path in folder.glob("[!.]*")} == {"run", "teachers", "latest", "summary.csv"}
    assert {path.name for path in (folder / "run" / "checkpoints").iterdir()} == {"stage1_last", "stage1_best", "final"}
    assert len(list((folder / "run" / "tensorboard").iterdir())) == 1
    assert len(list((folder / "teachers").iterdir())) == 2
    for name in ("first-0", "first-1", "second-0", "second-1"):
        assert [path.name for path in (tmp_path / name).iterdir()] == ["colours.npz"]


def test_hosts_that_disagree_stop(launch, tmp_path):
    """Another seed on the second: both name it, and there is no result. Of a run without `exp_id`, whose folder the
    second does not know."""
    for number, (status, told) in enumerate(
        ends(launch("results", ({"exp_id": ""}, True), ({"exp_id": "", "seed": 5}, True)))
    ):
        assert status == 2
        assert f"seed is not the same on host 1 as on host 0 (here {5 * number})" in told
    assert row(tmp_path / "results")["status"] == "failed"


def test_a_host_that_fails_ends_the_other(launch, tmp_path):
    """The second finds no data while the first waits for it: neither hangs, both say so."""
    (first, told), (second, cause) = ends(launch("results", ({}, True), ({}, False)))
    assert first != 0 and second == 2
    assert "error: " in cause and "colours.npz" in cause
    assert row(tmp_path / "results")["status"] == "failed" and "error: " in told


def test_how_hosts_are_named():
    for address, processes, process in (
        ("there", 2, 0),
        ("there:1234", None, 0),
        ("there:1234", 2, None),
        ("there:1234", 2, 2),
    ):
        with pytest.raises(ValueError, match=f"--coordinator={address} .*--process={process}: give HOST:PORT"):
            hosts.joined(address, processes, process, int).__enter__()
    with pytest.raises(ValueError, match="--processes and --process need --coordinator"):
        hosts.joined(None, 2, 0, int).__enter__()


def test_a_host_holds_its_own_places_alone():
    """Four devices, the last two of which are here: the parts that belong to them, of seven examples and of batches."""
    away = SimpleNamespace(process_index=jax.process_index() + 1)
    here = jax.local_devices()[:2]
    devices, x = [away, away, *here], np.arange(7)
    placed = placing.spread({"x": x}, devices)["x"]
    np.testing.assert_array_equal(placed, [[4, 5], [6, 0]])
    assert [shard.device for shard in placed.addressable_shards] == here
    streamed = placing.place_steps({"x": 10 * x}, np.array([[0, 1, 2, 3], [6, 5, 4, 9]]), devices)["x"]
    np.testing.assert_array_equal(streamed, [[[20], [40]], [[30], [60]]])
    assert placing.replicate({"x": x}, devices)["x"].sharding.device_set == set(here)
