"""Out-of-fold teachers: whole runs on images that are marks, followed into each compiled step and out of each bank."""

import json
import types

import jax
import numpy as np
import pytest
from networks import make_feed, make_split
from tiny_runs import read_config, tiny_networks

from asib_jax import build, evaluation, recipe as recipes, runner, train
from asib_jax.data import folds
from asib_jax.engine.banks import Bank
from asib_jax.engine.compiled import Steps
from asib_jax.recipe import checks
from asib_jax.record.experiment import Record

pytestmark = pytest.mark.usefixtures("quick_compilation")

COPIES = 3
TRAINED = {
    f"teacher{k}.{key}": value
    for k in (1, 2)
    for key, value in {"train_epochs": 2, "warmup_epochs": 0, "train_lr": 0.01}.items()
}
RUN = {
    **TRAINED,
    "teacher_folds": COPIES,
    "student_epochs_per_stage": (1,),
    "teacher_adapt_epochs": 1,
    "synergy_only_epochs": 0,
    "a_step_views": 1,
    "b_step_views": 1,
    "dataset.train_subset": 50,
    "tensorboard": False,
    "train_distill_adapter_only": True,
}


@pytest.fixture(scope="module", autouse=True)
def networks():
    with tiny_networks():
        yield


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    """Noise, so that an image is a mark of its own; three pairs and a triple of training images are the same, one pair
    under another label, and two of validation are training images, too."""
    path = str(tmp_path_factory.mktemp("data") / "marks.npz")
    training, test = make_split(100), make_split(23, seed=1)
    np.savez(path, x_train=training.image, y_train=training.label, x_test=test.image, y_test=test.label)
    rows = build.divide(recipe_of(path), training.label)
    image, own = training.image.copy(), rows.teacher_train
    alike = own[training.label[own] == 0]
    image[alike[1]], image[alike[3]], image[alike[5]], image[alike[6]] = image[alike[[0, 2, 4, 4]]]
    image[own[training.label[own] == 1][0]] = image[own[training.label[own] == 2][0]]
    image[rows.validation[:2]] = image[own[training.label[own] == 3][:2]]
    np.savez(path, x_train=image, y_train=training.label, x_test=test.image, y_test=test.label)
    return path


def config_of(data_file, **changes):
    return read_config("l1_ib", data_file, **{**RUN, **changes})


def recipe_of(data_file, **changes):
    return recipes.read(config_of(data_file, **changes))


def marks(images):
    return [bytes(np.asarray(image, np.uint8)) for image in images]


def run_of(data_file, results, exp_id="run", **changes):
    """A whole run. seen: by the network that a step trained the marks of its images; asked: by phase what its bank held
    when it began; said: the validation logits then."""
    config = config_of(data_file, results_dir=str(results), exp_id=exp_id, **changes)
    recipe = recipes.read(config)
    checks.check(recipe)
    record = Record.create(results, "test", exp_id, config.to_dict())
    seen, asked, run_steps, run_phase = {}, {}, Steps.run, runner.run_phase

    def watch_steps(steps, carry, fixed, controls, call, each):
        if hasattr(carry, "opt_state") and "image" in call.resident:  # the A-Step has stored outputs alone
            taken = np.asarray(call.resident["image"])[call.rows.ravel()]
            for name in carry.params:
                seen.setdefault(name, set()).update(marks(taken))
        return run_steps(steps, carry, fixed, controls, call, each)

    def watch_phases(context, phase, variables, progress, begun):
        if phase.reads:
            views = {view: context.bank.of("teachers", view) for view in phase.views}
            held = {view: jax.device_get(found.resident or found.host)["teachers"] for view, found in views.items()}
            asked[phase.name] = types.SimpleNamespace(
                held=held, variables=jax.device_get(variables), validation=context.validation.teacher_logits
            )
        return run_phase(context, phase, variables, progress, begun)

    inputs = build.make_inputs(recipe)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Steps, "run", watch_steps)
        patch.setattr(runner, "run_phase", watch_phases)
        train.recorded(inputs.recipe, inputs, record)
    return types.SimpleNamespace(
        inputs=inputs, seen=seen, asked=asked, folder=record.folder, metrics=record.metrics, config=config
    )


