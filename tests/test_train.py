"""A whole run of tiny networks: what it runs is what was planned, and what it leaves is enough to evaluate it."""

import dataclasses
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from networks import make_feed
from tiny_runs import STEPS, read_config, read_recipe, tiny_networks, write_data

from asib_jax import b_step, build, evaluation, recipe as recipes, runner, train
from asib_jax.context import Context
from asib_jax.errors import UserError
from asib_jax.models.ensemble import init_network
from asib_jax.recipe import checks
from asib_jax.record import finished
from asib_jax.record.experiment import Record
from asib_jax.record.reporting import Reporter
from asib_jax.record.snapshots import Snapshots
from asib_jax.tools import plan
from asib_jax.weights import checkpoint

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", autouse=True)
def networks():
    with tiny_networks():
        yield


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data_file, tmp_path_factory):
    """A run whose control breaks after its training: its folder, what was planned, and each phase that it ran, with the
    epochs of the log and the steps of its optimizer."""
    results = tmp_path_factory.mktemp("results")
    config = read_config(
        "l1_ib",
        data_file,
        results_dir=str(results),
        exp_id="run",
        tensorboard=False,
        student_epochs_per_stage=(2,),
        train_control=True,
        **{f"teacher{k}.warmup_epochs": 0 for k in (1, 2)},
        **{"teacher1.train_epochs": 2, "teacher2.train_epochs": 1},
    )
    recipe, ran, whole = recipes.read(config), [], runner.run_phase
    checks.check(recipe)
    planned = plan.make(recipe)
    record = Record.create(results, "test", "run", config.to_dict())

    def spy(context, phase, variables, progress, begun):
        before = progress.steps[phase.optimizer]
        variables = whole(context, phase, variables, progress, begun)
        epochs = len({key.split("/epoch")[1][:2] for key in record.metrics if key.startswith(f"{phase.name}/epoch")})
        ran.append((phase.title, epochs, progress.steps[phase.optimizer] - before))
        if phase.network == "control":
            raise RuntimeError("out of memory")
        return variables

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "run_phase", spy)
        with pytest.raises(RuntimeError):
            train.recorded(recipe, build.make_inputs(recipe), record)
    return SimpleNamespace(folder=record.folder, planned=planned, ran=ran)


def test_the_phases_of_a_run_are_those_of_the_plan(run):
    """The plan has a row for each that trains parameters; calibration, of 50 steps, is none and logs no epoch."""
    assert run.ran == [
        ("teacher1", 2, 2 * STEPS),
        ("teacher2", 1, STEPS),
        ("BatchNorm statistics", 0, 5 * STEPS),
        ("A-Step, stage 1", 2, 2 * STEPS),
        ("B-Step, stage 1", 2, 2 * STEPS),
        ("control, stage 1", 2, 2 * STEPS),
    ]
    trains = [phase for phase in run.ran if phase[0] != "BatchNorm statistics"]
    assert [step[:3] for step in run.planned.steps] == trains


def test_a_control_that_fails_takes_nothing_along(run):
    """What was finished before it can be read back; the run counts as failed."""
    assert finished.load_students(run.folder).keys() == {"last", "best"}
    folders = {path.name for path in (run.folder / "checkpoints").iterdir()}
    assert {"final", "stage1_last", "stage1_best", "snapshots"} <= folders and "control" not in folders
    assert "student, last" in evaluation.evaluate_run(run.folder)
    assert ",failed," in (run.folder.parent / "summary.csv").read_text()


def test_a_run_of_the_version_before_evaluates(run, caplog, monkeypatch):
    """Whose configuration has keys that are gone, and has not those that came later, which is told."""
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    now = run.folder / "config.json"
    whole, expected = now.read_text(), evaluation.evaluate_run(run.folder)
    then = json.loads(whole) | {"scale_lr_with_devices": True, "bank_memory_gb": 8.0}
    del then["dataset"]["eval_batch_size"]
    now.write_text(json.dumps(then))
    caplog.clear()
    assert evaluation.evaluate_run(run.folder) == expected
    now.write_text(whole)
    assert [record.message for record in caplog.records if record.levelname == "WARNING"] == [
        f"{now} has no dataset.eval_batch_size, which came later: their defaults are taken"
    ]


@pytest.mark.parametrize(
    "name, given, calibrates",
    [
        ("l1_ib", "", True),
        ("l1_ib", "whole", False),
        ("l1_ib", "stem of another width", True),
        ("l0_baseline", "stem of another width", False),
        ("ce_only", "", False),
    ],
)
def test_statistics_are_calibrated_where_they_fit_nothing(data_file, tmp_path, name, given, calibrates):
    """Before an A-Step, of a student that is new or whose given weights leave its stem at random (SPEC 4)."""
    recipe = read_recipe(name, data_file)
    data = build.load_data(recipe)
    if given:
        student = init_network(build.build_networks(recipe, 5).student, 7, "student", data.image_shape)
        if given != "whole":
            student["params"]["stage0"]["conv"]["kernel"] = np.ones((5, 5, 3, 8), np.float32)
        checkpoint.save(tmp_path / "given", student)
        recipe = read_recipe(
            name, data_file, **{"model.student.weights": str(tmp_path / "given"), "model.student.name": "tiny"}
        )
    record = Record.create(tmp_path, "test", "", {"seed": 0})
    context = Context(
        recipe,
        data,
        build.build_networks(recipe, 5),
        make_feed(),
        record,
        Reporter(tmp_path, tensorboard=False, wandb="", config={}),
        Snapshots(record),
    )
    variables, todo = train.begin(context)
    assert ("calibration" in [phase.name for phase in todo]) == calibrates
    if given:
        assert np.array_equal(
            variables.params["student"]["stage1"]["conv"]["kernel"], student["params"]["stage1"]["conv"]["kernel"]
        )


