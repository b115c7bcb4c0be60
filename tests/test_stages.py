"""Stages of A-Step and B-Step on networks of three convolutions: what trains, what stands still, what is restored.

One run of two stages, taken step by step with all variables kept in between, serves most tests; the others change a few
values of its recipe.
"""
import collections
import dataclasses
import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from asib_jax import a_step, b_step, build, train
from asib_jax.engine import parallel
from asib_jax.objectives import state, steps
from asib_jax.tools import plan
from asib_jax.data.augment import augment
from asib_jax.data.sources import Sizes
from asib_jax.record.experiment import Record
from asib_jax.engine.feed import Steps, on_host
from asib_jax.models.ensemble import Variables, run_student, run_teachers
from asib_jax.record.reporting import Reporter
from asib_jax.run import Progress, Run, learning_rate
from asib_jax.record.snapshots import Snapshots
from asib_jax.engine.stored_views import StoredViews
from networks import make_feed, random_variables
from tiny_runs import STEPS, read_recipe, tiny_networks, write_data

LADDER = ("ce_only", "l0_baseline", "side_fusion", "l1_ib", "l2_cccp", "l3_tadapt", "l4_full", "side_cccp_ppf")
LABELS_ALONE = {"kd_alpha": 0.0, "ce_alpha": 1.0, "student_weight_decay": 0.1}

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture(scope="module", autouse=True)
def networks():
    with tiny_networks():
        yield