@pytest.fixture(scope="module")
def run(data_file, tmp_path_factory):
    return run_of(data_file, tmp_path_factory.mktemp("results"))


def apart(run, images, variables):
    """What every copy says of images, run alone: by teacher logits and features, [copies, N, ...]."""
    found = {}
    for name, model in zip(run.inputs.nets.teacher_names, run.inputs.nets.teachers, strict=True):
        alone = jax.jit(lambda own, model=model: model.clone(adapter_dim=0).apply(own, np.float32(images), train=False))
        outputs = [alone(variables.of(f"{name}_fold{number}")) for number in range(1, COPIES + 1)]
        found[name] = np.stack([out.logit for out in outputs]), np.stack([out.feat_2d for out in outputs])
    return found


def test_no_copy_is_asked_of_an_image_that_it_saw(run):
    """By its pixels, whatever its index: what the bank holds of each training image is what one copy says, the same
    number of both teachers, and that one's training steps never had these pixels."""
    data, asked = run.inputs.data, run.asked["stage1/b"]
    ours = marks(np.asarray(data.train.image))
    said = apart(run, np.asarray(data.train.image), asked.variables)
    (held,) = asked.held.values()
    used = set()
    for row, mark in enumerate(ours):
        logits, features = zip(*said.values(), strict=True)
        gaps = [
            [np.abs(own[number, row] - held.logits[row, k]).max() for k, own in enumerate(logits)]
            for number in range(COPIES)
        ]
        copy = int(np.argmin(np.max(gaps, axis=1)))
        assert np.max(gaps[copy]) < 1e-4 < 1e-3 < min(np.min(gaps[other]) for other in range(COPIES) if other != copy)
        for k, own in enumerate(features):
            np.testing.assert_allclose(held.feats[k][row], own[copy, row], rtol=1e-4, atol=1e-4)
        for k in (1, 2):
            assert mark not in run.seen[f"teacher{k}_fold{copy + 1}"]
        used.add(copy)
    assert used == set(range(COPIES)) and len(set(ours)) < len(ours)  # every copy, and doubles among the images
    assert set(run.asked) == {"stage1/a", "stage1/b"}
    jax.tree.map(np.testing.assert_array_equal, run.asked["stage1/a"].held, asked.held)


def test_every_copy_sees_all_but_its_fold_and_nothing_of_validation(run):
    data = run.inputs.data
    whole, validation = set(marks(np.asarray(data.teacher_train.image))), set(marks(np.asarray(data.validation.image)))
    assert len(whole & validation) == 2 and set(run.seen) >= {f"teacher{k}_fold{j}" for k in (1, 2) for j in (1, 2, 3)}
    for k in (1, 2):
        copies = [run.seen[f"teacher{k}_fold{number}"] for number in range(1, COPIES + 1)]
        assert all(copy <= whole - validation for copy in copies)
        times = [sum(mark in copy for copy in copies) for mark in whole - validation]
        assert max(times) == COPIES - 1 and np.mean(times) > COPIES - 1.2  # incomplete batches are dropped


def test_validation_is_asked_of_all_copies_together(run):
    """Their mean log-probabilities, in float64 by hand, are what is counted; the table says of what its rows are, and
    from disk is the same."""
    data, asked = run.inputs.data, run.asked["stage1/b"]
    said = apart(run, np.asarray(data.validation.image), asked.variables)

    def together(logits):
        logits = np.float64(logits)
        return np.mean(logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True)), axis=0)

    wanted = np.stack([together(logits) for logits, _ in said.values()], axis=1)
    np.testing.assert_allclose(asked.validation, wanted, rtol=1e-4, atol=1e-4)
    table = (run.folder / "table.txt").read_text()
    right = int((wanted[:, 0].argmax(axis=-1) == data.validation.label).sum())
    assert run.metrics["final/validation_acc_teacher1"] == right / len(data.validation.label)
    assert table.count("3 copies, best epochs") == 2
    again = evaluation.evaluate_run(run.folder).split()
    assert again == table.split()


