"""What a configuration leaves empty: told by the data once, used everywhere, found again on disk."""

import dataclasses
import json
import logging
import math
from types import SimpleNamespace

import numpy as np
import pytest
from networks import convolutions, make_split
from tiny_runs import read_config, read_recipe, tiny_networks, write_data

from asib_jax import build, evaluation, preparation, recipe as recipes, train
from asib_jax.data.statistics import Statistics
from asib_jax.errors import UserError
from asib_jax.models import MODELS
from asib_jax.recipe import checks, told_by_data
from asib_jax.record import finished, reporting, resume
from asib_jax.tools import export, plan

pytestmark = pytest.mark.usefixtures("quick_compilation")
NETWORKS = ("model.student", "teacher1", "teacher2")
EMPTY = {f"{name}.{part}": () for name in NETWORKS for part in ("mean", "std")}
PLAIN = ("tensorboard", False), ("compilation_cache", "")


@pytest.fixture(scope="module", autouse=True)
def networks():
    named = convolutions(8, 8)._replace(names=(((r"(.*)", r"\1"),),))  # which can be exported
    with tiny_networks(), pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "named", lambda small_input: named)
        yield


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data_file, tmp_path_factory):
    """A run whose data tell all that they can: its configuration, its folder, and its recipe as it was given."""
    results = tmp_path_factory.mktemp("results")
    config = read_config(
        "l1_ib",
        data_file,
        results_dir=str(results),
        student_epochs_per_stage=(1,),
        teacher_adapt_epochs=2,
        **{"model.student.name": "named"},
        **EMPTY,
        **dict(PLAIN),
        **{f"teacher{k}.{key}": value for k in (1, 2) for key, value in (("train_epochs", 1), ("warmup_epochs", 0))},
    )
    config.dataset.name, config.enable_kd_after_syn_acc = "", None
    logger = logging.getLogger("asib_jax")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logger, "handlers", [])
        patch.setattr(logger, "propagate", True)
        train.start(config, "test", recipes.read(config))
    (folder,) = {path.parent.resolve() for path in results.glob("*/config.json")}
    return SimpleNamespace(config=config, folder=folder, given=recipes.read(config), results=results)


def expected(recipe):
    """Of the images that teachers train on."""
    pixels = np.asarray(build.load_data(recipe).teacher_train.image).reshape(-1, 3) / 255
    assert len(pixels) == 80 * 64
    return {"mean": pixels.mean(axis=0), "std": pixels.std(axis=0)}


def test_the_record_has_what_was_given_and_what_was_told(run):
    config = json.loads((run.folder / "config.json").read_text())
    assert config["dataset"]["name"] == "npz" and config["enable_kd_after_syn_acc"] is None
    assert config["model"]["student"]["mean"] == config["teacher1"]["std"] == []
    told, wanted = json.loads((run.folder / "about.json").read_text())["told_by_data"], expected(run.given)
    assert told.keys() == {*EMPTY, "enable_kd_after_syn_acc"}
    for key in EMPTY:
        np.testing.assert_allclose(told[key], wanted[key.rpartition(".")[2]], rtol=1e-12)
    assert told["enable_kd_after_syn_acc"] == pytest.approx(1 / math.sqrt(5))


def test_the_log_tells_it_in_a_line_each(run):
    log, wanted = (run.folder / "log.txt").read_text(), expected(run.given)
    for part in ("mean", "std"):
        keys = ", ".join(f"{name}.{part}" for name in NETWORKS)
        numbers = ", ".join(f"{value:.4f}" for value in wanted[part])
        assert log.count(f"{keys}, not given: ({numbers}) of the training images\n") == 1
    assert log.count("enable_kd_after_syn_acc, not given: 0.447\n") == 1
    assert "WARNING" not in log


def test_the_run_is_evaluated_and_exported_from_disk(run, tmp_path):
    table = evaluation.evaluate_run(run.folder)
    assert table in (run.folder / "log.txt").read_text()
    _, about = export.export(run.folder, "best", "npz", tmp_path / "student.npz")
    wanted = expected(run.given)
    np.testing.assert_allclose(about["mean"], wanted["mean"], rtol=1e-12)
    np.testing.assert_allclose(about["std"], wanted["std"], rtol=1e-12)
    assert about["class_names"] == ["0", "1", "2", "3", "4"] and about["image_shape"] == [8, 8, 3]
    recipe = finished.read_recipe(run.folder)
    assert recipe == build.complete(run.given, build.load_data(run.given)) and told_by_data.empty(recipe) == []


def test_the_same_command_finds_its_run_and_another_does_not(run):
    run.config.resume = "latest"
    again = recipes.read(run.config)
    assert resume.find(again, "test").resolve() == run.folder and resume.differences(run.folder, again) == []
    other = dataclasses.replace(again, enable_kd_after_syn_acc=0.5)
    assert resume.differences(run.folder, other) == ["enable_kd_after_syn_acc: None there, 0.5 here"]
    run.config.resume = ""