@pytest.fixture(scope="module")
def data_file(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data"))


def new_record(folder):
    return Record.create(folder, "test", "", {"seed": 0})


def start(recipe, folder):
    """A run with teachers of random weights, and its variables."""
    feed = make_feed(recipe.num_devices, room_gb=recipe.device_data_gb, steps=recipe.steps_per_call)
    data = build.load_data(recipe)
    nets = build.build_networks(recipe, data.num_classes, feed.axis_name)
    ours = build.init_student_and_fusion(recipe, nets, data.image_shape)
    drawn = random_variables(nets) if nets.teachers else ours
    variables = Variables(*({**drawn_part, **part} for drawn_part, part in zip(drawn, ours)))
    reporter = Reporter(folder, tensorboard=False, wandb="", config={})
    return train.prepare(recipe, nets, data, feed, record := new_record(folder), reporter,
                         Snapshots(record), variables)


def variant(run, folder, same_program=False, **changes):
    """The run under a changed recipe; `same_program`: what changes enters its compiled steps as an argument."""
    compiled = run._compiled if same_program else {}
    return dataclasses.replace(run, recipe=dataclasses.replace(run.recipe, **changes), record=new_record(folder),
                               _compiled=compiled)


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def moved(before, after):
    """The branches "network/child" in which every parameter changed; asserts that none did in the others."""
    moved = set()
    for name, branch in before.params.items():
        for child, leaves in branch.items():
            changed = {not np.array_equal(x, y) for x, y in
                       zip(jax.tree.leaves(leaves), jax.tree.leaves(after.params[name][child]), strict=True)}
            assert len(changed) == 1, f"{name}/{child} changed in part"
            moved |= {f"{name}/{child}"} if changed == {True} else set()
    return moved


@pytest.fixture(scope="module")
def whole(data_file, tmp_path_factory):
    """l3_tadapt, stage by stage as `train.run_stages` does it: the variables before everything and after each part."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = read_recipe("l3_tadapt", data_file, kd_ens_alpha=0.4, teacher_adapt_kd_warmup=1,
                         beta_schedule=(1e-5, 3e-5, 2))
    run, variables = start(recipe, folder)
    progress, kept = Progress(), {"start": jax.device_get(variables)}

    def keep(name, variables):
        kept[name] = jax.tree.map(np.copy, jax.device_get(variables))
        return variables

    variables = keep("calibrate", a_step.calibrate(run, variables))
    for stage in range(2):
        variables = keep(f"a{stage + 1}", a_step.run_a_step(run, variables, progress, stage))
        kept[f"synergy_acc{stage + 1}"] = progress.synergy_acc
        variables = keep(f"b{stage + 1}", b_step.run_b_step(run, variables, progress, stage))
    return SimpleNamespace(run=run, variables=variables, progress=progress, kept=kept, metrics=run.record.metrics)


# The whole run -------------------------------------------------------------------------------------------------------

def test_calibration_sets_the_statistics_of_the_student_and_nothing_else(whole):
    """The first layer's running mean and variance become those over the training images, to some 10 % (SPEC 4)."""
    before, after, run = whole.kept["start"], whole.kept["calibrate"], whole.run
    assert moved(before, after) == set()
    pixels = (np.asarray(run.data.train.image) / 255 - np.array(run.nets.student.mean)) / np.array(run.nets.student.std)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    responses = np.einsum("bhwcij,ijco->bhwo", windows, before.params["student"]["stage0"]["conv"]["kernel"])
    mean, spread, stats = responses.mean((0, 1, 2)), responses.std((0, 1, 2)), after.batch_stats["student"]
    np.testing.assert_allclose(stats["stage0"]["bn"]["mean"], mean, atol=0.1 * spread.max())
    np.testing.assert_allclose(stats["stage0"]["bn"]["var"], spread ** 2, rtol=0.15)
    assert all(not same(stats[stage], before.batch_stats["student"][stage]) for stage in stats)
    assert all(same(before.batch_stats[name], after.batch_stats[name]) for name in run.nets.teacher_names)


def test_a_step_trains_fusion_and_adapters_and_the_b_step_the_rest_of_the_student(whole):
    """Query and key adapters leave their random start (SPEC 10.10); backbones, classifiers and statistics stand still;
    what the B-Step's loss does not reach is not decayed either."""
    kept = whole.kept
    fusion = {f"{name}/{child}" for name in ("ib_mbm", "synergy_head") for child in kept["start"].params[name]}
    adapters = {f"{name}/distill_adapter" for name in ("student", "teacher1", "teacher2")}
    for before, after in (("calibrate", "a1"), ("b1", "a2")):
        assert moved(kept[before], kept[after]) == fusion | adapters
        assert same(kept[before].batch_stats, kept[after].batch_stats)
    student = {f"student/{child}" for child in ("stage0", "stage1", "stage2", "classifier")}
    for before, after in (("a1", "b1"), ("a2", "b2")):
        assert moved(kept[before], kept[after]) == student
        assert not same(kept[before].batch_stats["student"], kept[after].batch_stats["student"])
        assert same(kept[before].batch_stats["teacher1"], kept[after].batch_stats["teacher1"])


def test_synergy_only_epochs_then_ib_and_a_shut_gate_until_the_student_has_learnt(whole):
    """SPEC 4 and 10.16: in the first A-Step nothing is taken from the student though synergy is above the threshold."""
    names = ("beta", "open", "kd_student", "cccp", "certainty_sd", "gaussian_kl", "kd_average", "val_synergy_acc")
    epochs = [{name: whole.metrics[f"stage{stage}/a/epoch0{epoch}/{name}"] for name in names}
              for stage in (1, 2) for epoch in (1, 2)]
    assert min(epoch["val_synergy_acc"] for epoch in epochs) > whole.run.recipe.enable_kd_after_syn_acc
    assert [epoch["open"] for epoch in epochs] == [0, 0, 1, 1]
    np.testing.assert_allclose([epoch["beta"] for epoch in epochs], [0, 1e-5, 2e-5, 3e-5], rtol=1e-6)
    for epoch in epochs[:2]:
        assert epoch["kd_student"] == epoch["cccp"] == 0 < epoch["kd_average"]
    for epoch in epochs[2:]:
        assert min(epoch["kd_student"], epoch["cccp"], epoch["gaussian_kl"]) > 0
    assert epochs[0]["certainty_sd"] == 0 and min(epoch["certainty_sd"] for epoch in epochs[1:]) > 0.01


def test_synergy_accuracy_is_averaged_and_becomes_that_of_the_best_state(whole):
    """alpha = .8 in B-epochs, from the accuracy of the state the A-Step chose (SPEC 4)."""
    metrics, kept = whole.metrics, whole.kept
    best = max(metrics[f"stage1/a/epoch0{epoch}/val_synergy_acc"] for epoch in (1, 2))
    assert kept["synergy_acc1"] == best == metrics["stage1/b/before/val_synergy"]
    assert kept["synergy_acc2"] == metrics["stage2/b/before/val_synergy"]
    value = kept["synergy_acc2"]
    for epoch in (1, 2):
        value = 0.8 * metrics[f"stage2/b/epoch0{epoch}/val_synergy"] + 0.2 * value
    np.testing.assert_allclose(whole.progress.synergy_acc, value, rtol=1e-12)


def test_steps_are_counted_by_the_target_they_used(whole, tmp_path):
    assert whole.progress.distilled_steps == {"synergy mixed with avg": 2 * STEPS, "synergy": 2 * STEPS}
    shut = variant(whole.run, tmp_path, same_program=True, enable_kd_after_syn_acc=1.0)
    progress = Progress(synergy_acc=0.9)
    b_step.run_b_step(shut, whole.variables, progress, 0)
    assert progress.distilled_steps == {"avg (gate shut)": 2 * STEPS}
    assert shut.record.metrics["stage1/b/epoch01/gate"] == 0
    for name, expected in {"gate": [1] * 4, "tau": [2, 6] * 2}.items():
        assert [whole.metrics[f"stage{s}/b/epoch0{e}/{name}"] for s in (1, 2) for e in (1, 2)] == expected


@pytest.mark.parametrize("changes, synergy_acc, expected", [
    ({"kd_alpha": 0.0}, 0.9, "labels only"), ({"kd_target": "teacher"}, None, "teacher"), ({}, None, "avg (gate shut)"),
    ({}, 0.21, "avg (gate shut)"), ({}, 0.22, "synergy mixed with avg"), ({"kd_ens_alpha": 0.0}, 0.22, "synergy")])
def test_target_of_an_epoch(whole, tmp_path, changes, synergy_acc, expected):
    run = variant(whole.run, tmp_path, **changes)
    assert b_step.target_name(run.recipe, b_step.controls_of(run, Progress(synergy_acc=synergy_acc), 0, 0)) == expected


def test_gate_needs_a_student_that_has_learnt_and_the_threshold(whole):
    """Shut before any measurement, before any B-epoch, and in the synergy-only epochs of the first stage (SPEC 4)."""
    def opened(synergy_acc, b_epochs, stage=1):
        progress = Progress(synergy_acc=synergy_acc, b_epochs=b_epochs)
        return float(a_step.controls_of(whole.run, progress, stage, 0)["open"])
    assert opened(0.22, 1) == 1
    assert opened(0.21, 1) == opened(0.9, 0) == opened(None, 1) == opened(0.9, 1, stage=0) == 0


def test_learning_rates_go_on_across_stages(whole):
    """Cosine over the 40 steps each optimizer sees in the run, logged for the last step of each epoch, to 1e-6."""
    for step, base in (("a", 1e-3), ("b", 0.01)):
        logged = [whole.metrics[f"stage{s}/{step}/epoch0{e}/lr"] for s in (1, 2) for e in (1, 2)]
        done = (np.arange(4) * STEPS + STEPS - 1) / (4 * STEPS)
        np.testing.assert_allclose(logged, 1e-5 + (base - 1e-5) * (1 + np.cos(np.pi * done)) / 2, rtol=1e-6)


def test_every_step_is_compiled_once(whole):
    assert {key[0] for key in whole.run._compiled} == {"a", "b", "c"} and len(whole.run._compiled) == 3
    assert [step.compiled._cache_size() for step in whole.run._compiled.values()] == [1, 1, 1]


def test_a_step_is_traced_once_for_each_mask(data_file, tmp_path, monkeypatch):
    """Two stages, the second with a part of the student frozen: the A-Step once, the B-Step twice, and nothing else
    than the calibration is a training step."""
    traced, make = collections.Counter(), steps.make_train_step

    def counting(loss, tx, *, axis_name=None):
        step = make(loss, tx, axis_name=axis_name)

        def counted(*arguments):
            traced[loss.func.__name__] += 1
            return step(*arguments)

        return counted

    monkeypatch.setattr(steps, "make_train_step", counting)
    run, variables = start(read_recipe("l1_ib", data_file, use_partial_freeze=True, student_freeze_level=(-1, 1),
                                       a_step_views=1), tmp_path)
    train.run_stages(run, variables)
    assert traced == {"a_loss": 1, "b_loss": 3}


@pytest.mark.parametrize("scaled", [True, False])
def test_rates_scale_with_devices_only_if_asked(whole, scaled):
    recipe = dataclasses.replace(whole.run.recipe, scale_lr_with_devices=scaled)
    rate = learning_rate(recipe, base=0.1, steps_per_epoch=10, epochs=2, warmup_epochs=0, devices=4)
    np.testing.assert_allclose([rate(0), rate(10)], [0.4, 1e-5 + (0.4 - 1e-5) / 2] if scaled else
                               [0.1, 1e-5 + (0.1 - 1e-5) / 2])


# Best states ---------------------------------------------------------------------------------------------------------

def test_a_step_that_only_ruins_returns_what_came_in(whole, tmp_path):
    """SPEC 10.5: the incoming state competes, is restored bitwise with its accuracy, and what it ruined is gone."""
    run = variant(whole.run, tmp_path, same_program=True, a_step_lr=30.0)
    incoming = run.validation.accuracies(whole.variables)["synergy"]
    progress = Progress(synergy_acc=0.123, b_epochs=2)
    after = a_step.run_a_step(run, whole.variables, progress, 0)
    assert max(run.record.metrics[f"stage1/a/epoch0{epoch}/val_synergy_acc"] for epoch in (1, 2)) < incoming
    assert same(after, whole.kept["b2"])
    assert progress.synergy_acc == incoming == run.validation.accuracies(after)["synergy"]
    assert progress.a_steps == 2 * STEPS  # the learning rate is not rewound
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(progress.a_opt_state))  # its moments were none