def test_what_a_teacher_has_memorised_is_asked_of_the_copy_that_did_not_see_the_image(run):
    """Of images as they are, which this run's one view has."""
    (held,) = run.asked["stage1/b"].held.values()
    for k, predictions in enumerate(held.logits.argmax(axis=-1).T, 1):
        assert run.metrics[f"teacher{k}/train_acc"] == np.mean(predictions == run.inputs.data.train.label)


def test_copies_are_kept_and_taken_up_by_other_runs(run, data_file):
    """Each under a key that says what it did without; another configuration of the same teachers trains none of them,
    another number of folds trains anew, and a whole teacher is another still."""
    kept = [json.loads(path.read_text())["key"] for path in (run.folder.parent / "teachers").glob("*/key.json")]
    assert len(kept) == 2 * COPIES
    assert sorted((key["streams"], key["fold"]["without"], key["fold"]["of"]) for key in kept) == [
        (f"teacher/tiny_teacher{which}/fold{number}", number, COPIES)
        for which in ("/2", "")
        for number in range(1, COPIES + 1)
    ]
    other = run_of(data_file, run.folder.parent, "other", kd_target="avg", teacher_adapt_epochs=0, kd_alpha=0.5)
    assert not [name for name in other.seen if name.startswith("teacher")]
    (held,), (before,) = other.asked["stage1/b"].held.values(), run.asked["stage1/b"].held.values()
    jax.tree.map(np.testing.assert_array_equal, held, before)
    fewer = run_of(data_file, run.folder.parent, "fewer", teacher_folds=2, teachers_only=True)
    assert set(fewer.seen) == {f"teacher{k}_fold{number}" for k in (1, 2) for number in (1, 2)}
    assert len(list((run.folder.parent / "teachers").iterdir())) == 2 * COPIES + 4
    assert "2 copies, best epochs" in (fewer.folder / "table.txt").read_text()
    assert evaluation.evaluate_run(fewer.folder).split() == (fewer.folder / "table.txt").read_text().split()


@pytest.mark.parametrize("devices", [1, 2, 4])
def test_a_bank_asks_of_each_row_its_copy(run, data_file, tmp_path, devices):
    """On any number of devices, from the networks or from files that a first bank has left: what each copy says of all
    rows, looked up by row; a copy that is asked of nothing is no hindrance; who does not say whom to ask is told."""
    nets, variables, split = run.inputs.nets, run.asked["stage1/b"].variables, run.inputs.data.train
    copy = np.random.default_rng(0).permutation(np.arange(len(split.label)) % COPIES)
    said = apart(run, np.asarray(split.image), variables)
    rows = np.arange(len(copy))
    for asked in (copy, copy, copy % 2):
        bank = Bank(nets, split, make_feed(devices, eval_batch=8), name="rows", copy=asked, cache=str(tmp_path))
        (found,) = bank.read("teachers", variables)
        for k, (logits, features) in enumerate(said.values()):
            np.testing.assert_allclose(found.logits[:, k], logits[asked, rows], rtol=1e-4, atol=1e-4)
            np.testing.assert_allclose(found.feats[k], features[asked, rows], rtol=1e-4, atol=1e-4)
    assert len(list(tmp_path.iterdir())) == COPIES + 1  # other rows are another question
    with pytest.raises(ValueError, match="which of 3 copies of the teachers is asked of which of rows"):
        Bank(nets, split, make_feed(devices), name="rows").read("teachers", variables)