def test_kept_teachers_are_those_of_these_values(run):
    """The plan, which trains nothing, finds them; a network that is given other values is another teacher."""
    keys = [json.loads(path.read_text())["key"] for path in (run.results / "teachers").glob("*/key.json")]
    wanted = expected(run.given)
    assert len(keys) == 2
    for key in keys:
        np.testing.assert_allclose(key["teacher"]["mean"], wanted["mean"], rtol=1e-12)
    origins = [network.origin for network in plan.make(run.given).networks[1:3]]
    assert all(origin.startswith("kept by an earlier run") for origin in origins)
    other = told_by_data.with_values(run.given, {"teacher1.mean": (0.5,)})
    assert [network.origin[:4] for network in plan.make(other).networks[1:3]] == ["trai", "kept"]


def test_given_values_stay(data_file):
    recipe = read_recipe("l1_ib", data_file, **EMPTY | {"teacher1.mean": (0.25,)}, enable_kd_after_syn_acc=0.9)
    asked = []

    def found():
        asked.append(1)
        return Statistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))

    whole = told_by_data.complete(recipe, 5, found)
    assert whole.gate == 0.9 and whole.teachers[0].mean == (0.25,) and whole.teachers[0].std == (0.4, 0.5, 0.6)
    assert whole.teachers[1].mean == whole.model.student.mean == (0.1, 0.2, 0.3) and len(asked) == 1
    assert told_by_data.complete(whole, 5, found) == whole and len(asked) == 1  # where none is empty


def test_cifar100_is_normalised_as_published():
    recipe = recipes.read(read_config("l1_ib", "", **EMPTY, **{"dataset.name": "cifar100"}))
    image = make_split(10).image
    data = SimpleNamespace(num_classes=100, class_names=(), teacher_train=SimpleNamespace(image=image))
    student = build.complete(recipe, data).model.student
    assert student.mean == (0.5071, 0.4865, 0.4409) and student.std == (0.2673, 0.2564, 0.2762)


@pytest.mark.parametrize("classes, gate", [(2, 0.7071), (10, 0.3162), (100, 0.1), (1000, 0.0316)])
def test_the_gate_lies_well_above_chance(classes, gate):
    assert told_by_data.gate(classes) == pytest.approx(gate, abs=5e-5)
    assert (checks.check_gate(told_by_data.gate(classes), classes) is None) == (classes > 2)  # .71 is 1.41 times .5


def test_a_recipe_that_is_not_complete_has_no_gate(data_file):
    with pytest.raises(ValueError, match="left to the data"):
        _ = read_recipe("l1_ib", data_file, enable_kd_after_syn_acc=None).gate


@pytest.mark.parametrize("left, warns", [(("mean", "std"), True), (("std",), True), ((), False)])
def test_given_weights_may_expect_something_else(data_file, caplog, monkeypatch, left, warns):
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    changes = {"teacher2.weights": "mine.safetensors"} | {f"teacher2.{part}": () for part in left}
    given = read_recipe("l1_ib", data_file, **changes)
    whole = told_by_data.complete(given, 5, lambda: Statistics((0.5,) * 3, (0.2,) * 3))
    with caplog.at_level(logging.INFO, "asib_jax"):
        reporting.describe_told(whole, given, build.load_data(given))
    warnings = [record.message for record in caplog.records if ".weights" in record.message]
    assert len(warnings) == warns
    if warns:
        keys = " and ".join(f"teacher2.{part}" for part in left)
        assert "teacher2.weights='mine.safetensors'" in warnings[0] and warnings[0].endswith(f"set {keys}")


def test_a_gate_below_chance_names_what_would_be_taken(data_file):
    recipe = read_recipe("l1_ib", data_file, enable_kd_after_syn_acc=0.05)
    with pytest.raises(UserError, match=r"=0\.05 is below chance for 5 classes .*set --config.*_acc=0\.45, which"):
        preparation.prepare(recipe)


@pytest.mark.parametrize(
    "changes, warned",
    [
        ({}, ""),
        ({"teacher1.mean": (0.0,), "model.student.std": (1.0, 1.0, 1.0)}, "model.student, teacher1"),
        ({"teacher2.std": (0.02,), "teacher2.weights": "a.npz"}, ""),  # weights know better
        ({"teacher2.std": (), "teacher2.mean": (3.0,)}, "teacher2"),
    ],
)
def test_images_far_from_the_given_mean_and_std(data_file, caplog, monkeypatch, changes, warned):
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    data = build.load_data(read_recipe("l1_ib", data_file))
    pixels = np.asarray(data.teacher_train.image).reshape(-1, 3) / 255
    mean, std = pixels.mean(axis=0), pixels.std(axis=0)
    near = {"mean": (mean + 0.7 * std).tolist(), "std": (1.9 * std).tolist()}
    every = {f"{name}.{part}": near[part] for name in NETWORKS for part in near}
    given = read_recipe("l1_ib", data_file, **every | changes)
    caplog.clear()
    reporting.describe_told(build.complete(given, data), given, data)
    warnings = [record.message for record in caplog.records if "from scratch" in record.message]
    assert [message.partition(":")[0] for message in warnings] == ([warned] if warned else [])
