"""Teachers that know some classes: how classes are named, what each learns from, what it is measured on, where it is
kept."""

import csv
import itertools
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
from tiny_runs import read_config, tiny_networks, write_data

from asib_jax import build, evaluation, recipe as recipes, train
from asib_jax.data import classes
from asib_jax.errors import UserError
from asib_jax.recipe import told_by_data
from asib_jax.record import finished
from asib_jax.tools import dry_run, plan
from asib_jax.weights import checkpoint, teacher_store

pytestmark = pytest.mark.usefixtures("quick_compilation")
NAMES = ("ant", "bee", "t-shirt", "7", "6-9", "x", "y", "z", "a", "b")
QUICK = {
    "student_epochs_per_stage": (1,),
    "teacher_adapt_epochs": 2,
    "tensorboard": False,
    "compilation_cache": "",
    **{f"teacher{k}.{key}": value for k in (1, 2) for key, value in (("train_epochs", 2), ("warmup_epochs", 0))},
}
WINDOWS = {"specialists.overlap": 20.0}


@pytest.fixture(scope="module", autouse=True)
def networks():
    with tiny_networks():
        yield


@pytest.mark.parametrize(
    "text, labels",
    [
        ("", ()),
        ("0-3", (0, 1, 2, 3)),
        (" 7 , 0 - 2", (7, 0, 1, 2)),
        ("0-9", ()),
        ("5-9,0-4", (5, 6, 7, 8, 9, 0, 1, 2, 3, 4)),
        ("bee,ant", (1, 0)),
        ("t-shirt,b", (2, 9)),
        ("7,x", (7, 5)),  # what reads as numbers is numbers, though a class is called so
        ("6-9", (6, 7, 8, 9)),
    ],
)
def test_classes_are_named_by_labels_ranges_and_names(text, labels):
    assert classes.parse(text, 10, "teacher1.classes", NAMES) == labels
    assert classes.parse(classes.text_of(labels), 10, "") == labels


def test_a_name_with_a_comma_goes_by_its_number():
    names = ("salt, pepper", "oil", "sugar")
    with pytest.raises(UserError, match="'salt' is neither .* with a comma .* goes by its number"):
        classes.parse("salt, pepper,oil", 3, "teacher1.classes", names)
    assert classes.parse("0,oil", 3, "teacher1.classes", names) == (0, 1)


@pytest.mark.parametrize(
    "count, teachers, overlap, expected",
    [
        (10, 2, 20, ["0-5", "4-9"]),
        (100, 2, 20, ["0-59", "40-99"]),
        (10, 2, 0, ["0-4", "5-9"]),
        (5, 2, 0, ["0-2", "3-4"]),
        (10, 2, 100, ["0-9", "0-9"]),
        (9, 3, 0, ["0-2", "3-5", "6-8"]),
        (100, 3, 10, ["0-39", "30-69", "60-99"]),
        (10, 1, 20, ["0-9"]),
    ],
)
def test_windows_of_classes(count, teachers, overlap, expected):
    assert [classes.text_of(window) for window in classes.windows(count, teachers, overlap)] == expected