@pytest.mark.parametrize("restore_best", [True, False])
def test_b_step_continues_from_the_best_epoch_of_the_run(whole, tmp_path, restore_best):
    """An epoch that learns, then one at a thousand times the rate; with restore_best the first one continues."""
    schedule = dataclasses.replace(whole.run.recipe.schedule, type="multistep", gamma=1e3, milestones=(1,))
    run = variant(whole.run, tmp_path, same_program=True, schedule=schedule, restore_best=restore_best)
    progress = Progress(synergy_acc=0.9)
    after = jax.device_get(b_step.run_b_step(run, whole.variables, progress, 0))
    accuracies = [run.record.metrics[f"stage1/b/epoch0{epoch}/val_student"] for epoch in (1, 2)]
    assert accuracies[0] > accuracies[1] and progress.best_epoch == "stage 1, epoch 1"
    continued = progress.best_student if restore_best else progress.last_student
    given_up = progress.last_student if restore_best else progress.best_student
    student = {name: leaves for name, leaves in after.params["student"].items() if name != "distill_adapter"}
    assert same({"params": student, "batch_stats": after.batch_stats["student"]}, continued)
    assert not same(continued, given_up)
    assert run.validation.accuracies(after)["student"] == accuracies[0 if restore_best else 1]
    assert same(after.params["student"]["distill_adapter"], whole.kept["b2"].params["student"]["distill_adapter"])
    assert (progress.b_opt_state is None) == restore_best and progress.b_steps == 2 * STEPS