def test_a_given_teacher_at_chance_ends_a_run_before_anything_learns_from_it(data_file, tmp_path):
    recipe = read_recipe("l0_baseline", data_file)
    teacher = init_network(build.build_networks(recipe, 5).teachers[0], 7, "teacher1", (8, 8, 3))
    checkpoint.save(tmp_path / "given", teacher)
    given = {f"teacher{k}.weights": str(tmp_path / "given") for k in (1, 2)}
    config = read_config("l0_baseline", data_file, **given, results_dir=str(tmp_path), tensorboard=False)
    recipe, record = recipes.read(config), Record.create(tmp_path, "test", "run", config.to_dict())
    with pytest.raises(UserError, match=r"^teacher1 .* is right on \d+ of 20 .* not above chance, 20 %"):
        train.recorded(recipe, build.make_inputs(recipe), record)
    assert not [key for key in record.metrics if key.startswith("stage")]
    assert ",failed," in (tmp_path / "summary.csv").read_text()


def test_a_phase_that_nothing_comes_of_ends_a_run(data_file, tmp_path):
    """A weight of the bottleneck under which every A-step overflows once it counts, after an epoch without: 10 steps of
    20, fewer in a row than are allowed."""
    config = read_config("l1_ib", data_file, ib_beta=1e30, ib_beta_warmup_epochs=0, tensorboard=False)
    for k in (1, 2):
        config[f"teacher{k}"].update(train_epochs=1, warmup_epochs=0)
    recipe, record = recipes.read(config), Record.create(tmp_path, "test", "run", config.to_dict())
    recipe = dataclasses.replace(recipe, results_dir=str(tmp_path))
    told = r"^stage1/a: 10 of 20 steps .* more than a tenth; step 10 of stage1/a, epoch 2 broke in .*Last snapshot: "
    with pytest.raises(FloatingPointError, match=told):
        train.recorded(recipe, build.make_inputs(recipe), record)
    assert ",failed," in (tmp_path / "summary.csv").read_text()


def ran(name, data_file, folder, exp_id, **changes):
    """The folder and metrics of a run."""
    config = read_config(name, data_file, results_dir=str(folder), tensorboard=False, **changes)
    recipe, record = recipes.read(config), Record.create(folder, "test", exp_id, config.to_dict())
    checks.check(recipe)
    train.recorded(recipe, build.make_inputs(recipe), record)
    return record.folder, record.metrics


@pytest.mark.parametrize("student_lr, as_given", [(30.0, True), (0.01, False)])
def test_a_given_student_competes_as_it_is(data_file, tmp_path, caplog, monkeypatch, student_lr, as_given):
    """Of half what can be learnt; a rate that is too high ruins it, which is told, and one that is not betters it."""
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    first, learnt = ran("ce_only", data_file, tmp_path, "first", student_epochs_per_stage=(1,))
    given = {"model.student.name": "tiny", "model.student.weights": str(first / "checkpoints" / "final")}
    caplog.clear()
    folder, metrics = ran("ce_only", data_file, tmp_path, "second", student_lr=student_lr, **given)
    before = metrics["stage1/b/before/val_student"]
    assert before == learnt["final/validation_acc_best"] and "stage2/b/before/val_student" not in metrics
    epochs = [metrics[f"stage{stage}/b/epoch0{epoch}/val_student"] for stage in (1, 2) for epoch in (1, 2)]
    assert (
        metrics["final/validation_acc_best"] == max(before, *epochs)
        and metrics["final/validation_acc_last"] == epochs[-1]
    )
    table = evaluation.evaluate_run(folder)
    assert ("  as given  " in table) == as_given == (max(epochs) <= before)
    fell = [record.message for record in caplog.records if "far below" in record.message]
    assert [line.split(":")[0] for line in fell] == (["stage1", "stage2"] if as_given else [])


@pytest.mark.parametrize(
    "network, weights, stages",
    [("student", "x", [True, False]), ("control", "x", [True, False]), ("student", "", [False, False])],
)
def test_what_a_student_begins_with_competes_once(data_file, network, weights, stages):
    recipe = read_recipe("l0_baseline", data_file, **{"model.student.name": "tiny", "model.student.weights": weights})
    nets = build.build_networks(recipe, 5)
    params = {network: init_network(nets.student, 0, "student", (8, 8, 3))["params"]}
    phases = [b_step.phase(recipe, nets, params, stage, 80, None, network) for stage in (0, 1)]
    assert [phase.incoming for phase in phases] == [phase.watch for phase in phases] == stages
