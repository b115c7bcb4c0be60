"""Teachers that get ready: trained once, kept, taken up again, fine-tuned; on networks of two convolutions."""

import dataclasses
import fcntl
import json
import logging
import shutil
import zlib

import jax
import numpy as np
import pytest
from disk import longest_file
from networks import convolutions, make_feed, make_split

from asib_jax import build, evaluation, recipe as recipes, runner, teachers, train
from asib_jax.context import Context
from asib_jax.engine.evaluate import Evaluator
from asib_jax.engine.progress import Progress
from asib_jax.errors import UserError
from asib_jax.models import MODELS
from asib_jax.models.ensemble import Networks, init_network
from asib_jax.recipe import checks
from asib_jax.record.experiment import Record
from asib_jax.record.reporting import Reporter
from asib_jax.record.snapshots import Snapshots
from asib_jax.weights import checkpoint, teacher_store
from asib_jax.weights.torch_names import export_weights
from configs import l1_ib

pytestmark = pytest.mark.usefixtures("quick_compilation")
TINY = {
    "dataset.name": "npz",
    "dataset.batch_size": 8,
    "dataset.data_aug": 0,
    "dataset.val_fraction": 0.2,
    "dataset.train_subset": 0,
    "model.student.name": "tiny",
    "num_devices": 1,
    "teacher1.name": "tiny",
    "teacher1.train_epochs": 3,
    "teacher1.warmup_epochs": 0,
    "teacher1.train_lr": 0.01,
    "teacher2.name": "tiny",
    "teacher2.train_epochs": 3,
    "teacher2.warmup_epochs": 0,
    "teacher2.train_lr": 0.01,
}

PLAIN = convolutions(6, 8)
NAMED = PLAIN._replace(names=(((r"(.*)", r"\1"),),))  # with names under which weights are files


@pytest.fixture(scope="module", autouse=True)
def tiny_network():
    with pytest.MonkeyPatch.context() as patch:
        for name, network in {"tiny": PLAIN, "other": PLAIN, "named": NAMED}.items():
            patch.setitem(MODELS, name, lambda small_input, network=network: network)
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
    recipe = recipes.read(config)
    data = data or build.load_data(recipe)
    nets = build.build_networks(recipe, data.num_classes)
    record = Record.create(results, "test", "", {"seed": 0})
    with Reporter(record.folder, tensorboard=False, wandb="", config={}) as reporter:
        context = Context(recipe, data, nets, make_feed(), record, reporter, Snapshots(record))
        variables, places, todo = teachers.collect(recipe, nets, data, record, context.snapshots)
        for name in todo:
            phase = teachers.phase(
                recipe, nets, name, variables.params, len(data.teacher_train.label), place=places[name]
            )
            variables = runner.run_phase(context, phase, variables, Progress())
    return variables, record.metrics, (recipe, nets, data)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


@pytest.fixture(scope="module")
def first(data_file, tmp_path_factory):
    results = tmp_path_factory.mktemp("results")
    return results, *ready(data_file, results)


def trained(metrics):
    return {name for name in ("teacher1", "teacher2") if f"{name}/epoch01/val_{name}" in metrics}


def test_the_best_epoch_on_validation_is_kept(first):
    """And what the store's key.json says of it was measured."""
    results, variables, metrics, (recipe, nets, data) = first
    assert trained(metrics) == {"teacher1", "teacher2"}
    alone = Networks(nets.teachers[0].clone(adapter_dim=0))
    evaluator = Evaluator(alone, data.validation, make_feed(eval_batch=8), "validation")
    measured = [metrics[f"teacher1/epoch{epoch:02d}/val_teacher1"] for epoch in (1, 2, 3)]
    accuracy = evaluator.accuracies(alone, variables, "teacher1")["teacher1"]
    assert accuracy == max(measured) > min(measured)
    kept = json.loads((teacher_store.find(recipe, 0).folder / "key.json").read_text())
    assert kept["measured"] == {
        "validation_accuracy": accuracy,
        "when": f"teacher1, epoch {measured.index(accuracy) + 1}",
    }
    assert kept["key"]["teacher"]["train_lr"] == 0.01 and "finetune_lr" not in kept["key"]["teacher"]
    assert kept["reference"] == ""
    assert not same(variables.params["teacher1"], variables.params["teacher2"])  # two of a kind are two teachers


