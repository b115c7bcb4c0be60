"""Teachers that get ready: trained once, kept, taken up again, fine-tuned; on networks of two convolutions."""
import json
import logging

import jax
import numpy as np
import pytest

from asib_jax import build, checkpoint, parallel, recipe as recipes, teacher_store, teachers
from asib_jax.evaluate import Evaluator
from asib_jax.experiment import Record
from asib_jax.models import MODELS
from asib_jax.models.ensemble import Networks, Variables
from asib_jax.reporting import Reporter
from configs import l1_ib
from networks import convolutions, make_split

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = {
    "dataset.name": "npz", "dataset.batch_size": 8, "dataset.data_aug": 0, "dataset.val_fraction": 0.2,
    "dataset.train_subset": 0, "model.student.name": "tiny", "num_devices": 1,
    "teacher1.name": "tiny", "teacher1.train_epochs": 3, "teacher1.warmup_epochs": 0, "teacher1.train_lr": 0.01,
    "teacher2.name": "tiny", "teacher2.train_epochs": 3, "teacher2.warmup_epochs": 0, "teacher2.train_lr": 0.01,
}


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", lambda small_input: convolutions(6, 8))
        patch.setitem(MODELS, "other", lambda small_input: convolutions(6, 8))
        yield


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "colours.npz"
    training, test = make_split(100), make_split(20, seed=1)
    np.savez(path, x_train=training.image, y_train=training.label, x_test=test.image, y_test=test.label)
    return str(path)