def test_best_epoch_of_an_earlier_stage_still_counts(whole, tmp_path):
    run = variant(whole.run, tmp_path, same_program=True, student_epochs_per_stage=(1,))
    best = jax.device_get(whole.variables.of("student"))
    progress = Progress(synergy_acc=0.9, best_acc=1.1, best_epoch="an earlier one", best_student=best)
    after = b_step.run_b_step(run, whole.variables, progress, 0)
    assert same(after, whole.kept["b2"]) and progress.best_epoch == "an earlier one"
    assert not same(progress.last_student["params"]["stage0"], best["params"]["stage0"])


# Freezing ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("level, freeze_bn", [(-1, True), (0, False), (1, False), (2, True)])
def test_frozen_stages_stand_still_and_the_others_do_not(whole, tmp_path, level, freeze_bn):
    """Bitwise, parameters and statistics, over AdamW steps with decay; at level 0 the head alone trains (SPEC 10.8)."""
    run = variant(whole.run, tmp_path, use_partial_freeze=True, student_freeze_level=(level,), restore_best=False,
                  student_freeze_bn=freeze_bn, student_epochs_per_stage=(1,), **LABELS_ALONE)
    before = whole.kept["b2"]
    after = jax.device_get(b_step.run_b_step(run, whole.variables, progress := Progress(), 0))
    trains = ("stage0", "stage1", "stage2")[0 if level == -1 else 3 - level:]
    for stage in ("stage0", "stage1", "stage2"):
        old, new = before.params["student"][stage], after.params["student"][stage]
        assert same(old["conv"], new["conv"]) == (stage not in trains)
        assert same(old["bn"], new["bn"]) == (stage not in trains or freeze_bn)
        statistics = before.batch_stats["student"][stage], after.batch_stats["student"][stage]
        assert same(*statistics) == (stage not in trains or freeze_bn)
    assert not same(before.params["student"]["classifier"], after.params["student"]["classifier"])
    moments = optax.tree.get(progress.b_opt_state, "mu")["student"]
    assert moments.keys() == {*trains, "classifier"}
    assert all(("bn" in moments[stage]) != freeze_bn for stage in trains)