def test_windows_leave_no_class_out_and_share_what_was_asked():
    for count in range(4, 30):
        for teachers in range(2, count // 2 + 1):
            for overlap in (0, 0.1, 7, 100 / 3, 50, 99.9):
                windows = classes.windows(count, teachers, overlap)
                assert set().union(*windows) == set(range(count))
                for one, other in itertools.pairwise(windows):
                    assert abs(len(set(one) & set(other)) - overlap / 100 * count) <= 1


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data_file, tmp_path_factory):
    """A run of two teachers of three classes of five each, as `specialists.overlap` says."""
    results = tmp_path_factory.mktemp("results")
    config = read_config("l1_ib", data_file, results_dir=str(results), **QUICK, **WINDOWS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(logging.getLogger("asib_jax"), "propagate", True)
        folder = train.start(config, "test", recipes.read(config))
    recipe = finished.read_recipe(folder)
    data = build.load_data(recipe)
    nets = build.build_networks(recipe, data.num_classes)
    done = finished.load(folder, recipe, nets, data.image_shape)
    return SimpleNamespace(
        config=config, results=results, folder=folder, recipe=recipe, data=data, nets=nets, done=done
    )


def right(run, split, k):
    """Of which images of a split teacher `k` (from 0) names the class, and which are of classes that it knows."""
    model, name = run.nets.teachers[k], run.nets.teacher_names[k]
    logits = model.apply(run.done.variables.of(name), np.asarray(split.image), train=False).logit
    return np.argmax(np.asarray(logits), axis=1) == split.label, np.isin(split.label, model.classes)


def test_what_the_data_told_is_recorded_and_found_again(run, data_file):
    assert json.loads((run.folder / "config.json").read_text())["teacher1"]["classes"] == ""
    told = json.loads((run.folder / "about.json").read_text())["told_by_data"]
    assert (told["teacher1.classes"], told["teacher2.classes"]) == ("0-2", "2-4")
    assert [teacher.classes for teacher in run.recipe.teachers] == ["0-2", "2-4"]
    assert run.recipe == build.complete(recipes.read(run.config), run.data)
    named = read_config("l1_ib", data_file, **{"teacher1.classes": "2,1", "teacher2.classes": "0,1,2,3,4"})
    whole = build.complete(recipes.read(named), run.data)
    assert [teacher.classes for teacher in whole.teachers] == ["2,1", ""] and told_by_data.empty(whole) == []
    assert {key for key in told_by_data.values_of(whole) if key.endswith("classes")} == {"teacher1.classes"}


def test_named_classes_come_before_divided_ones(run, data_file):
    changes = {
        **WINDOWS,
        "teacher1.classes": "0-3",
        "teacher2.classes": "3,4",
        "teacher1.mean": (),
        "model.student.std": (),
    }
    whole = build.complete(recipes.read(read_config("l1_ib", data_file, **changes)), run.data)
    assert [teacher.classes for teacher in whole.teachers] == ["0-3", "3-4"] and len(whole.teachers[0].mean) == 3


def test_each_is_measured_on_its_own_classes_and_on_all(run):
    """Validation while it trains, the line under the table, and the row of summary.csv, from its variables."""
    with (run.results / "summary.csv").open() as file:
        (row,) = csv.DictReader(file)
    table, metrics = (run.folder / "table.txt").read_text(), json.loads((run.folder / "metrics.json").read_text())
    for k, name in enumerate(run.nets.teacher_names):
        hit, own = right(run, run.data.test, k)
        assert own.sum() in (13, 15) and not hit[~own].any()
        assert float(row[f"test_acc_{name}_own"]) == hit.sum() / own.sum()
        assert float(row[f"test_acc_{name}"]) == hit.mean()
        share = 100 * hit.sum() / own.sum()
        assert f"{name} knows 3 of 5 classes: {share:.2f} % of the {own.sum()} test images of these\n" in table
        hit, own = right(run, run.data.validation, k)
        best = max(metrics[f"{name}/epoch{epoch:02d}/val_{name}"] for epoch in (1, 2))
        assert own.sum() == 12 and best == hit.sum() / 12 == float(row[f"validation_acc_{name}_own"])
    assert evaluation.evaluate_run(run.folder) == table.rstrip("\n")


def test_what_a_teacher_has_memorised_is_asked_over_its_own_classes(run):
    metrics, log = json.loads((run.folder / "metrics.json").read_text()), (run.folder / "log.txt").read_text()
    for k, name in enumerate(run.nets.teacher_names):
        for split, part in (("train", run.data.train), ("val", run.data.validation)):
            hit, own = right(run, part, k)
            assert metrics[f"{name}/{split}_acc"] == hit.sum() / own.sum()
            assert 0 < metrics[f"{name}/{split}_entropy"] < np.log(3)  # of three classes, not five
        hit, own = right(run, run.data.train, k)
        assert f"{name}: {100 * hit.sum() / own.sum():.1f} % of {own.sum()} images that it teaches, " in log


def test_the_log_and_the_plan_say_who_knows_what(run):
    given = recipes.read(run.config)
    told = dry_run.text(given, plan.make(given))
    for text in ((run.folder / "log.txt").read_text(), told):
        assert "teacher1 (tiny_teacher) knows 3 of 5 classes: 0-2\n" in text
        assert "teacher2 (tiny_teacher) knows 3 of 5 classes: 2-4\n" in text and "no teacher knows" not in text


def test_a_teacher_learns_from_images_of_its_classes_alone(run, data_file, tmp_path):
    """Other images under the other labels leave it as it is, bit by bit; its steps are those of its images."""
    stored = dict(np.load(data_file))
    foreign = stored["y_train"] >= 3
    stored["x_train"][foreign] = 255 - stored["x_train"][foreign]
    np.savez(tmp_path / "other.npz", **stored)
    config = run.config.copy_and_resolve_references()
    config.update_from_flattened_dict({"dataset.path": str(tmp_path / "other.npz"), "results_dir": str(tmp_path)})
    config.update_from_flattened_dict({"teachers_only": True})
    train.start(config, "test", recipes.read(config))
    ours, theirs = (kept(results) for results in (run.results, tmp_path))
    assert ours["0-2"] == theirs["0-2"] and ours["2-4"] != theirs["2-4"]
    epochs = [step.steps for step in plan.make(recipes.read(read_config("l1_ib", data_file, **QUICK | WINDOWS))).steps]
    assert epochs[:2] == [2 * (48 // 8)] * 2


def kept(results):
    """The SHA-256 of each kept teacher's variables by its classes."""
    folders = [path.parent for path in (results / "teachers").glob("*/key.json")]
    about = [json.loads((folder / "key.json").read_text())["key"]["teacher"]["classes"] for folder in folders]
    return {own: checkpoint.digest(folder / "checkpoint") for own, folder in zip(about, folders, strict=True)}


def test_it_is_the_same_teacher_whatever_stands_beside_it(run, data_file):
    """However its classes are named; a teacher of all classes keeps the place and the streams that it had."""
    at = {"results_dir": str(run.results), **QUICK}

    def places(**changes):
        named = {key.replace("_", "."): value for key, value in changes.items()}
        recipe = build.complete(recipes.read(read_config("l1_ib", data_file, **at, **named)), run.data)
        return [teacher_store.place(recipe, k, "") for k in (0, 1)]

    ours = [teacher_store.place(run.recipe, k, "") for k in (0, 1)]
    assert all(place.folder.exists() for place in ours)
    assert places(teacher1_classes="2,3,4", teacher2_classes="0-2") == ours[::-1]
    alone = places()
    assert places(teacher1_classes="0,1,2")[:1] == ours[:1]
    assert places(teacher1_classes="0,1,2")[1] == places(teacher2_classes="0-2")[0] == alone[0]
    assert alone[0].key["streams"] == "teacher/tiny_teacher" and "classes" not in alone[0].key["teacher"]
    assert places(teacher1_classes="0-2", teacher2_classes="0-2")[1].key["streams"].endswith("/classes 0-2/2")


def test_a_class_that_nobody_knows_is_told(data_file, tmp_path):
    config = read_config("l0_baseline", data_file, results_dir=str(tmp_path), **QUICK)
    config.update_from_flattened_dict({"teacher1.classes": "0-2", "teacher2.classes": "1,2"})
    folder = train.start(config, "test", recipes.read(config))
    assert "no teacher knows 3-4: labels alone teach these\n" in (folder / "log.txt").read_text()
    assert "\nno teacher knows 3-4: labels alone teach these\n" in (folder / "table.txt").read_text()
    metrics = json.loads((folder / "metrics.json").read_text())
    assert not any(key.startswith("skipped_steps") for key in metrics)
