"""How far teachers have memorised what they teach: what is measured, told, warned of, and made up for."""

import csv
import json
import logging
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from scipy.stats import entropy
from tiny_runs import read_config, read_recipe, tiny_networks, write_data

from asib_jax import build, evaluation, recipe as recipes, train
from asib_jax.engine.memorisation import answers, equal_temperature, mean_entropy
from asib_jax.errors import UserError
from asib_jax.record import finished
from asib_jax.record.experiment import Record
from asib_jax.weights import teacher_store

pytestmark = pytest.mark.usefixtures("quick_compilation")
GENERATOR = np.random.default_rng(5)
LOGITS = GENERATOR.normal(0, 2, (50, 7))


def test_answers_are_those_of_the_classes_that_a_teacher_knows():
    """Of six images one has a class that it does not know; one answer is wrong, one not finite."""
    known = np.array([False, True, True, False, True])
    logits = np.full((6, 5), -np.inf)
    logits[:, known] = [[3, 1, 0], [0, 1, 5], [0, 1, 0], [9, 0, 0], [np.nan, 9, 0], [0, 2, 7]]
    accuracy, own = answers(logits, np.array([1, 4, 2, 0, 2, 2]), known)
    assert accuracy == 3 / 5
    np.testing.assert_array_equal(own, [[3, 1, 0], [0, 1, 5], [0, 1, 0], [0, 2, 7]])
    accuracy, own = answers(logits, np.zeros(6, int), known)
    assert math.isnan(accuracy) and math.isnan(mean_entropy(own, 1.0))


@pytest.mark.parametrize("temperature", [0.02, 1.0, 30.0])
def test_entropy_is_that_of_the_distribution(temperature):
    scaled = np.exp((LOGITS - LOGITS.max(-1, keepdims=True)) / temperature)
    expected = entropy(scaled / scaled.sum(-1, keepdims=True), axis=-1).mean()
    np.testing.assert_allclose(mean_entropy(np.float32(LOGITS), temperature), expected, rtol=1e-5)


@pytest.mark.parametrize("factor", [0.05, 0.8, 1.0, 3.0, 40.0])
def test_logits_that_are_a_multiple_are_divided_by_it(factor):
    assert equal_temperature(LOGITS * factor, LOGITS) == pytest.approx(factor, rel=1e-9)


@pytest.mark.parametrize(
    "train, validation",
    [
        (np.zeros((5, 3)), LOGITS),  # at every temperature the same
        (LOGITS, LOGITS * 1e6),  # surer than at the lowest
        (LOGITS, np.zeros((5, 7))),  # more evenly spread than at the highest
        (LOGITS[:0], LOGITS),
    ],
)
def test_an_entropy_out_of_reach_has_no_temperature(train, validation):
    assert equal_temperature(train, validation) is None


