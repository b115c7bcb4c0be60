"""Runs that are interrupted and go on, against the same run left alone: every array and figure, bit for bit."""

import collections
import dataclasses
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from run_contents import assert_same, points
from tiny_runs import read_config, read_recipe, tiny_networks, write_data

from asib_jax import build, recipe as recipes, runner, train
from asib_jax.errors import UserError
from asib_jax.record import experiment, resume, snapshots
from asib_jax.record.experiment import Record
from asib_jax.record.files import read_json
from asib_jax.record.reporting import Reporter
from asib_jax.record.signals import Interrupted
from asib_jax.record.snapshots import Snapshots
from asib_jax.weights import checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")

TRAINED = {
    f"teacher{k}.{key}": value
    for k in (1, 2)
    for key, value in {"train_epochs": 2, "warmup_epochs": 0, "early_stopping_patience": 2}.items()
}
RUN = {
    **TRAINED,
    "train_control": True,
    "synergy_head_dropout": 0.2,
    "synergy_base": "mixture",
    "ib_mbm_kv": "feat_prob",
    "ib_mbm_teacher_dropout": 0.2,
    "cutmix_alpha_distill": 0.5,
    "dataset.data_aug": 1,
    "tensorboard": False,
}


@pytest.fixture(scope="module", autouse=True)
def networks():
    with tiny_networks():
        yield


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


class Watcher:
    """Sees what every offer of a snapshot holds, and sends the signal before those that `stops` names; the steps of
    each call by the optimizer of their training."""

    def __init__(self, patch, stops=lambda part, epoch, steps: False):
        self.seen, self.calls = {}, []
        offer, on_steps = Snapshots.offer, Reporter.on_steps

        def watched(snapshots_, part, epoch, tally, steps, content, now=False):
            if stops(part, epoch, tally["steps"]):
                signal.raise_signal(signal.SIGTERM)
            tree, values = content()
            tree = jax.device_get(snapshots._pruned(snapshots.serialization.to_state_dict(tree)))
            self.seen[part, epoch, tally["steps"]] = {
                **{
                    jax.tree_util.keystr(path): hashlib.sha256(np.asarray(leaf).tobytes()).hexdigest()
                    for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
                },
                "plain values": json.dumps([tally, values], sort_keys=True),
            }
            offer(snapshots_, part, epoch, tally, steps, content, now)

        def told(reporter, optimizer, first, last):
            self.calls.append((optimizer, first, last))
            on_steps(reporter, optimizer, first, last)

        patch.setattr(Snapshots, "offer", watched)
        patch.setattr(Reporter, "on_steps", told)


def begin(recipe, folder):
    recipe = dataclasses.replace(recipe, results_dir=str(folder))
    return recipe, Record.create(folder, "test_0", "run", {"seed": 0})


def go_on(record):
    """As launch/main.py does after an interruption."""
    return Record.reopen(record.folder, record.config), snapshots.last_whole(record.folder)


def run_to_the_end(recipe, record):
    """Goes on as often as the run is interrupted; how often that was."""
    last, interruptions = None, 0
    while True:
        try:
            train.recorded(recipe, build.make_inputs(recipe), record, last)
            return interruptions
        except Interrupted:
            interruptions += 1
            assert experiment.read_about(record.folder)["status"] == "interrupted"
            record, last = go_on(record)