def ready(data_file, results, data=None, **changes):
    """Make the teachers of a recipe ready: their variables, and the metrics of the run that did."""
    config = l1_ib.get_config("digits")
    config.update_from_flattened_dict({**TINY, "dataset.path": data_file, "results_dir": str(results), **changes})
    recipe, devices = recipes.read(config), parallel.local_devices(1)
    data = data or build.load_data(recipe)
    nets = build.build_networks(recipe, data.num_classes, devices)
    record = Record.create(results, "test", "", {"seed": 0})
    with Reporter(record.folder, tensorboard=False, wandb="", config={}) as reporter:
        variables = teachers.ready(recipe, nets, data, devices, record, reporter)
    return variables, record.metrics, (recipe, nets, data)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def first(data_file, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    return results, *ready(data_file, results)


def trained(metrics):
    return {key.split("/")[0] for key in metrics if "/epoch" in key}


def test_the_best_epoch_on_validation_is_kept(first):
    """And what the store's key.json says of it was measured."""
    results, variables, metrics, (recipe, nets, data) = first
    assert trained(metrics) == {"teacher1", "teacher2"}
    evaluator = Evaluator(Networks(nets.teachers[0].clone(adapter_dim=0)), Variables({}, {}), data.validation,
                          name="validation", batch_size=8, devices=parallel.local_devices(1))
    measured = [metrics[f"teacher1/epoch{epoch:02d}/val_acc"] for epoch in (1, 2, 3)]
    accuracy = evaluator.accuracies(Variables({"student": variables.params["teacher1"]},
                                              {"student": variables.batch_stats["teacher1"]}))["student"]
    assert accuracy == max(measured) > min(measured)
    key = json.loads((teacher_store.folder(recipe, 0) / "key.json").read_text())
    assert key["measured"] == {"validation_accuracy": accuracy, "epoch": measured.index(accuracy) + 1}
    assert key["teacher"]["train_lr"] == 0.01 and "finetune_lr" not in key["teacher"]
    assert not same(variables.params["teacher1"], variables.params["teacher2"])  # two of a kind are two teachers


def test_a_second_run_takes_them_up_and_says_so(first, data_file, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    results, variables, _, (recipe, _, _) = first
    with caplog.at_level("INFO", logger="asib_jax"):
        again, metrics, _ = ready(data_file, results)
    assert trained(metrics) == set() and same(again, variables)
    assert f"teacher1: tiny, trained by an earlier run, from {teacher_store.folder(recipe, 0)}" in caplog.text
    # what acts only later, and the student's side of the run, changes no teacher
    _, metrics, _ = ready(data_file, results, **{"teacher1.saw_val": False, "kd_alpha": 0.1, "dataset.train_subset": 40})
    assert trained(metrics) == set()


@pytest.mark.parametrize("changes, anew", [
    ({"teacher2.train_lr": 0.02}, {"teacher2"}), ({"teacher1.label_smoothing": 0.1}, {"teacher1"}),
    ({"seed": 1}, {"teacher1", "teacher2"}), ({"dataset.val_fraction": 0.3}, {"teacher1", "teacher2"}),
    ({"use_amp": True}, {"teacher1", "teacher2"}), ({"teacher1.std": (0.5,)}, {"teacher1"}),
])
def test_a_changed_recipe_is_another_teacher(first, data_file, changes, anew):
    """Compared by the folders alone: what has none yet is trained."""
    results, _, _, (recipe, _, _) = first
    config = l1_ib.get_config("digits")
    config.update_from_flattened_dict({**TINY, "dataset.path": data_file, "results_dir": str(results), **changes})
    changed = recipes.read(config)
    folders = {k: teacher_store.folder(changed, k) for k in (0, 1)}
    assert {f"teacher{k + 1}" for k, folder in folders.items() if not folder.exists()} == anew


def test_a_teacher_is_the_same_in_another_place(first, data_file):
    """As teacher2, after one of another name."""
    results, variables, _, _ = first
    again, metrics, _ = ready(data_file, results, **{"teacher1.name": "other", "teacher1.train_epochs": 1})
    assert trained(metrics) == {"teacher1"}
    assert same(again.params["teacher2"], variables.params["teacher1"])


def test_other_images_under_the_same_name_are_refused(first, data_file):
    results, _, _, (_, _, data) = first
    other = data._replace(teacher_train=data.teacher_train._replace(image=255 - data.teacher_train.image))
    with pytest.raises(ValueError, match="was trained on other images of the same dataset.name"):
        ready(data_file, results, other)


def test_no_teacher_learns_from_validation(first, data_file, tmp_path):
    """Other validation images, the same teacher after an epoch."""
    _, _, _, (_, _, data) = first
    other = data._replace(validation=data.validation._replace(image=255 - data.validation.image))
    once = {"teacher1.train_epochs": 1, "teacher2.train_epochs": 1}
    assert same(ready(data_file, tmp_path / "a", data, **once)[0], ready(data_file, tmp_path / "b", other, **once)[0])


def test_training_stops_early(data_file, tmp_path):
    """The first epoch is better than none; nothing is better by 1 afterwards."""
    _, metrics, _ = ready(data_file, tmp_path, **{
        "teacher1.train_epochs": 9, "teacher1.early_stopping_patience": 2, "teacher1.early_stopping_min_delta": 1.0,
        "teacher2.train_epochs": 1})
    assert len([key for key in metrics if key.startswith("teacher1/epoch") and key.endswith("val_acc")]) == 3


@pytest.fixture(scope="module")
def given(first, tmp_path_factory):
    """Checkpoints to start from: the first run's teacher1, as it is and with seven classes."""
    _, variables, _, (recipe, _, _) = first
    own = teacher_store.folder(recipe, 0) / "checkpoint"
    stored = checkpoint.restore(own)
    stored["params"]["classifier"] = {"kernel": np.ones((8, 7), np.float32), "bias": np.ones(7, np.float32)}
    other = tmp_path_factory.mktemp("given") / "seven"
    checkpoint.save(other, stored)
    return str(own), str(other)


def test_weights_of_our_own_are_used_as_they_are(first, given, data_file, tmp_path):
    _, variables, _, _ = first
    ours, metrics, _ = ready(data_file, tmp_path, **{"teacher1.weights": given[0], "teacher1.train_epochs": 0,
                                                     "teacher2.train_epochs": 1})
    assert trained(metrics) == {"teacher2"}
    assert same(ours.params["teacher1"], variables.params["teacher1"])
    assert same(ours.batch_stats["teacher1"], variables.batch_stats["teacher1"])


def test_other_classes_need_fine_tuning(given, data_file, tmp_path):
    weights = {"teacher1.weights": given[1], "teacher1.train_epochs": 0, "teacher2.train_epochs": 1}
    with pytest.raises(ValueError, match=r"(?s)fit tiny only in part: .*classifier.* set teacher1\.finetune_epochs"):
        ready(data_file, tmp_path, **weights)
    frozen = {"teacher1.finetune_epochs": 1, "teacher1.finetune_freeze_level": 0}
    ours, metrics, (recipe, _, _) = ready(data_file, tmp_path, **weights, **frozen)
    assert trained(metrics) == {"teacher1", "teacher2"}
    stored = checkpoint.restore(given[1])
    for stage in ("stage0", "stage1"):  # at level 0 only the classifier trains
        assert same(ours.params["teacher1"][stage], stored["params"][stage])
        assert same(ours.batch_stats["teacher1"][stage], stored["batch_stats"][stage])
    initial = build.init_network(build.build_networks(recipe, 5, parallel.local_devices(1)).teachers[0], recipe.seed,
                                 teacher_store.streams_name(recipe, 0), (8, 8, 3))
    assert ours.params["teacher1"]["classifier"]["kernel"].shape == (8, 5)
    assert not same(ours.params["teacher1"]["classifier"], initial["params"]["classifier"])
    assert "weights" in json.loads((teacher_store.folder(recipe, 0) / "key.json").read_text())["teacher"]