def test_a_second_run_takes_them_up_and_says_so(first, data_file, caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    results, variables, _, (recipe, _, _) = first
    with caplog.at_level("INFO", logger="asib_jax"):
        again, metrics, _ = ready(data_file, results)
    assert trained(metrics) == set() and same(again, variables)
    assert f"teacher1: tiny, trained by an earlier run, from {teacher_store.find(recipe, 0).folder}" in caplog.text
    # what acts only later, and the student's side of the run, changes no teacher
    later = {"teacher1.freeze_level": (0,), "kd_alpha": 0.1, "dataset.train_subset": 40}
    _, metrics, _ = ready(data_file, results, **later)
    assert trained(metrics) == set()


@pytest.mark.parametrize(
    "changes, anew",
    [
        ({"teacher2.train_lr": 0.02}, {"teacher2"}),
        ({"teacher1.label_smoothing": 0.1}, {"teacher1"}),
        ({"seed": 1}, {"teacher1", "teacher2"}),
        ({"dataset.val_fraction": 0.3}, {"teacher1", "teacher2"}),
        ({"use_amp": True}, {"teacher1", "teacher2"}),
        ({"teacher1.std": (0.5,)}, {"teacher1"}),
        ({"dataset.small_input": False}, {"teacher1", "teacher2"}),
        ({"dataset.image_size": 16}, {"teacher1", "teacher2"}),
        ({"dataset.image_size": 0}, set()),
        ({"teacher1.train_epochs": 2}, {"teacher1"}),
        ({"teacher1.temperature": 0.0, "teacher2.temperature": 4.0}, set()),
        ({"schedule.min_lr": 1e-6}, {"teacher1", "teacher2"}),
        # what has no effect makes no other teacher
        ({"schedule.milestones": (3,), "teacher1.finetune_lr": 1.0, "teacher2.finetune_cutmix_alpha": 0.5}, set()),
        (
            {
                "teacher1.early_stopping_min_delta": 0.1,
                "schedule.lr_warmup_epochs": 0,
                "use_partial_freeze": True,
                "compilation_cache": "elsewhere",
            },
            set(),
        ),
    ],
)
def test_a_changed_recipe_is_another_teacher(first, data_file, changes, anew):
    """Compared by the folders alone: what has none yet is trained."""
    results, _, _, (recipe, _, _) = first
    config = l1_ib.get_config("digits")
    config.update_from_flattened_dict({**TINY, "dataset.path": data_file, "results_dir": str(results), **changes})
    changed = recipes.read(config)
    folders = {k: teacher_store.find(changed, k).folder for k in (0, 1)}
    assert {f"teacher{k + 1}" for k, folder in folders.items() if not folder.exists()} == anew


def test_teachers_of_several_lengths_stand_side_by_side(data_file, tmp_path):
    """Each with a whole schedule of its own, which ends at its last step: cosine from the first of 10 an epoch (SPEC
    3). Both are taken up again."""
    both = {}
    for epochs in (2, 6):
        length = {"teacher1.train_epochs": epochs, "teacher1.early_stopping_patience": 0, "teacher2.train_epochs": 1}
        variables, metrics, (recipe, _, _) = ready(data_file, tmp_path, **length)
        assert trained(metrics) == ({"teacher1", "teacher2"} if epochs == 2 else {"teacher1"})
        low = recipe.schedule.min_lr
        for epoch in range(1, epochs + 1):  # the rate of its last step
            share = (10 * epoch - 1) / (10 * epochs)
            wanted = low + (0.01 - low) * (1 + np.cos(np.pi * share)) / 2
            np.testing.assert_allclose(metrics[f"teacher1/epoch{epoch:02d}/lr"], wanted, rtol=1e-5)
        both[epochs] = length, variables, teacher_store.find(recipe, 0).folder
    for length, variables, folder in both.values():
        again, metrics, _ = ready(data_file, tmp_path, **length)
        assert trained(metrics) == set() and same(again, variables) and folder.exists()
    assert both[2][2] != both[6][2] and not same(both[2][1], both[6][1])


def test_a_teacher_is_the_same_in_another_place(first, data_file):
    """As teacher2, after one of another name."""
    results, variables, _, _ = first
    again, metrics, _ = ready(data_file, results, **{"teacher1.name": "other", "teacher1.train_epochs": 1})
    assert trained(metrics) == {"teacher1"}
    assert same(again.params["teacher2"], variables.params["teacher1"])


def test_other_images_under_the_same_name_are_refused(first, data_file):
    results, _, _, (_, _, data) = first
    other = data._replace(teacher_train=data.teacher_train._replace(image=255 - np.asarray(data.teacher_train.image)))
    with pytest.raises(ValueError, match="was trained on other images of the same dataset.name"):
        ready(data_file, results, other)


def test_no_teacher_learns_from_validation(first, data_file, tmp_path):
    """Other validation images, the same teacher after an epoch."""
    _, _, _, (_, _, data) = first
    other = data._replace(validation=data.validation._replace(image=255 - np.asarray(data.validation.image)))
    once = {"teacher1.train_epochs": 1, "teacher2.train_epochs": 1}
    assert same(ready(data_file, tmp_path / "a", data, **once)[0], ready(data_file, tmp_path / "b", other, **once)[0])


def test_its_random_streams_are_those_of_its_network_and_the_epoch(first):
    """Whichever teacher it is; the second of a kind has others."""
    _, variables, _, (recipe, nets, _) = first
    seen = []
    for name, stream in (("teacher1", "teacher/tiny"), ("teacher2", "teacher/tiny/2")):
        phase = teachers.phase(recipe, nets, name, variables.params, 80)
        for epoch in range(phase.epochs):
            for draw in ("augment", "mix", "dropout"):
                key = jax.random.fold_in(jax.random.key(0), zlib.crc32(f"{draw}/{stream}".encode()))
                assert phase.controls(Progress(), epoch)[f"{draw}_key"] == jax.random.fold_in(key, epoch), draw
            order = np.random.default_rng([0, zlib.crc32(f"order/{stream}".encode()), epoch]).permutation(80)
            np.testing.assert_array_equal(phase.order(epoch).permutation(80), order)
            seen.append(tuple(order))
    assert len(set(seen)) == 6


def test_training_stops_early(data_file, tmp_path):
    """The first epoch is better than none; nothing is better by 1 afterwards."""
    _, metrics, _ = ready(
        data_file,
        tmp_path,
        **{
            "teacher1.train_epochs": 9,
            "teacher1.early_stopping_patience": 2,
            "teacher1.early_stopping_min_delta": 1.0,
            "teacher2.train_epochs": 1,
        },
    )
    assert len([key for key in metrics if key.startswith("teacher1/epoch") and key.endswith("val_teacher1")]) == 3


@pytest.fixture(scope="module")
def given(first, tmp_path_factory):
    """Checkpoints to start from: the first run's teacher1, as it is and with seven classes."""
    _, variables, _, (recipe, _, _) = first
    own = teacher_store.find(recipe, 0).folder / "checkpoint"
    stored = checkpoint.restore(own)
    stored["params"]["classifier"] = {"kernel": np.ones((8, 7), np.float32), "bias": np.ones(7, np.float32)}
    other = tmp_path_factory.mktemp("given") / "seven"
    checkpoint.save(other, stored)
    return str(own), str(other)


def test_weights_of_our_own_are_used_as_they_are(first, given, data_file, tmp_path):
    _, variables, _, _ = first
    ours, metrics, _ = ready(
        data_file, tmp_path, **{"teacher1.weights": given[0], "teacher1.train_epochs": 0, "teacher2.train_epochs": 1}
    )
    assert trained(metrics) == {"teacher2"}
    assert same(ours.params["teacher1"], variables.params["teacher1"])
    assert same(ours.batch_stats["teacher1"], variables.batch_stats["teacher1"])


def in_a_row(classifier):
    """Every class takes the next one's place."""
    return {name: np.roll(leaf, 1, axis=-1) for name, leaf in classifier.items()}


def not_a_number(classifier):
    return {**classifier, "bias": np.full_like(classifier["bias"], np.nan)}


AT_CHANCE = r"teacher1 \(tiny, teacher1.weights='given'\) is right on {} of 20 validation images, .* chance, 20 %: .*"
CASES = [  # what becomes of teacher1's classifier, whether it is of given weights, what is told
    (lambda classifier: classifier, True, False, None),
    (in_a_row, True, False, AT_CHANCE.format("[0-4]")),
    (in_a_row, True, True, None),
    (in_a_row, False, False, None),
    (not_a_number, True, False, AT_CHANCE.format("0")),
]


@pytest.mark.parametrize("change, weights, allowed, refused", CASES)
def test_given_weights_have_to_be_above_chance(first, tmp_path, caplog, monkeypatch, change, weights, allowed, refused):
    """A teacher of 20 of 20 images; shifted by a class it is at chance, which is allowed by a key, or of one that was
    trained here. Two of the same outputs and logits that are not finite are told."""
    monkeypatch.setattr(logging.getLogger("asib_jax"), "propagate", True)
    _, variables, _, (recipe, nets, data) = first
    own = variables.of("teacher1")
    changed = {**own["params"], "classifier": change(own["params"]["classifier"])}
    variables = variables._replace(
        params={**variables.params, "teacher1": changed, "teacher2": own["params"]},
        batch_stats={**variables.batch_stats, "teacher2": own["batch_stats"]},
    )
    given = dataclasses.replace(recipe.teachers[0], weights="given" if weights else "")
    recipe = dataclasses.replace(recipe, teachers=(given, recipe.teachers[1]), allow_teachers_at_chance=allowed)
    context = Context(recipe, data, nets, make_feed(), None, None, None)
    context.validation.read_teachers(variables)
    if refused:
        with pytest.raises(UserError, match=f"{refused}teacher1.finetune_epochs.*allow_teachers_at_chance=True"):
            teachers.check(context)
    else:
        teachers.check(context)
    told = [record.message for record in caplog.records if record.levelname == "WARNING"]
    if change is not_a_number:
        assert told == ["teacher1: logits that are not finite on 20 of 20 validation images"]
    else:
        assert [line.split(" of every")[0] for line in told] == (
            [] if change is in_a_row else ["teacher1 and teacher2 say the same"]
        )


def test_other_classes_need_fine_tuning(given, data_file, tmp_path):
    weights = {"teacher1.weights": given[1], "teacher1.train_epochs": 0, "teacher2.train_epochs": 1}
    with pytest.raises(ValueError, match=r"fit tiny only in part; .*classifier.* Set teacher1\.finetune_epochs"):
        ready(data_file, tmp_path, **weights)
    frozen = {"teacher1.finetune_epochs": 1, "teacher1.finetune_freeze_level": 0}
    ours, metrics, (recipe, _, _) = ready(data_file, tmp_path, **weights, **frozen)
    assert trained(metrics) == {"teacher1", "teacher2"}
    stored = checkpoint.restore(given[1])
    for stage in ("stage0", "stage1"):  # at level 0 only the classifier trains
        assert same(ours.params["teacher1"][stage], stored["params"][stage])
        assert same(ours.batch_stats["teacher1"][stage], stored["batch_stats"][stage])
    initial = init_network(
        build.build_networks(recipe, 5).teachers[0], recipe.seed, teacher_store.streams_name(recipe, 0), (8, 8, 3)
    )
    assert ours.params["teacher1"]["classifier"]["kernel"].shape == (8, 5)
    assert not same(ours.params["teacher1"]["classifier"], initial["params"]["classifier"])
    kept = json.loads((teacher_store.find(recipe, 0).folder / "key.json").read_text())
    assert kept["key"]["teacher"]["weights"] == f"sha256:{checkpoint.digest(given[1])}"
    assert kept["reference"] == given[1]
    assert metrics["weights/teacher1"] == checkpoint.digest(given[1])


def test_weights_of_other_content_are_another_teacher(given, data_file, tmp_path):
    """The same path, the same recipe, one more parameter changed in the file."""
    config = l1_ib.get_config("digits")
    config.update_from_flattened_dict(
        {
            **TINY,
            "dataset.path": data_file,
            "results_dir": str(tmp_path),
            "teacher1.weights": str(tmp_path / "w.npz"),
            "teacher1.train_epochs": 0,
            "teacher1.finetune_epochs": 2,
        }
    )
    folders = set()
    for value in (1.0, 2.0, 1.0):
        np.savez(tmp_path / "w.npz", weight=np.float32(value))
        folders.add(teacher_store.find(recipes.read(config), 0).folder)
    assert len(folders) == 2


def test_a_kept_teacher_needs_no_download(first, data_file, tmp_path):
    """One kept from weights of the hub is found by their reference where they are not in the cache; two are not."""
    results, variables, _, (recipe, _, data) = first
    config = l1_ib.get_config("digits")
    config.update_from_flattened_dict(
        {
            **TINY,
            "dataset.path": data_file,
            "results_dir": str(tmp_path),
            "teacher1.weights": "hf:nobody/nothing",
            "teacher1.train_epochs": 0,
            "teacher1.finetune_epochs": 1,
            "teacher2.train_epochs": 1,
        }
    )
    settings = recipes.read(config)
    assert teacher_store.find(settings, 0) is None
    kept = {"params": variables.params["teacher1"], "batch_stats": variables.batch_stats["teacher1"]}
    place = teacher_store.place(settings, 0, "a" * 64)
    teacher_store.save(place, "hf:nobody/nothing", kept, data.teacher_train, {})
    assert teacher_store.find(settings, 0) == place
    for digest, found in (("a" * 64, place), ("A" * 64, place), ("c" * 64, None)):  # of other weights it is none
        given = dataclasses.replace(settings.teachers[0], weights_sha256=digest)
        assert teacher_store.find(dataclasses.replace(settings, teachers=(given, *settings.teachers[1:])), 0) == found
    ours, metrics, _ = ready(
        data_file,
        tmp_path,
        **{
            "teacher1.weights": "hf:nobody/nothing",
            "teacher1.train_epochs": 0,
            "teacher1.finetune_epochs": 1,
            "teacher2.train_epochs": 1,
        },
    )
    assert trained(metrics) == {"teacher2"} and same(ours.params["teacher1"]["stage0"], kept["params"]["stage0"])
    teacher_store.save(teacher_store.place(settings, 0, "b" * 64), "hf:nobody/nothing", kept, data.teacher_train, {})
    assert teacher_store.find(settings, 0) is None


def test_a_damaged_store_is_refused(first, tmp_path):
    """What is not whole, and what is another network; and nothing that was trained is thrown away."""
    results, variables, _, (recipe, nets, data) = first
    kept = {"params": variables.params["teacher1"], "batch_stats": variables.batch_stats["teacher1"]}
    place = teacher_store.find(recipe, 0)._replace(folder=tmp_path / "teacher")
    (place.folder / "checkpoint").mkdir(parents=True)
    with pytest.raises(ValueError, match="is not whole: move it away"):
        teacher_store.load(place, data.teacher_train)
    (place.folder / "key.json").write_text('{"key": ')
    with pytest.raises(ValueError, match="is not whole: move it away"):
        teacher_store.load(place, data.teacher_train)
    assert not teacher_store.is_whole(place.folder)
    with pytest.raises(OSError, match="the trained teacher lies in") as error:
        teacher_store.save(place, "", kept, data.teacher_train, {})
    part = str(error.value).split("lies in ")[1].split(":")[0]
    assert same(checkpoint.restore(f"{part}/checkpoint")["params"]["stage0"], kept["params"]["stage0"])


def test_a_broken_teacher_is_refused(first, data_file, tmp_path):
    """Kept with variances below 0, of which its digest knows nothing; the folder is named."""
    _, variables, _, (recipe, _, data) = first
    below = jax.tree.map(lambda leaf: leaf - 100, variables.batch_stats["teacher1"])
    place = teacher_store.place(dataclasses.replace(recipe, results_dir=str(tmp_path)), 0, "")
    kept = {"params": variables.params["teacher1"], "batch_stats": below}
    teacher_store.save(place, "", kept, data.teacher_train, {})
    with pytest.raises(UserError, match=f"^the teacher in {place.folder}: the weights are broken\n.*\n.*variance of -"):
        ready(data_file, tmp_path, data)


def test_half_a_teacher_that_a_dead_process_left_goes_with_the_next_that_is_kept(first, tmp_path):
    """Unless somebody else is writing, whose it may be. A whole one that could not be moved to its place stays."""
    _, variables, _, (recipe, _, data) = first
    store, kept = tmp_path / "teachers", {"params": variables.params["teacher1"], "batch_stats": {}}

    def keep(name):
        assert teacher_store.save(teacher_store.find(recipe, 0)._replace(folder=store / name), "", kept, data.train, {})
        return sorted(path.name for path in store.iterdir())

    keep("a")
    shutil.copytree(store / "a", store / ".a.whole")
    shutil.copytree(store / "a", store / ".a.half")
    (store / ".a.half" / "key.json").unlink()
    (store / ".b.begun").mkdir()
    with open(tmp_path / ".teachers.lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_SH)  # as another process has it that writes
        assert keep("b") == [".a.half", ".a.whole", ".b.begun", "a", "b"]
    assert keep("c") == [".a.whole", "a", "b", "c"]


def test_a_teacher_that_a_disk_does_not_take_leaves_nothing(first, tmp_path):
    _, variables, _, (recipe, _, data) = first
    kept = {"params": variables.params["teacher1"], "batch_stats": {}}
    with longest_file(100), pytest.raises(OSError, match="File too large"):
        teacher_store.save(teacher_store.place(recipe, 0, "")._replace(folder=tmp_path / "t"), "", kept, data.train, {})
    assert not list(tmp_path.iterdir())


def test_the_first_of_two_that_end_together_stays(first, tmp_path):
    _, variables, _, (recipe, _, data) = first
    place = teacher_store.find(recipe, 0)._replace(folder=tmp_path / "teacher")
    for name, is_kept in (("teacher1", True), ("teacher1", True), ("teacher2", False)):
        kept = {"params": variables.params[name], "batch_stats": variables.batch_stats[name]}
        assert teacher_store.save(place, "", kept, data.teacher_train, {}) == is_kept
    stays = teacher_store.load(place, data.teacher_train)
    assert same(stays["params"]["stage0"], variables.params["teacher1"]["stage0"])
    assert [path.name for path in tmp_path.iterdir()] == ["teacher"]


def test_a_run_goes_on_with_the_teacher_that_another_left_meanwhile(first, data_file, tmp_path, monkeypatch):
    """Which it would find if it were interrupted, too."""
    _, variables, _, (_, _, data) = first
    save = teacher_store.save

    def beaten(place, reference, own, train, measured):
        if "tiny" in place.folder.name and not place.folder.exists():
            other = jax.tree.map(lambda leaf: leaf + 1, {part: own[part] for part in ("params", "batch_stats")})
            assert save(place, reference, other, train, measured)
        return save(place, reference, own, train, measured)

    monkeypatch.setattr(teacher_store, "save", beaten)
    ours, metrics, _ = ready(data_file, tmp_path)
    for name in ("teacher1", "teacher2"):
        (kept,) = [
            checkpoint.restore(folder / "checkpoint")
            for folder in (tmp_path / "teachers").iterdir()
            if checkpoint.digest(folder / "checkpoint") == metrics[f"kept/{name}"]
        ]
        assert same(ours.params[name]["classifier"], kept["params"]["classifier"])
        shifted = jax.tree.map(lambda leaf: leaf + 1, variables.params[name]["classifier"])
        assert same(kept["params"]["classifier"], shifted)


@pytest.mark.parametrize(
    "changes, field, value",
    [
        ({"finetune_use_cutmix": True, "finetune_cutmix_alpha": 0.7}, "cutmix_alpha", 0.7),
        ({"finetune_use_cutmix": False, "finetune_cutmix_alpha": 0.7}, "cutmix_alpha", 0.0),
        ({"label_smoothing": 0.2}, "label_smoothing", 0.2),
    ],
)
def test_the_recipe_reaches_the_loss(first, changes, field, value):
    _, variables, _, (recipe, nets, _) = first
    options = dataclasses.replace(recipe.teachers[0], **changes)
    recipe = dataclasses.replace(recipe, teachers=(options, recipe.teachers[1]))
    training = teachers.make_training(recipe, nets, 0, variables.params)
    assert getattr(training.loss.keywords["terms"], field) == value


def test_the_recipe_reaches_the_optimizer(given, data_file, tmp_path):
    """Fine-tuning at its own rate, after its own warm-up; float16 scales its loss."""
    _, metrics, _ = ready(
        data_file,
        tmp_path,
        **{
            "teacher1.weights": given[0],
            "teacher1.train_epochs": 0,
            "teacher1.finetune_epochs": 2,
            "teacher1.finetune_lr": 0.003,
            "teacher1.warmup_epochs": 1,
            "use_amp": True,
            "amp_dtype": "float16",
            "teacher2.train_epochs": 1,
            "teacher2.train_lr": 0.02,
        },
    )
    steps = 10  # of an epoch: 80 images in batches of 8; the cosine is at its top when the warm-up ends
    assert metrics["teacher1/epoch01/lr"] == pytest.approx(0.003)
    assert metrics["teacher1/epoch02/lr"] < 0.003 * np.cos(np.pi / 4 * (steps - 2) / steps) ** 2
    assert "teacher1/epoch01/skipped" in metrics and "teacher2/epoch01/skipped" in metrics


def test_a_run_of_teachers_alone(data_file, tmp_path):
    """No student, no row for an average of one; the same table again from disk, also where the teacher was kept, but
    not for other data."""
    own = shutil.copy(data_file, tmp_path / "own.npz")
    config = l1_ib.get_config("digits")
    with config.unlocked():
        del config.teacher2
    config.update_from_flattened_dict(
        {
            **{key: value for key, value in TINY.items() if not key.startswith("teacher2")},
            "teachers_only": True,
            "dataset.path": str(own),
            "results_dir": str(tmp_path),
            "tensorboard": False,
        }
    )
    tables = []
    for exp_id in ("first", "second"):
        config.exp_id = exp_id
        recipe = recipes.read(config)
        checks.check(recipe)
        record = Record.create(tmp_path, "alone", exp_id, config.to_dict())
        train.recorded(recipe, build.make_inputs(recipe), record)
        memory = ("train_acc", "train_entropy", "validation_entropy", "temperature")
        assert {key for key in record.metrics if key.startswith("final/")} == {
            f"final/{split}_{what}" for split in ("test", "validation") for what in ("acc_teacher1", "count")
        } | {f"final/{what}_teacher1" for what in memory}
        assert (exp_id == "first") == any("/epoch" in key for key in record.metrics)
        tables.append(evaluation.evaluate_run(record.folder))
    assert tables[0] == tables[1] and "teacher1 (tiny)" in tables[0] and "distilled" not in tables[0]
    rows = (tmp_path / "summary.csv").read_text().splitlines()
    assert len(rows) == 3 and "test_acc_teacher1" in rows[0] and "synergy" not in rows[0]
    arrays = dict(np.load(own))
    np.savez(own, **arrays | {"y_test": np.roll(arrays["y_test"], 1)})
    with pytest.raises(UserError, match="own.npz is not the data of the run in .*another SHA-256 of test, or none"):
        evaluation.evaluate_run(record.folder)


def test_published_classes_in_another_order_need_fine_tuning(first, data_file, tmp_path):
    """The same weights under PyTorch's names are refused as they are, and fine-tuned from a classifier drawn here."""
    _, variables, _, (_, _, data) = first
    np.savez(tmp_path / "published.npz", **export_weights(variables.of("teacher1"), NAMED))
    changes = {
        "dataset.name": "imagenet32",
        "teacher1.name": "named",
        "teacher2.train_epochs": 1,
        "teacher1.weights": str(tmp_path / "published.npz"),
        "teacher1.train_epochs": 0,
    }
    with pytest.raises(ValueError, match=r"in part; .*classes of imagenet32 .*Set teacher1\.finetune_epochs"):
        ready(data_file, tmp_path, data, **changes)
    ours, metrics, (_, nets, _) = ready(
        data_file,
        tmp_path,
        data,
        **changes,
        **{"teacher1.finetune_epochs": 1, "teacher1.finetune_freeze_level": 0, "teacher1.finetune_lr": 1e-5},
    )
    assert trained(metrics) == {"teacher1", "teacher2"}
    initial = init_network(nets.teachers[0], 0, "teacher/named", (8, 8, 3))
    np.testing.assert_allclose(
        ours.params["teacher1"]["classifier"]["kernel"], initial["params"]["classifier"]["kernel"], atol=2e-4
    )  # some ten steps of 1e-5
    assert same(ours.params["teacher1"]["stage1"], variables.params["teacher1"]["stage1"])


def test_a_random_stem_is_not_frozen(given, data_file, tmp_path):
    """Weights of another window, at a level at which the stem would stand still."""
    stored = checkpoint.restore(given[0])
    stored["params"]["stage0"]["conv"]["kernel"] = np.ones((5, 5, 3, 6), np.float32)
    checkpoint.save(tmp_path / "wide", stored)
    weights = {
        "teacher1.weights": str(tmp_path / "wide"),
        "teacher1.train_epochs": 0,
        "teacher1.finetune_epochs": 1,
        "teacher2.train_epochs": 1,
    }
    with pytest.raises(ValueError, match=r"stage0/conv/kernel \(3, 3, 3, 6\). It starts at random .* level 1;"):
        ready(data_file, tmp_path, **weights, **{"teacher1.finetune_freeze_level": 1})
    _, metrics, _ = ready(data_file, tmp_path, **weights, **{"teacher1.finetune_freeze_level": 2})
    assert trained(metrics) == {"teacher1", "teacher2"}  # at level 2 of two stages everything trains


def test_a_checkpoint_without_a_student_is_no_source(given, data_file, tmp_path):
    stored = checkpoint.restore(given[0])
    checkpoint.save(tmp_path / "final", {"variables": {"teacher1": stored}})
    with pytest.raises(ValueError, match="is no checkpoint of one network"):
        ready(data_file, tmp_path, **{"teacher1.weights": str(tmp_path / "final"), "teacher1.train_epochs": 0})