def test_levels_by_stage_carry_the_moments(whole, tmp_path):
    """From everything to the last stage: the second stage goes on with the Adam state of what still trains."""
    run = variant(whole.run, tmp_path, use_partial_freeze=True, student_freeze_level=(-1, 1), restore_best=False,
                  student_epochs_per_stage=(1, 1), **LABELS_ALONE)
    progress = Progress()
    middle = b_step.run_b_step(run, whole.variables, progress, 0)
    first = progress.b_opt_state
    assert optax.tree.get(first, "mu")["student"].keys() == {"stage0", "stage1", "stage2", "classifier"}
    kept_first = jax.tree.map(np.copy, jax.device_get(first))
    # A second stage at a rate of zero, with the carried moments and without: only their history differs.
    still = variant(run, tmp_path, same_program=True, student_lr=0.0,
                    schedule=dataclasses.replace(run.recipe.schedule, min_lr=0.0))
    fresh = dataclasses.replace(progress, b_opt_state=None, distilled_steps=collections.Counter())
    b_step.run_b_step(still, middle, progress, 1)
    b_step.run_b_step(variant(still, tmp_path, same_program=True), middle, fresh, 1)
    carried, without = (optax.tree.get(p.b_opt_state, "mu")["student"] for p in (progress, fresh))
    assert carried.keys() == {"stage2", "classifier"}
    assert int(optax.tree.get(progress.b_opt_state, "count")) == 2 * STEPS
    for name in carried:
        jax.tree.map(lambda a, b, old: np.testing.assert_allclose(a - b, 0.9 ** STEPS * old, rtol=1e-3, atol=1e-6),
                     carried[name], without[name], optax.tree.get(kept_first, "mu")["student"][name])


def test_finetuned_teachers_move_within_their_levels_and_never_their_classifiers(whole, tmp_path):
    """SPEC 6: teacher 1 trains its last stage with its statistics, teacher 2 all stages but no normalisation."""
    first, second = whole.run.recipe.teachers
    teachers = (dataclasses.replace(first, freeze_level=(1,), freeze_bn=False),
                dataclasses.replace(second, freeze_level=(-1,), freeze_bn=True))
    run = variant(whole.run, tmp_path, train_distill_adapter_only=False, use_teacher_finetuning=True, teachers=teachers,
                  use_partial_freeze=True, a_step_weight_decay=0.1, reg_lambda=0.1,
                  student_epochs_per_stage=(1,))
    before = whole.kept["calibrate"]  # its fusion network has yet to learn: the incoming state is not the best
    progress = Progress()
    after = jax.device_get(a_step.run_a_step(run, parallel.replicate(before, run.feed.devices), progress, 0))

    def changes(name):
        tree = {part: (getattr(before, part)[name], getattr(after, part)[name]) for part in ("params", "batch_stats")}
        changed = {child for child in tree["params"][0] if child not in ("stage0", "stage1")
                   and not same(tree["params"][0][child], tree["params"][1][child])}
        for stage in ("stage0", "stage1"):
            changed |= {f"{stage}/{child}" for child, leaf in tree["params"][0][stage].items()
                        if not same(leaf, tree["params"][1][stage][child])}
            changed |= set() if same(*(stats[stage] for stats in tree["batch_stats"])) else {f"{stage} statistics"}
        return changed

    assert changes("teacher1") == {"stage1/conv", "stage1/bn", "stage1 statistics", "distill_adapter"}
    assert changes("teacher2") == {"stage0/conv", "stage1/conv", "distill_adapter"}
    assert changes("student") - {"stage2"} == {"distill_adapter"}
    wanted = [model.apply(after.of(name), jnp.float32(run.data.validation.image), train=False).logit
              for name, model in zip(run.nets.teacher_names, run.nets.teachers)]
    assert progress.synergy_acc == run.validation.accuracies(after)["synergy"]  # with the teachers of that epoch
    np.testing.assert_allclose(run.validation.teachers.logits, np.stack(wanted, axis=1), rtol=1e-4, atol=1e-4)
    run.validation.read_teachers(whole.variables)  # the evaluator is everyone's