# Where a signal comes: the epochs of a phase that are over, and whether it is within the next, at its last step (before
# anything is measured), or before its first (which is offered only when a teacher is ready).
WITHIN, AT_THE_END, OVER, LATER = (0, "within"), (0, "end"), (2, "before"), (1, "within")
CASES = {
    "float32": (
        "l3_tadapt",
        {
            "tensorboard": True,
            "teacher1.temperature": 0.0,
            "teacher2.temperature": 2.0,
            "teacher1.classes": "0-3",
            "teacher2.classes": "4,1-3",
        },
        {
            "teacher1": WITHIN,
            "teacher2": OVER,
            "calibration": LATER,
            "stage1/a": AT_THE_END,
            "stage1/b": WITHIN,
            "stage2/a": LATER,
            "stage2/b": AT_THE_END,
            "control/stage1/b": LATER,
            "control/stage2/b": AT_THE_END,
        },
    ),
    "bfloat16": (
        "l0_baseline",
        {  # a teacher without BatchNorm whose training ends early
            "use_amp": True,
            "optimizer": "sgd",
            "restore_best": False,
            "teacher2.name": "plain_teacher",
            "teacher2.train_epochs": 4,
            "teacher2.early_stopping_patience": 1,
            "teacher2.early_stopping_min_delta": 0.9,
        },
        {"teacher1": AT_THE_END, "teacher2": OVER, "stage2/b": WITHIN, "control/stage1/b": WITHIN},
    ),
    "folds": (
        "l1_ib",
        {
            "teacher_folds": 2,
            "specialists.overlap": 60.0,
            "cutmix_alpha_distill": 0.0,
            "a_step_views": 2,
            "b_step_views": 1,
            "train_control": False,
            "student_epochs_per_stage": (1,),
        },
        {"teacher1_fold1": OVER, "teacher1_fold2": WITHIN, "teacher2_fold2": LATER, "stage1/b": WITHIN},
    ),
    "float16": (
        "l4_full",
        {
            "use_amp": True,
            "amp_dtype": "float16",
            "synergy_ce_alpha": 1e4,  # at first too large for the loss scale, which skips steps until it fits
            "use_partial_freeze": True,
            "student_freeze_level": (1, -1),
            "train_distill_adapter_only": False,
            "use_teacher_finetuning": True,
            "teacher2.temperature": 0.0,
            "a_step_views": 2,
            "train_control": False,
        },
        {"calibration": WITHIN, "stage1/a": LATER, "stage1/b": AT_THE_END, "stage2/a": WITHIN},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_interrupted_it_ends_as_if_it_had_not_been(case, data_file, tmp_path, monkeypatch):
    """Parameters, statistics and best students on disk, the optimizer's moments at the end of every epoch, metrics."""
    config, changes, stops = CASES[case]
    recipe, left = read_recipe(config, data_file, **{**RUN, **changes}), dict(stops)

    def once(part, epoch, steps):
        here = (epoch, {0: "before", 10: "end"}.get(steps, "within"))
        return here == left.get(part) and bool(left.pop(part))

    with monkeypatch.context() as patch:
        untouched = Watcher(patch)
        assert run_to_the_end(*begin(recipe, tmp_path / "untouched")) == 0
    with monkeypatch.context() as patch:
        stopped = Watcher(patch, once)
        assert run_to_the_end(*begin(recipe, tmp_path / "stopped")) == len(stops)
    assert_same(tmp_path / "untouched", tmp_path / "stopped")
    if recipe.tensorboard:
        assert points(tmp_path / "untouched" / "run") == points(tmp_path / "stopped" / "run")
    assert {part for part, _, _ in stopped.seen} == {part for part, _, _ in untouched.seen}
    shared = stopped.seen.keys() & untouched.seen.keys()
    ends = {key for key in untouched.seen if key[2] == 10}
    assert ends <= shared
    for key in shared:
        assert stopped.seen[key] == untouched.seen[key], key
    if not recipe.trains_teachers:  # those that are not in training lie elsewhere
        for part, leaf in {(part, leaf) for (part, *_), held in stopped.seen.items() for leaf in held}:
            assert not re.search(r"\['teacher\d", leaf) or f"['{part}']" in leaf or "distill_adapter" in leaf
    assert not snapshots.paths(tmp_path / "stopped" / "run")  # of a finished run there are none
    metrics = read_json(tmp_path / "stopped" / "run" / "metrics.json")
    skipped = collections.Counter()
    for key, value in metrics.items():
        if key.endswith("/skipped"):
            skipped[key.rpartition("/epoch")[0]] += value
    told = {key.removeprefix("skipped_steps/"): value for key, value in metrics.items() if "skipped_steps/" in key}
    assert told == +skipped and bool(told) == (case == "float16"), told


def test_interrupted_between_calls_of_several_steps_it_goes_on_with_the_calls_that_were_to_come(
    data_file, tmp_path, monkeypatch
):
    """Four steps a call: of ten, two such calls and two of one step, wherever a snapshot came between them."""
    recipe, seen = read_recipe("ce_only", data_file, **LABELS | {"steps_per_call": 4, "checkpoint_steps": 1}), []
    for name, stops in (("untouched", ()), ("stopped", ((0, 4), (0, 9), (1, 8)))):
        with monkeypatch.context() as patch:
            seen.append(Watcher(patch, lambda part, epoch, steps, stops=stops: (epoch, steps) in stops))
            assert run_to_the_end(*begin(recipe, tmp_path / name)) == len(stops)
    assert_same(tmp_path / "untouched", tmp_path / "stopped")
    calls = [(4 * call, 4 * call + 3) for call in range(2)] + [(8, 8), (9, 9)]
    expected = [("b", 10 * epoch + first, 10 * epoch + last) for epoch in (0, 1) for first, last in calls]
    assert seen[0].calls == seen[1].calls == expected and seen[0].seen == seen[1].seen


# What a run goes on from --------------------------------------------------------------------------------------------

LABELS = {
    "tensorboard": False,
    "dataset.data_aug": 1,
    "student_epochs_per_stage": (2,),
    "optimizer": "sgd",
    "checkpoint_steps": 2,
}


@pytest.fixture(scope="module")
def interrupted(data_file, tmp_path_factory):
    """The configuration and the folder of a run of labels alone, interrupted after 10 of its 20 steps."""
    folder = tmp_path_factory.mktemp("interrupted")
    config = read_config("ce_only", data_file, **LABELS, results_dir=str(folder))
    with pytest.MonkeyPatch.context() as patch:
        Watcher(patch, lambda part, epoch, steps: steps == 10)
        record = Record.create(folder, "test_0", "run", config.to_dict())
        with pytest.raises(Interrupted, match="by SIGTERM in stage1/b, epoch 1, after 10 steps; --resume goes on from"):
            train.recorded(recipes.read(config), build.make_inputs(recipes.read(config)), record)
    return config, folder / "run"


@pytest.fixture
def copy(interrupted, tmp_path):
    """Its recipe for, and the path of, a copy that a test may change."""
    config, run = interrupted
    shutil.copytree(run, tmp_path / "run")
    return dataclasses.replace(recipes.read(config), results_dir=str(tmp_path)), tmp_path / "run"


def finish(recipe, run):
    record, last = go_on(Record(run, "", json.loads((run / "config.json").read_text())))
    train.recorded(recipe, build.make_inputs(recipe), record, last)
    return checkpoint.restore(run / "checkpoints" / "final")["students"]


@pytest.fixture(scope="module")
def finished(interrupted, tmp_path_factory):
    """What it comes to on one device."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(interrupted[1], folder / "run")
    return finish(dataclasses.replace(recipes.read(interrupted[0]), results_dir=str(folder)), folder / "run")


@pytest.mark.parametrize("devices", [2, 4])
def test_ten_steps_after_it_went_on_with_other_devices_a_run_is_where_it_would_be(copy, finished, devices):
    recipe, run = copy
    students = finish(dataclasses.replace(recipe, num_devices=devices), run)
    about = experiment.read_about(run)
    assert about["devices"] == devices and about["before"] == [{"devices": 1}]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), students, finished)


def test_other_data_are_refused_and_the_same_may_have_moved(copy, finished, tmp_path):
    recipe, run = copy
    with np.load(recipe.dataset.path) as file:
        arrays = dict(file)
    np.savez(tmp_path / "moved.npz", **arrays)
    arrays["x_test"][0, 0, 0, 0] ^= 1
    np.savez(tmp_path / "other.npz", **arrays)

    def at(name):
        return dataclasses.replace(recipe, dataset=dataclasses.replace(recipe.dataset, path=str(tmp_path / name)))

    before = (run / "about.json").read_text()
    with pytest.raises(UserError, match="other.npz is not the data that the run .* began with .*colours.npz"):
        finish(at("other.npz"), run)
    assert (run / "about.json").read_text() == before
    jax.tree.map(np.testing.assert_array_equal, finish(at("moved.npz"), run), finished)


def test_a_run_of_an_earlier_version_may_lack_keys_and_have_others(copy):
    """What came later has its default; of what is gone only a value that made another run is a difference."""
    recipe, run = copy
    config = json.loads((run / "config.json").read_text())
    del config["dataset"]["eval_batch_size"], config["min_cw"], config["teacher1"]["freeze_bn"]

    def differences(**changes):
        (run / "config.json").write_text(json.dumps(config | changes))
        return resume.differences(run, recipe)

    assert differences(bank_memory_gb=3.0, scale_lr_with_devices=False) == differences() == []
    assert differences(scale_lr_with_devices=True) == ["scale_lr_with_devices: True there, False here"]
    with pytest.raises(UserError, match="config.json cannot be read: unknown key a_key_of_tomorrow"):
        differences(a_key_of_tomorrow=1)


def test_the_last_whole_snapshot_is_used(copy, caplog):
    """Of two, with a file of the newer one cut short; without any whole one there is nothing to go on from."""
    _, run = copy
    older, newer = snapshots.paths(run)
    last = snapshots.last_whole(run)
    assert (last.number, last.part, last.epoch, last.tally["steps"]) == (int(newer.name), "stage1/b", 0, 10)
    cut(newer)
    last = snapshots.last_whole(run)
    assert (last.number, last.epoch) == (int(older.name), 0) and last.tally["steps"] < 10
    (warning,) = [record.message for record in caplog.records if "damaged" in record.message]
    assert f"checkpoint {newer} is damaged" in warning and f"going on from the one before, {older}" in warning
    cut(older)
    with pytest.raises(UserError, match=f"(?s)no snapshot of {run} is whole: .*{newer.name}.*{older.name}"):
        snapshots.last_whole(run)


def test_a_snapshot_of_another_version_is_refused(copy):
    """Its names may mean something else; nothing of the run is changed."""
    _, run = copy
    arrays, text = checkpoint.restore_with_text(newest := snapshots.paths(run)[-1])
    for other in ({"format": 1}, {"format": 99}, {}):
        held = {name: value for name, value in json.loads(text).items() if name != "format"} | other
        checkpoint.save(newest, arrays, json.dumps(held))
        with pytest.raises(UserError, match=f"the snapshot {newest} was written by another version of this code"):
            snapshots.last_whole(run)


def test_a_snapshot_of_a_phase_that_the_run_has_not_ends_it(copy):
    """It would skip every phase, and measure what was never trained."""
    recipe, run = copy
    arrays, text = checkpoint.restore_with_text(newest := snapshots.paths(run)[-1])
    checkpoint.save(newest, arrays, json.dumps(json.loads(text) | {"part": "stage9/b"}))
    with pytest.raises(UserError, match="the snapshot to go on from is of 'stage9/b', which this run does not have"):
        finish(recipe, run)


def test_from_the_older_snapshot_it_ends_the_same(copy, finished):
    """And the damaged one is gone with the first that is written."""
    recipe, run = copy
    cut(snapshots.paths(run)[-1])
    jax.tree.map(np.testing.assert_array_equal, finish(recipe, run), finished)


def cut(snapshot):
    """The largest of its files loses its end."""
    largest = max((file for file in snapshot.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
    with open(largest, "r+b") as file:
        file.truncate(largest.stat().st_size // 2)


def test_a_disk_that_takes_no_snapshot_ends_no_run(copy, finished, caplog, monkeypatch):
    recipe, run = copy
    save = checkpoint.save

    def full(path, tree, about=""):
        if "snapshots" in str(path):
            raise OSError(28, "No space left on device")
        save(path, tree, about)

    monkeypatch.setattr(checkpoint, "save", full)
    jax.tree.map(np.testing.assert_array_equal, finish(recipe, run), finished)
    assert "no snapshot could be written: OSError: [Errno 28] No space left on device" in caplog.text


def test_a_run_that_breaks_names_the_last_good_snapshot_and_leaves_it(copy, finished, caplog):
    """By a learning rate that is no number: the first step breaks all parameters, and nothing is finite after it."""
    recipe, run = copy
    number = snapshots.last_whole(run).number
    with pytest.raises(
        FloatingPointError,
        match=(
            r"stage1/b, epoch 2: 3 steps in a row from step 11 of stage1/b, epoch 2 are not finite .* broke in ce.*"
            rf"Last snapshot: {run}/checkpoints/snapshots/{number:06d}$"
        ),
    ):
        finish(dataclasses.replace(recipe, student_lr=float("nan"), max_nonfinite_steps=3), run)
    assert "is not finite; the snapshot before stays the last" in caplog.text
    assert experiment.read_about(run)["status"] == "failed"
    jax.tree.map(np.testing.assert_array_equal, finish(recipe, run), finished)


def test_snapshots_come_by_time_too(tmp_path, monkeypatch):
    """Every two minutes: the first offer after they have passed is taken, the next is not."""
    record, clock = Record.create(tmp_path, "test_0", "run", {"seed": 0}), types.SimpleNamespace(now=1000.0)
    monkeypatch.setattr(snapshots, "time", types.SimpleNamespace(monotonic=lambda: clock.now))
    taken = Snapshots(record, minutes=2)
    found = []
    for seconds in (119, 2, 119):
        clock.now += seconds
        taken.offer("stage1/b", 0, {}, 1, lambda: ({"w": np.ones(2)}, {}))
        taken._wait()
        found.append(len(snapshots.paths(record.folder)))
    assert found == [0, 1, 1]
    taken.remove()


# Which run -----------------------------------------------------------------------------------------------------------


def test_the_newest_run_of_the_same_configuration_is_the_latest(interrupted, tmp_path, caplog):
    config, run = interrupted
    recipe = dataclasses.replace(recipes.read(config), resume="latest", results_dir=str(tmp_path))
    assert resume.find(dataclasses.replace(recipe, resume=""), "test") is None
    assert resume.find(recipe, "test") is None and "none of the 0 runs" in caplog.text
    for name, changes in {"older": {}, "newest": {}, "other": {"seed": 7}}.items():
        Record.create(tmp_path, "test_0", name, {**config.to_dict(), **changes}).finish("interrupted", {})
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "about.json").write_text("")
    assert resume.find(recipe, "test") == tmp_path / "newest"
    assert "left out: " in caplog.text and "damaged/about.json is damaged" in caplog.text
    assert resume.find(dataclasses.replace(recipe, seed=7), "test") == tmp_path / "other"
    assert resume.find(dataclasses.replace(recipe, exp_id="older"), "test") == tmp_path / "older"
    assert resume.find(dataclasses.replace(recipe, seed=8), "test") is None and "none of the 3 runs" in caplog.text
    with pytest.raises(UserError, match="(?s)older has another configuration:.*seed: 0 there, 8 here"):
        resume.find(dataclasses.replace(recipe, seed=8, exp_id="older"), "test")
    assert resume.find(dataclasses.replace(recipe, exp_id="unknown"), "test") is None


# What is done to a file of a run's folder, and what the message says of it.
DAMAGED = {
    "cut": lambda file: file.write_text(file.read_text()[:100]),
    "emptied": lambda file: file.write_text(""),
    "removed": lambda file: file.unlink(),
    "a list": lambda file: file.write_text("[]"),
    "no text": lambda file: file.write_bytes(bytes(range(128, 256))),
    "without its keys": lambda file: file.write_text('{"seed": "0"}'),
    "a folder": lambda file: (file.unlink(), file.mkdir()),
}


@pytest.mark.parametrize("file", ["about.json", "config.json"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_run_is_not_buried_for_a_file_of_its_folder(file, damage, interrupted, tmp_path):
    """The newest of its name, whatever lies beside it; the message names the file, and what to do. Once it has been
    moved away, or a newer one begun, that one is gone on with."""
    config, _ = interrupted
    recipe = dataclasses.replace(recipes.read(config), resume="latest", results_dir=str(tmp_path))

    def begin():
        record = Record.create(tmp_path, "test_0", "", config.to_dict())
        record.finish("interrupted", {})
        return record.folder

    older, newest = begin(), begin()
    DAMAGED[damage](newest / file)
    with pytest.raises(UserError, match=f"(?s){newest}.*{file}.*--config.resume=RUN; or move {newest} away") as caught:
        resume.find(recipe, "test")
    assert "put that file back" in str(caught.value)
    assert resume.find(dataclasses.replace(recipe, resume=str(older)), "test") == older
    newest.rename(tmp_path / ".away")
    assert resume.find(recipe, "test") == older
    (tmp_path / ".away").rename(newest)
    assert begin() == resume.find(recipe, "test")


def test_a_damaged_run_of_another_configuration_or_that_has_finished_is_left_out(interrupted, tmp_path, caplog):
    config, _ = interrupted
    recipe = dataclasses.replace(recipes.read(config), resume="latest", results_dir=str(tmp_path))
    for name, status, changes, file in (
        ("test_0", "interrupted", {"tau": 9.0}, "about.json"),
        ("other_0", "interrupted", {}, "config.json"),
        ("test_0", "finished", {}, "config.json"),
    ):
        record = Record.create(tmp_path, name, "", config.to_dict() | changes)
        record.finish(status, {})
        (record.folder / file).write_text("{")
        assert resume.find(recipe, "test") is None
        assert f"left out: {record.folder / file} is damaged" in caplog.text


@pytest.mark.usefixtures("logger_after_use")
def test_a_run_that_begins_again_for_want_of_a_snapshot_says_so(interrupted, tmp_path):
    config, run = interrupted
    shutil.copytree(run, tmp_path / "run")
    shutil.rmtree(snapshots.folder(tmp_path / "run"))
    again = config.to_dict() | {"resume": str(tmp_path / "run"), "compilation_cache": ""}
    train.start(again, "test", recipes.read(config))
    assert f"{tmp_path / 'run'} had come to no snapshot: it begins again" in (tmp_path / "run" / "log.txt").read_text()
    assert experiment.read_about(tmp_path / "run")["status"] == "finished"


def test_a_run_that_has_finished_is_not_begun_again(tmp_path):
    """By a process that looked for it before it had, for instance."""
    record = Record.create(tmp_path, "test_0", "run", {"seed": 0})
    record.log("acc", 0.5)
    record.finish("finished", {})
    left = {path: path.read_bytes() for path in tmp_path.rglob("*.json")}
    with pytest.raises(UserError, match="run has finished"):
        Record.reopen(record.folder, {"seed": 1})
    assert left == {path: path.read_bytes() for path in tmp_path.rglob("*.json")}


def test_what_does_not_matter_may_change_and_what_matters_is_told(interrupted):
    config, run = interrupted
    recipe = dataclasses.replace(recipes.read(config), resume=str(run))
    free = {
        "num_devices": 2,
        "tensorboard": True,
        "results_dir": "elsewhere",
        "checkpoint_minutes": 3.0,
        "dataset": dataclasses.replace(recipe.dataset, path="moved.npz", eval_batch_size=7),
    }
    assert resume.find(dataclasses.replace(recipe, **free), "test") == run.resolve()
    teacher = dataclasses.replace(recipe.teachers[0], finetune_lr=0.5)
    with pytest.raises(UserError) as error:
        resume.find(dataclasses.replace(recipe, tau=3.0, teachers=(teacher, *recipe.teachers[1:])), "test")
    assert [line.strip() for line in str(error.value).splitlines()[1:-1]] == [
        "tau: 4.0 there, 3.0 here",
        "teacher1.finetune_lr: 0.0001 there, 0.5 here",
    ]
    for nowhere in (run.parent, run / "config.json", run / "absent"):
        with pytest.raises(UserError, match="is no run folder"):
            resume.find(dataclasses.replace(recipe, resume=str(nowhere)), "test")


def test_a_run_is_one_process_s(copy, tmp_path):
    """While it lives; what a dead one leaves holds nobody up."""
    _, run = copy
    held = Record.reopen(run, {"seed": 0})
    with pytest.raises(UserError, match=rf"run is going on in another process \(process {os.getpid()} on "):
        Record.reopen(run, {"seed": 0})
    held.finish("interrupted", {})
    lock = (
        f"import fcntl, os, signal; f = open({str(run / '.lock')!r}, 'a'); fcntl.flock(f, fcntl.LOCK_EX); "
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", lock]).returncode == -signal.SIGKILL
    again = Record.reopen(run, {"seed": 0})
    assert again.about["resumed"] == 2
    again.finish("interrupted", {})


def test_what_is_logged_again_has_to_be_the_same(copy):
    _, run = copy
    record = Record.reopen(run, {"seed": 0})
    record.go_on_from({"before/test_acc": 0.5, "weights/teacher1": "ab"})
    record.log("before/test_acc", 0.5)
    with pytest.raises(ValueError, match="'before/test_acc' is already 0.5"):
        record.log("before/test_acc", 0.25)
    record.confirm("weights/teacher1", "ab", "teacher1.weights")
    with pytest.raises(UserError, match="teacher1.weights is not what this run began with: its SHA-256 is cd, not ab"):
        record.confirm("weights/teacher1", "cd", "teacher1.weights")
    record.finish("interrupted", {})


def test_a_teacher_that_was_moved_away_is_missed(data_file, tmp_path, monkeypatch):
    recipe = read_recipe("l0_baseline", data_file, **RUN, student_epochs_per_stage=(1,))
    recipe, record = begin(recipe, tmp_path)
    with monkeypatch.context() as patch:
        Watcher(patch, lambda part, epoch, steps: part == "stage1/b")
        with pytest.raises(Interrupted):
            train.recorded(recipe, build.make_inputs(recipe), record)
    (kept, _) = sorted((tmp_path / "teachers").iterdir())
    kept.rename(tmp_path / "moved")
    record, last = go_on(record)
    with pytest.raises(UserError, match="is no longer in .*put it back.* or begin a new run .* trains it again"):
        train.recorded(recipe, build.make_inputs(recipe), record, last)


def test_a_run_that_dies_between_its_teachers_keeps_the_figures_of_the_first(data_file, tmp_path, monkeypatch):
    """With no snapshot by time or steps."""
    recipe = read_recipe("l0_baseline", data_file, **RUN | {"train_control": False, "student_epochs_per_stage": (1,)})
    assert run_to_the_end(*begin(recipe, tmp_path / "untouched")) == 0
    whole, run_phase = (tmp_path / "dies"), runner.run_phase
    recipe, record = begin(recipe, whole)
    with monkeypatch.context() as patch:

        def dies_in_the_second(context, phase, *rest):
            if phase.name == "teacher2":
                raise ZeroDivisionError
            return run_phase(context, phase, *rest)

        patch.setattr(runner, "run_phase", dies_in_the_second)
        with pytest.raises(ZeroDivisionError):
            train.recorded(recipe, build.make_inputs(recipe), record)
    assert len(list((whole / "teachers").iterdir())) == 1
    record, last = go_on(record)
    train.recorded(recipe, build.make_inputs(recipe), record, last)
    assert_same(tmp_path / "untouched", whole)