def test_a_hold_out_is_seen_by_no_teacher(data_file, run, tmp_path):
    """And is all that the student trains on where it says so; a teacher of a hold-out is kept as another teacher."""
    held = {"teacher_folds": 0, "teacher_holdout": 0.4, "dataset.train_subset": 0, "train_distill_adapter_only": False}
    held |= {"teacher_adapt_epochs": 0, "kd_target": "avg"}
    own = run_of(data_file, tmp_path, "held", **held, student_images="holdout")
    data = own.inputs.data
    validation, ours = set(marks(np.asarray(data.validation.image))), set(marks(np.asarray(data.train.image)))
    assert len(data.train.label) == 32 and set(data.train.label) == set(range(5))
    for k in (1, 2):
        seen = own.seen[f"teacher{k}"]
        assert not seen & ours and not seen & validation and len(seen) > 30
    assert own.seen["student"] <= ours
    (key, _) = (json.loads(path.read_text())["key"] for path in (tmp_path / "teachers").glob("*/key.json"))
    assert key["holdout"] == 0.4 and "fold" not in key
    everything = run_of(data_file, tmp_path, "all", **held)
    assert "teacher1" not in everything.seen and len(everything.inputs.data.train.label) == 80


def test_one_more_teacher_of_all_images_can_be_measured(data_file, run, tmp_path):
    """It is the one of a run without folds, which takes it up; on training images the copies are asked all the same."""
    plain = {"teacher_adapt_epochs": 0, "kd_target": "avg", "train_distill_adapter_only": False}
    every = run_of(data_file, tmp_path, "every", **plain, teacher_deploy="all")
    asked, (held,) = every.asked["stage1/b"], every.asked["stage1/b"].held.values()
    whole = every.inputs.nets.teachers[0].apply(
        asked.variables.of("teacher1"), np.float32(every.inputs.data.validation.image), train=False
    )
    np.testing.assert_allclose(asked.validation[:, 0], whole.logit, rtol=1e-4, atol=1e-4)
    said = apart(every, np.asarray(every.inputs.data.train.image), asked.variables)["teacher1"][0]
    gaps = np.abs(said - held.logits[None, :, 0]).max(axis=-1)
    np.testing.assert_array_equal(gaps.argmin(axis=0), every.inputs.data.copy_to_ask)
    assert gaps.min(axis=0).max() < 1e-4 and "copies" not in (every.folder / "table.txt").read_text()
    assert evaluation.evaluate_run(every.folder).split() == (every.folder / "table.txt").read_text().split()
    alone = run_of(data_file, tmp_path, "alone", **plain, teacher_folds=0)
    assert set(alone.seen) == {"student"}


@pytest.mark.parametrize("seed", range(6))
def test_folds_are_stratified_and_hold_all_that_is_equal(seed):
    """Random labels and doubles: every image in one fold with its like, sizes within those, every class on both sides;
    the same again from the same seed."""
    generator = np.random.default_rng(seed)
    labels = np.sort(generator.integers(0, 4, 120))
    digests = np.arange(120, dtype=np.uint64)
    doubles = generator.choice(120, (2, 4 * seed), replace=False)
    digests[doubles[0]] = digests[doubles[1]]
    for parts, options in ((5, (5, 0.0)), (1, (0, 0.25))):
        sees = folds.sees(labels, digests, *options, seed)
        np.testing.assert_array_equal(sees, folds.sees(labels, digests, *options, seed))
        assert sees.shape == (parts, 120) and (parts == 1 or ((~sees).sum(axis=0) == 1).all())
        for copy in sees:
            assert not np.isin(digests[copy], digests[~copy]).any()
            assert set(labels[copy]) == set(labels[~copy]) == set(range(4))
            wanted = np.bincount(labels) * (1 - (0.25 if parts == 1 else 0.2))
            assert np.abs(np.bincount(labels[copy]) - wanted).max() <= 1 + seed  # doubles move some
        if not seed:
            assert set((~sees).sum(axis=1)) == {24 if parts == 5 else 30}
    assert not np.array_equal(folds.sees(labels, digests, 5, 0.0, seed), folds.sees(labels, digests, 5, 0.0, seed + 1))