# Of whole runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Runs of one B-epoch where half of the validation images are noise, so that teachers do worse there than on what
    they teach: by their names the folder, the recipe, what was recorded and what was told."""
    folder, runs, told = tmp_path_factory.mktemp("memorised"), {}, []
    handler, logger = logging.Handler(), logging.getLogger("asib_jax")
    handler.emit = told.append
    logger.addHandler(handler)
    logger.setLevel(logging.DEBUG)
    path = write_data(folder)
    rows = build.load_data(read_recipe("l0_baseline", path)).validation.index[::2]
    with np.load(path) as arrays:
        data = dict(arrays)
    data["x_train"][rows] = GENERATOR.integers(0, 256, (len(rows), 8, 8, 3), np.uint8)
    np.savez(path, **data)
    base = {f"teacher{k}.warmup_epochs": 0 for k in (1, 2)} | {"teacher1.train_lr": 0.05, "teacher2.train_lr": 0.002}
    base |= {"results_dir": str(folder), "tensorboard": False, "student_epochs_per_stage": (1,)}
    base |= {"teacher1.train_epochs": 10, "teacher1.temperature": 0.0, "teacher2.train_epochs": 1}

    def run(name, **changes):
        config = read_config("l0_baseline", path, **base | changes)
        recipe = recipes.read(config)
        record = Record.create(folder, "test", name, config.to_dict())
        told.clear()
        train.recorded(recipe, build.make_inputs(recipe), record)
        lines = [(line.levelname, line.getMessage()) for line in told]
        runs[name] = SimpleNamespace(folder=record.folder, recipe=recipe, metrics=record.metrics, lines=lines)

    with tiny_networks():
        run("first", **{"teacher2.temperature": 2.5, "dataset.train_subset": 60})
        kept = str(teacher_store.find(runs["first"].recipe, 0).folder / "checkpoint")
        given = {"teacher1.weights": kept, "teacher1.train_epochs": 0, "teacher2.temperature": 0.0}
        run("seen", **given | {"teacher1.saw_val": True, "teacher1.temperature": 3.0, "allow_teachers_at_chance": True})
        run("alone", teachers_only=True)
        yield runs
    logger.removeHandler(handler)


@pytest.fixture(params=["first", "seen", "alone"])
def run(whole, request):
    return whole[request.param]


def test_what_is_measured_is_what_the_networks_say(run):
    """Of every image that the student sees, as it is; entropies at the temperature of the first epoch, and found."""
    recipe, data = run.recipe, build.load_data(run.recipe)
    nets = build.build_networks(recipe, data.num_classes)
    variables = finished.load(run.folder, recipe, nets, data.image_shape).variables
    assert len(data.train.label) == (60 if run.recipe.dataset.train_subset else 80)
    for k, (name, model) in enumerate(zip(nets.teacher_names, nets.teachers)):
        found = {}
        for split, part in (("train", data.train), ("val", data.validation)):
            logits = np.float64(
                jax.jit(lambda x: model.apply(variables.of(name), x, train=False).logit)(np.asarray(part.image))
            )
            found[split] = logits
            assert run.metrics[f"{name}/{split}_acc"] == np.mean(logits.argmax(-1) == part.label)
        temperature, given = run.metrics[f"{name}/temperature"], recipe.teachers[k].temperature
        assert given in (0, temperature) and temperature > 0
        means = [probabilities_entropy(found["train"], temperature), probabilities_entropy(found["val"], 1)]
        assert given or means[0] == pytest.approx(means[1], rel=1e-4)
        for split, logits in found.items():
            expected = probabilities_entropy(logits, temperature * recipe.tau_schedule[0])
            assert run.metrics[f"{name}/{split}_entropy"] == pytest.approx(expected, rel=1e-4)
    assert run.metrics["teacher1/train_acc"] > 0.9 > 0.6 > run.metrics["teacher1/val_acc"]


def probabilities_entropy(logits, temperature):
    scaled = np.exp((logits - logits.max(-1, keepdims=True)) / temperature)
    return entropy(scaled / scaled.sum(-1, keepdims=True), axis=-1).mean()


def test_the_average_is_that_of_divided_logits(run):
    recipe, data = run.recipe, build.load_data(run.recipe)
    nets = build.build_networks(recipe, data.num_classes)
    variables = finished.load(run.folder, recipe, nets, data.image_shape).variables
    logits = [
        np.float64(model.apply(variables.of(name), np.asarray(data.test.image), train=False).logit)
        for name, model in zip(nets.teacher_names, nets.teachers)
    ]
    divided = [own / run.metrics[f"teacher{k}/temperature"] for k, own in enumerate(logits, 1)]
    assert run.metrics["final/test_acc_average"] == np.mean(sum(divided).argmax(-1) == data.test.label)
    for k, own in enumerate(logits, 1):
        assert run.metrics[f"final/test_acc_teacher{k}"] == np.mean(own.argmax(-1) == data.test.label)


def test_table_and_summary_tell_it(run):
    """From disk alike; of given weights that saw validation there is no gap."""
    lines = (run.folder / "table.txt").read_text().splitlines()
    own = [line for line in lines if "images that it teaches" in line]
    assert evaluation.evaluate_run(run.folder).splitlines()[-len(own) :] == own
    with open(run.folder.parent / "summary.csv") as file:
        (row,) = [row for row in csv.DictReader(file) if row["exp_id"] == run.folder.name]
    for k, line in enumerate(own, 1):
        told = {part: run.metrics[f"teacher{k}/{part}"] for part in finished.TOLD}
        wanted = f"teacher{k}: {100 * told['train_acc']:.1f} % of the images that it teaches, "
        assert line.startswith(wanted) and line.endswith(
            f"; its logits divided by {told['temperature']:.4g}" if told["temperature"] != 1 else " points"
        )
        gap = f" of validation: a gap of {100 * told['train_acc'] - 100 * told['val_acc']:.0f} points"
        assert (gap in line) == (not run.recipe.teachers[k - 1].weights)
        assert float(row[f"train_acc_teacher{k}"]) == told["train_acc"]
        assert float(row[f"temperature_teacher{k}"]) == told["temperature"]
        assert [float(row[f"{split}_entropy_teacher{k}"]) for split in ("train", "validation")] == [
            told["train_entropy"],
            told["val_entropy"],
        ]
    assert len(own) == 2 and ("validation images were seen, too" in own[0]) == bool(run.recipe.teachers[0].weights)


def test_a_warning_names_the_ways_out_where_a_student_learns_from_it(whole):
    warned = {
        name: [line for kind, line in run.lines if kind == "WARNING" and "memor" in line] for name, run in whole.items()
    }
    assert warned["alone"] == []
    (line,) = warned["first"]  # of the teacher of ten epochs; that of one has not come to it
    assert line.startswith("teacher1 is right on ") and "% of validation, a gap of " in line
    for way in ("fewer teacher1.train_epochs", "teacher_folds", "teacher_holdout"):
        assert way in line
    (line,) = warned["seen"]
    assert "teacher1.saw_val says that validation images were seen, too" in line and "few epochs, a larger tau" in line
    assert not any(way in line for way in ("a gap", "teacher_folds", "train_epochs"))
    assert whole["alone"].metrics["teacher1/train_acc"] > 0.9  # it is measured all the same


def test_a_lost_temperature_is_missed(whole):
    """Which the configuration leaves to be found."""
    path = whole["alone"].folder / "metrics.json"
    text = path.read_text()
    for damage in ({}, {"teacher1/temperature": "3"}):
        metrics = {name: value for name, value in json.loads(text).items() if name != "teacher1/temperature"} | damage
        path.write_text(json.dumps(metrics))
        with pytest.raises(UserError, match="metrics.json is damaged: .*temperature"):
            evaluation.evaluate_run(whole["alone"].folder)
    path.write_text(text)