# Seeds ---------------------------------------------------------------------------------------------------------------

def test_every_config_of_the_ladder_starts_from_the_same_student_and_batches(data_file):
    """SPEC 7: bitwise the same initial backbone and classifier, split, order and augmentation; another seed, others."""
    initialise = functools.cache(build.init_network)  # many configs have equal networks

    def beginning(name, seed=0):
        recipe = read_recipe(name, data_file, seed=seed)
        data = build.load_data(recipe)
        nets = build.build_networks(recipe, data.num_classes)
        student = jax.tree.map(jnp.copy, initialise(nets.student, recipe.seed, "student", data.image_shape))
        assert ("distill_adapter" in student["params"]) == recipe.uses_fusion
        student["params"].pop("distill_adapter", None)
        here = on_host(index=data.train.index)
        drawn = SimpleNamespace(params={}, batch_stats={})
        feed = make_feed()
        stored = StoredViews(dataclasses.replace(recipe, a_step_views=0, b_step_views=0), nets, data.train, feed, drawn)
        run = Run(recipe, nets, data, feed, None, None, None, here, here, stored, None)
        batches = [row for stage in (0, 1) for call in run.calls(Steps(None, 1), "b", stage, 1)
                   for row in data.train.index[call.rows]]
        keys = [jax.random.key_data(run.augment_key("b", stage, 1)) for stage in (0, 1)]
        return student, data.validation, batches, keys

    first = beginning("ce_only")
    for name in LADDER[1:]:
        assert same(beginning(name), first), name
    other = beginning("l0_baseline", seed=1)
    assert not any(same(a, b) for a, b in zip(other, first))
    assert len({tuple(index) for index in first[2]}) == 2 * STEPS


def test_stored_outputs_go_with_the_images_of_each_epoch(data_file, tmp_path):
    """Two views: what is stored for an epoch is what the teachers, and in the A-Step the student, say of the view that
    the epoch's step sees, to 1e-4."""
    run, variables = start(read_recipe("l1_ib", data_file, a_step_views=2, b_step_views=2,
                                       **{"dataset.data_aug": 1}), tmp_path)
    images, index = np.asarray(run.data.train.image), run.data.train.index
    read = jax.jit(lambda key: (run_teachers(run.nets, variables, augment(key, index, images, 1))[0],
                                run_student(run.nets, variables, augment(key, index, images, 1))))
    seen, sizes = [], Sizes(run.data.train.label, 23, (8, 8, 3), 5, "")
    for step, stage, epoch in (("b", 0, 0), ("b", 0, 1), ("b", 1, 1), ("a", 0, 0), ("a", 1, 1)):
        run.stored.read_student(variables, stage)
        stored = {name: leaf for part in run.stored.of(step, stage, epoch) for name, leaf in part.resident.items()}
        key = run.augment_key(step, stage, epoch)
        expected = dict(zip(("teachers", "student") if step == "a" else ("teachers",), read(key)))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), stored, expected)
        planned = plan.batch_shapes(sizes, 8, run.nets, "float32", step)
        for name in stored:
            jax.tree.map(lambda leaf, shape: np.testing.assert_equal((leaf.dtype, leaf.shape[1:]),
                                                                     (shape.dtype, shape.shape[1:])),
                         stored[name], planned[name])
        seen.append(key)
    assert seen[1] == seen[2] == seen[4] != seen[0] == seen[3]  # the fourth epoch of the run sees the second view


def two_stages(data_file, folder, **changes):
    """l3_tadapt over two stages by plain SGD, whose rounding does not grow: the variables before and after, the run."""
    with pytest.MonkeyPatch.context() as patch:
        make = state.make_optimizer
        patch.setattr(state, "make_optimizer", lambda kind, **options: make("sgd", **options | {"momentum": 0.0}))
        run, variables = start(read_recipe("l3_tadapt", data_file, a_step_lr=0.05, student_lr=0.02, restore_best=False,
                                           **{"dataset.data_aug": 1}, **changes), folder)
        before = jax.device_get(variables)
        return before, jax.device_get(train.run_stages(run, variables)[0]), run


