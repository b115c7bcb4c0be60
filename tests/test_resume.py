"""Runs that are interrupted and go on, against the same run left alone: every array and figure, bit for bit."""
import dataclasses
import hashlib
import json
import signal

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from asib_jax import build, experiment, recipe as recipes, resume, snapshots, train
from asib_jax.errors import UserError
from asib_jax.experiment import Record
from asib_jax.signals import Interrupted
from asib_jax.snapshots import Snapshots
from run_contents import assert_same
from tiny_runs import read_recipe, tiny_networks, write_data

pytestmark = pytest.mark.usefixtures("quick_compilation")

TRAINED = {f"teacher{k}.{key}": value for k in (1, 2)
           for key, value in {"train_epochs": 2, "warmup_epochs": 0, "early_stopping_patience": 2}.items()}
RUN = {**TRAINED, "train_control": True, "synergy_head_dropout": 0.2, "cutmix_alpha_distill": 0.5, "dataset.data_aug": 1,
       "tensorboard": False}


@pytest.fixture(scope="module", autouse=True)
def networks():
    with tiny_networks():
        yield


@pytest.fixture(scope="module", autouse=True)
def kept_programs(tmp_path_factory):
    """Every program of these runs is compiled once, as `compilation_cache` has it between processes."""
    keep = {"jax_compilation_cache_dir": str(tmp_path_factory.mktemp("programs")),
            "jax_persistent_cache_min_compile_time_secs": 0.0}
    before = {name: getattr(jax.config, name) for name in keep}
    for name, value in keep.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


class Watcher:
    """Sees what every offer of a snapshot holds, and sends the signal before those that `stops` names by their count."""

    def __init__(self, patch, stops=()):
        self.seen, self.count, self.stops = {}, 0, set(stops)
        offer = Snapshots.offer

        def watched(snapshots_, part, epoch, tally, steps, content):
            self.count += 1
            if self.count in self.stops:
                signal.raise_signal(signal.SIGTERM)
            tree, values = content()
            tree = jax.device_get(snapshots._pruned(snapshots.serialization.to_state_dict(tree)))
            self.seen[part, epoch, tally["steps"]] = {
                **{jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
                   for path, leaf in jax.tree_util.tree_leaves_with_path(tree)},
                "plain values": json.dumps([tally, values], sort_keys=True)}
            offer(snapshots_, part, epoch, tally, steps, content)

        patch.setattr(Snapshots, "offer", watched)


def begin(recipe, folder):
    recipe = dataclasses.replace(recipe, results_dir=str(folder))
    return recipe, Record.create(folder, "test_0", "run", {"seed": 0})


def go_on(recipe, record):
    """As launch/main.py does after an interruption."""
    return Record.reopen(record.folder, record.config), snapshots.last_whole(record.folder)


def run_to_the_end(recipe, record):
    """Goes on as often as the run is interrupted; how often that was."""
    last, interruptions = None, 0
    while True:
        try:
            train.recorded(recipe, record, last)
            return interruptions
        except Interrupted:
            interruptions += 1
            assert experiment.read_about(record.folder)["status"] == "interrupted"
            record, last = go_on(recipe, record)


CASES = {
    "float32": ("l3_tadapt", {}),
    "bfloat16": ("l0_baseline", {"use_amp": True, "optimizer": "sgd"}),
    "float16": ("l4_full", {
        "use_amp": True, "amp_dtype": "float16", "use_partial_freeze": True, "student_freeze_level": (1, -1),
        "train_control": False, "a_step_views": 2}),
}


@pytest.mark.parametrize("case, often", [("float32", 9), ("bfloat16", 23), ("float16", 23)])
def test_interrupted_it_ends_as_if_it_had_not_been(case, often, data_file, tmp_path, monkeypatch):
    """Parameters, statistics and best students on disk, the optimizer's moments at the end of every epoch, metrics."""
    config, changes = CASES[case]
    recipe = read_recipe(config, data_file, **{**RUN, **changes})
    with monkeypatch.context() as patch:
        untouched = Watcher(patch)
        assert run_to_the_end(*begin(recipe, tmp_path / "untouched")) == 0
    with monkeypatch.context() as patch:
        stops = range(4, untouched.count, often)  # offers within epochs and at their ends
        stopped = Watcher(patch, stops)
        assert run_to_the_end(*begin(recipe, tmp_path / "stopped")) == len(stops)
    assert_same(tmp_path / "untouched", tmp_path / "stopped")
    assert {part for part, _, _ in stopped.seen} == {part for part, _, _ in untouched.seen}
    shared = stopped.seen.keys() & untouched.seen.keys()
    ends = {key for key in untouched.seen if key[2] == 10}
    assert ends <= shared
    for key in shared:
        assert stopped.seen[key] == untouched.seen[key], key
    assert not snapshots.paths(tmp_path / "stopped" / "run")  # of a finished run there are none


# What a run goes on from --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def interrupted(data_file, tmp_path_factory):
    """A run of labels alone, interrupted after two snapshots; its recipe and folder."""
    recipe = read_recipe("ce_only", data_file, **{"tensorboard": False, "dataset.data_aug": 1,
                                                  "student_epochs_per_stage": (3,)})
    folder = tmp_path_factory.mktemp("interrupted")
    recipe = dataclasses.replace(recipe, results_dir=str(folder), checkpoint_steps=2)
    with pytest.MonkeyPatch.context() as patch:
        Watcher(patch, stops=[9])
        with pytest.raises(Interrupted, match="by SIGTERM in stage1/b, epoch 2, after 8 steps; --resume goes on from "):
            train.recorded(recipe, Record.create(folder, "test_0", "run", plain(recipe)))
    return recipe, folder / "run"


def plain(recipe):
    """The configuration of a recipe, as config.json has it."""
    values = dataclasses.asdict(recipe)
    return values | {f"teacher{k}": values["teachers"][k - 1] for k in range(1, len(recipe.teachers) + 1)} - {"teachers"}


def test_the_last_whole_snapshot_is_used(interrupted, tmp_path, caplog):
    """Of two, with a file of the newer one cut short; without any whole one there is nothing to go on from."""
    _, run = interrupted
    shutil.copytree(run, tmp_path / "run")
    older, newer = snapshots.paths(tmp_path / "run")
    assert snapshots.last_whole(tmp_path / "run").number == int(newer.name) == int(older.name) + 1
    cut(newer)
    last = snapshots.last_whole(tmp_path / "run")
    assert last.number == int(older.name) and (last.part, last.epoch) == ("stage1/b", 1)
    (warning,) = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert str(newer) in warning and f"going on from the one before, {older}" in warning
    cut(older)
    with pytest.raises(UserError, match="no snapshot of .*run is whole: .*000.*000"):
        snapshots.last_whole(tmp_path / "run")


def cut(snapshot):
    """The largest of its files loses its end."""
    largest = max((file for file in snapshot.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)