def test_run_from_stored_views_is_the_run_that_streams_them(data_file, tmp_path):
    """As many views as epochs are what streaming draws; every variable after two stages agrees to 1e-5, whether outputs
    are stored on one device, spread over four or on the host, or, for want of memory, computed from the same views;
    and however many steps a call does."""
    before, streamed, plain = two_stages(data_file, tmp_path / "streamed")
    assert plain.stored.steps == set()
    assert {"student/stage0", "ib_mbm/mu", "teacher1/distill_adapter"} <= moved(before, streamed)
    largest = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(streamed.params)))
    assert largest > 0.01
    for name, changes, steps in (("device", {"steps_per_call": 4}, {"a", "b"}),
                                 ("four", {"num_devices": 4}, {"a", "b"}),
                                 ("host", {"device_data_gb": 0.0}, {"a", "b"}),
                                 ("none", {"bank_memory_gb": 0.0, "steps_per_call": 3}, set())):
        _, stored, run = two_stages(data_file, tmp_path / name, a_step_views=4, b_step_views=4, **changes)
        assert run.stored.steps == steps
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), stored, streamed)
        for key in (key for key in plain.record.metrics if key.startswith("stage")):
            np.testing.assert_allclose(run.record.metrics[key], plain.record.metrics[key], rtol=1e-4, err_msg=key)
    _, fewer, _ = two_stages(data_file, tmp_path / "fewer", a_step_views=1, b_step_views=1)
    assert not same(fewer.params["student"]["stage0"], streamed.params["student"]["stage0"])


def test_control_is_the_run_of_labels_alone(whole, data_file, tmp_path):
    """`train_control` of the fusion run and a run of ce_only: bitwise the same last and best student."""
    run = variant(whole.run, tmp_path, train_control=True)
    control = train.train_control(run)
    alone, variables = start(read_recipe("ce_only", data_file), tmp_path)
    _, progress = train.run_stages(alone, variables)
    assert same(control["control_last"], progress.last_student)
    assert same(control["control_best"], progress.best_student)
    assert progress.distilled_steps == {"labels only": 4 * STEPS}
    for key in ("stage1/b/epoch01/val_student", "stage2/b/epoch02/loss"):
        assert run.record.metrics[f"control/{key}"] == alone.record.metrics[key]
    assert not same(control["control_last"]["params"]["stage0"], whole.progress.last_student["params"]["stage0"])


def test_first_stage_is_the_same_on_four_devices(whole, data_file, tmp_path):
    """Every loss and share of the training metrics to 1e-3: Adam lets rounding grow, though not that far."""
    run, variables = start(dataclasses.replace(whole.run.recipe, num_devices=4), tmp_path)
    progress = Progress()
    variables = a_step.run_a_step(run, a_step.calibrate(run, variables), progress, 0)
    variables = b_step.run_b_step(run, variables, progress, 0)
    assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(variables)} == {4}
    compared = [key for key in run.record.metrics if key.startswith("stage") and "/val_" not in key]
    assert len(compared) == 48
    for key in compared:
        np.testing.assert_allclose(run.record.metrics[key], whole.metrics[key], rtol=1e-3, atol=1e-6, err_msg=key)


def test_stages_repeat_bitwise(whole, data_file, tmp_path):
    """The same recipe again, by `train.run_stages`: bitwise the same variables and metrics."""
    run, variables = start(whole.run.recipe, tmp_path)
    run._compiled.update(whole.run._compiled)
    variables, progress = train.run_stages(run, variables)
    assert same(variables, whole.kept["b2"])
    metrics, before = ({key: value for key, value in metrics.items() if not key.startswith("time/")}
                       for metrics in (run.record.metrics, whole.metrics))
    assert metrics == before
    assert (run.record.folder / "checkpoints" / "stage1_last").is_dir()


def test_float16_stages_scale_their_losses(data_file, tmp_path):
    run, variables = start(read_recipe("l3_tadapt", data_file, use_amp=True, amp_dtype="float16",
                                       student_epochs_per_stage=(1, 1)), tmp_path)
    train.run_stages(run, variables)
    for key in ("stage1/a/epoch01", "stage1/b/epoch01", "stage2/b/epoch01"):
        assert 0 <= run.record.metrics[f"{key}/skipped"] < STEPS
    assert {step.compiled._cache_size() for step in run._compiled.values()} == {1}
