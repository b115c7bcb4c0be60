"""Stages of A-Step and B-Step on networks of three convolutions: what trains, what stands still, what is restored.

One run of two stages, taken step by step with all variables kept in between, serves most tests; the others change a few
values of its recipe.
"""

import dataclasses
import functools
import zlib
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import make_feed, random_variables
from scipy.optimize import linear_sum_assignment
from tiny_runs import STEPS, read_recipe, tiny_networks, write_data

from asib_jax import a_step, b_step, build, runner, train
from asib_jax.context import Context
from asib_jax.data.augment import augment
from asib_jax.data.sources import Sizes
from asib_jax.data.splits import training_rows
from asib_jax.engine import devices
from asib_jax.engine.progress import Best, Progress
from asib_jax.models import ensemble
from asib_jax.models.ensemble import Variables, init_network, run_student, run_teachers
from asib_jax.objectives.optimizers import make_optimizer
from asib_jax.record.experiment import Record
from asib_jax.record.reporting import Reporter
from asib_jax.record.snapshots import Snapshots
from asib_jax.tools import plan

LADDER = (
    "ce_only",
    "l0_baseline",
    "side_fusion",
    "l1_ib",
    "l1_avg",
    "l1_mixture",
    "l2_cccp",
    "l3_tadapt",
    "l4_full",
    "side_cccp_ppf",
)
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


def make_context(recipe, folder, steps=None):
    feed = make_feed(recipe.num_devices, room_gb=recipe.device_data_gb, steps=recipe.steps_per_call)
    data = build.load_data(recipe)
    record = new_record(folder)
    return Context(
        recipe,
        data,
        build.build_networks(recipe, data.num_classes, feed.axis_name),
        feed,
        record,
        Reporter(folder, tensorboard=False, wandb="", config={}),
        Snapshots(record),
        steps or {},
    )


def start(recipe, folder):
    """A run with teachers of random weights, its variables and its phases by name."""
    context = make_context(recipe, folder)
    ours = build.initial(recipe, context.nets, context.data.image_shape).variables
    drawn = random_variables(context.nets) if context.nets.teachers else ours
    variables = Variables(*({**drawn_part, **part} for drawn_part, part in zip(drawn, ours)))
    variables = devices.replicate(variables, context.feed.devices)
    todo = phases_of(context, variables)
    context.validation.read_teachers(variables)
    context.read_teachers(variables, list(todo.values()))
    return context, variables, todo


def phases_of(context, variables):
    return {
        phase.name: phase
        for phase in train.phases_of(
            context.recipe,
            context.nets,
            variables.params,
            {"train": len(context.data.train.label)},
            {},
            calibrate=context.recipe.uses_fusion,
        )
    }


def variant(whole, folder, same_program=False, variables=None, **changes):
    """The run under a changed recipe, and its phases; `same_program`: what changes enters its steps as an argument."""
    variables = variables or whole.variables
    run = whole.run
    run = make_context(dataclasses.replace(run.recipe, **changes), folder, run.steps if same_program else {})
    todo = phases_of(run, variables)
    run.validation.read_teachers(variables)
    run.read_teachers(variables, list(todo.values()))
    return run, todo


def run_all(context, variables, todo):
    """All variables after the phases, and the progress."""
    progress = Progress()
    for phase in todo.values():
        variables = runner.run_phase(context, phase, variables, progress)
    return variables, progress


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def moved(before, after):
    """The branches "network/child" in which every parameter changed; asserts that none did in the others."""
    moved = set()
    for name, branch in before.params.items():
        for child, leaves in branch.items():
            changed = {
                not np.array_equal(x, y)
                for x, y in zip(jax.tree.leaves(leaves), jax.tree.leaves(after.params[name][child]), strict=True)
            }
            assert len(changed) == 1, f"{name}/{child} changed in part"
            moved |= {f"{name}/{child}"} if changed == {True} else set()
    return moved


@pytest.fixture(scope="module")
def whole(data_file, tmp_path_factory):
    """l3_tadapt, phase by phase: the variables before everything and after each."""
    folder = tmp_path_factory.mktemp("whole")
    recipe = read_recipe(
        "l3_tadapt", data_file, kd_ens_alpha=0.4, teacher_adapt_kd_warmup=1, beta_schedule=(1e-5, 3e-5, 2)
    )
    run, variables, todo = start(recipe, folder)
    progress, kept, synergy = Progress(), {"start": jax.device_get(variables)}, {}
    for name, phase in todo.items():
        variables = runner.run_phase(run, phase, variables, progress)
        kept[name] = jax.tree.map(np.copy, jax.device_get(variables))
        synergy[name] = progress.synergy_acc
    return SimpleNamespace(
        run=run,
        variables=variables,
        progress=progress,
        kept=kept,
        synergy=synergy,
        todo=todo,
        metrics=run.record.metrics,
    )


# The whole run -------------------------------------------------------------------------------------------------------


def test_calibration_sets_the_statistics_of_the_student_and_nothing_else(whole):
    """The first layer's running mean and variance become those over the training images, to some 10 % (SPEC 4)."""
    before, after, run = whole.kept["start"], whole.kept["calibration"], whole.run
    assert moved(before, after) == set()
    pixels = (np.asarray(run.data.train.image) / 255 - np.array(run.nets.student.mean)) / np.array(run.nets.student.std)
    windows = np.lib.stride_tricks.sliding_window_view(np.pad(pixels, ((0, 0), (1, 1), (1, 1), (0, 0))), (3, 3), (1, 2))
    responses = np.einsum("bhwcij,ijco->bhwo", windows, before.params["student"]["stage0"]["conv"]["kernel"])
    mean, spread, stats = responses.mean((0, 1, 2)), responses.std((0, 1, 2)), after.batch_stats["student"]
    np.testing.assert_allclose(stats["stage0"]["bn"]["mean"], mean, atol=0.1 * spread.max())
    np.testing.assert_allclose(stats["stage0"]["bn"]["var"], spread**2, rtol=0.15)
    assert all(not same(stats[stage], before.batch_stats["student"][stage]) for stage in stats)
    assert all(same(before.batch_stats[name], after.batch_stats[name]) for name in run.nets.teacher_names)


def test_a_step_trains_fusion_and_adapters_and_the_b_step_the_rest_of_the_student(whole):
    """Query and key adapters leave their random start (SPEC 10.10); backbones, classifiers and statistics stand still;
    what the B-Step's loss does not reach is not decayed either."""
    kept = whole.kept
    fusion = {f"{name}/{child}" for name in ("ib_mbm", "synergy_head") for child in kept["start"].params[name]}
    adapters = {f"{name}/distill_adapter" for name in ("student", "teacher1", "teacher2")}
    for before, after in (("calibration", "stage1/a"), ("stage1/b", "stage2/a")):
        assert moved(kept[before], kept[after]) == fusion | adapters
        assert same(kept[before].batch_stats, kept[after].batch_stats)
    student = {f"student/{child}" for child in ("stage0", "stage1", "stage2", "classifier")}
    for before, after in (("stage1/a", "stage1/b"), ("stage2/a", "stage2/b")):
        assert moved(kept[before], kept[after]) == student
        assert not same(kept[before].batch_stats["student"], kept[after].batch_stats["student"])
        assert same(kept[before].batch_stats["teacher1"], kept[after].batch_stats["teacher1"])


def test_what_was_held_of_the_student_is_gone_once_it_trains(whole):
    """Validation after B-epochs is of the student as it is, by its own forward pass."""
    run, student = whole.run, whole.run.nets.student
    assert run.validation.bank.of("student") is None
    images, labels = np.asarray(run.data.validation.image), run.data.validation.label
    logits = jax.jit(lambda variables: student.apply(variables, images, train=False).logit)(
        whole.variables.of("student")
    )
    accuracy = np.mean(np.argmax(logits, axis=-1) == labels)
    assert run.validation.accuracies(run.nets, whole.variables)["student"] == accuracy
    assert accuracy == max(whole.metrics[f"stage{s}/b/epoch0{e}/val_student"] for s in (1, 2) for e in (1, 2))


def test_synergy_only_epochs_then_ib_and_a_shut_gate_until_the_student_has_learnt(whole):
    """SPEC 4 and 10.16: in the first A-Step nothing is taken from the student though synergy is above the threshold."""
    names = ("beta", "open", "kd_student", "cccp", "certainty_sd", "gaussian_kl", "kd_average", "val_synergy")
    epochs = [
        {name: whole.metrics[f"stage{stage}/a/epoch0{epoch}/{name}"] for name in names}
        for stage in (1, 2)
        for epoch in (1, 2)
    ]
    assert min(epoch["val_synergy"] for epoch in epochs) > whole.run.recipe.enable_kd_after_syn_acc
    assert [epoch["open"] for epoch in epochs] == [0, 0, 1, 1]
    np.testing.assert_allclose([epoch["beta"] for epoch in epochs], [0, 1e-5, 2e-5, 3e-5], rtol=1e-6)
    for epoch in epochs[:2]:
        assert epoch["kd_student"] == epoch["cccp"] == 0 < epoch["kd_average"]
    for epoch in epochs[2:]:
        assert min(epoch["kd_student"], epoch["cccp"], epoch["gaussian_kl"]) > 0
    assert epochs[0]["certainty_sd"] == 0 and min(epoch["certainty_sd"] for epoch in epochs[1:]) > 0.01


def test_synergy_accuracy_is_averaged_and_becomes_that_of_the_best_state(whole):
    """alpha = .8 in B-epochs, from the accuracy of the state the A-Step chose (SPEC 4)."""
    metrics, synergy = whole.metrics, whole.synergy
    best = max(metrics[f"stage1/a/{when}/val_synergy"] for when in ("before", "epoch01", "epoch02"))
    assert synergy["stage1/a"] == best == metrics["stage1/b/before/val_synergy"]
    assert synergy["stage2/a"] == metrics["stage2/b/before/val_synergy"]
    value = synergy["stage2/a"]
    for epoch in (1, 2):
        value = 0.8 * metrics[f"stage2/b/epoch0{epoch}/val_synergy"] + 0.2 * value
    np.testing.assert_allclose(whole.progress.synergy_acc, value, rtol=1e-12)


def test_steps_are_counted_by_the_target_they_used(whole, tmp_path):
    assert whole.progress.distilled_steps == {"synergy mixed with avg": 2 * STEPS, "synergy": 2 * STEPS}
    shut, todo = variant(whole, tmp_path, same_program=True, enable_kd_after_syn_acc=1.0)
    progress = Progress(synergy_acc=0.9)
    runner.run_phase(shut, todo["stage1/b"], whole.variables, progress)
    assert progress.distilled_steps == {"avg (gate shut)": 2 * STEPS}
    assert shut.record.metrics["stage1/b/epoch01/gate"] == 0
    for name, expected in {"gate": [1] * 4, "tau": [2, 6] * 2}.items():
        assert [whole.metrics[f"stage{s}/b/epoch0{e}/{name}"] for s in (1, 2) for e in (1, 2)] == expected


@pytest.mark.parametrize(
    "changes, synergy_acc, expected",
    [
        ({"kd_alpha": 0.0}, 0.9, "labels only"),
        ({"kd_target": "teacher"}, None, "teacher"),
        ({}, None, "avg (gate shut)"),
        ({}, 0.21, "avg (gate shut)"),
        ({}, 0.22, "synergy mixed with avg"),
        ({"kd_ens_alpha": 0.0}, 0.22, "synergy"),
    ],
)
def test_target_of_an_epoch(whole, changes, synergy_acc, expected):
    recipe = dataclasses.replace(whole.run.recipe, **changes)
    controls = b_step.controls_of(recipe, 0, Progress(synergy_acc=synergy_acc), 0)
    assert b_step.target_name(recipe, controls) == expected


@pytest.mark.parametrize(
    "share, end, factor, wanted",
    [
        (0.5, None, 1, [0.5] * 5),
        (0.4, 0.0, 1, [0.4, 0.3, 0.2, 0.1, 0.0]),
        (0.0, 0.9, 2, [0.1 * n for n in range(10)]),
        (0.0, None, 1, None),
        (0.0, 0.0, 1, None),
    ],
)
def test_students_share_goes_on_across_stages(whole, share, end, factor, wanted):
    """Over the B-epochs of all stages, times `cccp_ns`, whatever came before; off, the step has no such argument."""
    changes = {"kd_student_share": share, "kd_student_share_end": end, "student_epochs_per_stage": (2, 3)}
    recipe = dataclasses.replace(whole.run.recipe, **changes, use_cccp=factor > 1, cccp_ns=factor)
    controls = [
        b_step.controls_of(recipe, stage, Progress(), epoch)
        for stage, epochs in enumerate((2 * factor, 3 * factor))
        for epoch in range(epochs)
    ]
    found = [epoch["student_share"] for epoch in controls if "student_share" in epoch]
    np.testing.assert_allclose(found, [] if wanted is None else wanted, rtol=1e-6)
    assert b_step.terms_of(recipe).student_share == (wanted is not None)


def test_gate_needs_a_student_that_has_learnt_and_the_threshold(whole):
    """Shut before any measurement, before any B-epoch, and in the synergy-only epochs of the first stage (SPEC 4)."""

    def opened(synergy_acc, b_epochs, stage=1):
        progress = Progress(synergy_acc=synergy_acc)
        progress.epochs["b"] = b_epochs
        return float(a_step.controls_of(whole.run.recipe, stage, progress, 0)["open"])

    assert opened(0.22, 1) == 1
    assert opened(0.21, 1) == opened(0.9, 0) == opened(None, 1) == opened(0.9, 1, stage=0) == 0


def test_learning_rates_go_on_across_stages(whole):
    """Cosine over the 40 steps each optimizer sees in the run, as the last step of each epoch was given it, to 1e-6."""
    for step, base in (("a", 1e-3), ("b", 0.01)):
        logged = [whole.metrics[f"stage{s}/{step}/epoch0{e}/lr"] for s in (1, 2) for e in (1, 2)]
        done = (np.arange(4) * STEPS + STEPS - 1) / (4 * STEPS)
        np.testing.assert_allclose(logged, 1e-5 + (base - 1e-5) * (1 + np.cos(np.pi * done)) / 2, rtol=1e-6)


def test_the_rate_of_every_step_moves_the_parameters(whole, tmp_path):
    """SGD without momentum, decay or clipping: after a phase the parameters have moved by the sum of rate * gradient,
    with the rate of the run's step, which warm-up makes another one for each; against a loop of plain steps, 1e-5."""
    schedule = dataclasses.replace(whole.run.recipe.schedule, lr_warmup_epochs=4)
    run, todo = variant(
        whole,
        tmp_path,
        schedule=schedule,
        **LABELS_ALONE | {"student_weight_decay": 0.0},
        optimizer="sgd",
        momentum=0.0,
        grad_clip_norm=0.0,
        restore_best=False,
    )
    progress, variables = Progress(), whole.variables
    for name in ("stage1/b", "stage2/b"):
        variables = runner.run_phase(run, todo[name], variables, progress)
    params, stats, number = *whole.kept["stage2/b"], 0
    fixed = {"tau": 4.0, "gate": 0.0, "average_share": 0.0, "ramp": 1.0, "ratio_on": 1.0}
    for stage in (0, 1):
        loss = todo[f"stage{stage + 1}/b"].training.loss
        gradient = jax.jit(
            jax.value_and_grad(
                lambda student, others, controls, batch, loss=loss: loss(
                    Variables({**others.params, "student": student}, others.batch_stats), controls, batch
                ),
                has_aux=True,
            )
        )
        for epoch in (0, 1):
            order = np.random.default_rng([0, crc("order/b"), stage, epoch]).permutation(len(run.data.train.label))
            keys = {
                "augment_key": key("augment", stage, epoch),
                "mix_key": key("mix", stage, epoch),
                "dropout_key": key("dropout/b", stage, epoch),
            }
            for step, rows in enumerate(order[: 8 * STEPS].reshape(STEPS, 8)):
                batch = {name: np.asarray(leaf[rows]) for name, leaf in run.data.train._asdict().items()}
                others = Variables(params, stats)
                (_, (new, _)), grads = gradient(params["student"], others, {**fixed, **keys, "step": step}, batch)
                rate, number = 0.01 * (number + 1) / (4 * STEPS), number + 1  # warm-up over all 40 steps
                moved = {
                    child: jax.tree.map(lambda p, g, rate=rate: p - rate * g, params["student"][child], grads[child])
                    for child in grads
                    if child != "distill_adapter"
                }
                params = {**params, "student": {**params["student"], **moved}}
                stats = {**stats, **new}
    for child in ("stage0", "stage1", "stage2", "classifier"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5),
            variables.params["student"][child],
            params["student"][child],
        )
    largest = np.abs(
        variables.params["student"]["classifier"]["kernel"]
        - whole.kept["stage2/b"].params["student"]["classifier"]["kernel"]
    ).max()
    assert largest > 1e-2


def crc(name):
    return zlib.crc32(name.encode())


def key(name, *position):
    """As it is written down: the seed's key, folded with the name's CRC and each coordinate of the position."""
    out = jax.random.fold_in(jax.random.key(0), crc(name))
    for coordinate in position:
        out = jax.random.fold_in(out, coordinate)
    return out


def test_positions_of_the_random_streams(whole):
    """Orders, augmentation, noise, mixing and dropout are those of (seed, name, stage, epoch), and so differ between
    any two epochs of any two stages; A- and B-Step of an epoch share the augmentation and nothing else."""
    seen = []
    for stage in (0, 1):
        for epoch in (0, 1):
            a, b = (whole.todo[f"stage{stage + 1}/{step}"] for step in ("a", "b"))
            controls = a.controls(Progress(), epoch) | {
                f"b_{name}": value for name, value in b.controls(Progress(), epoch).items()
            }
            names = {
                "augment_key": "augment",
                "noise_key": "noise",
                "dropout_key": "dropout",
                "b_mix_key": "mix",
                "b_augment_key": "augment",
                "b_dropout_key": "dropout/b",
            }
            for control, name in names.items():
                assert controls[control] == key(name, stage, epoch), control
            for step, phase in (("a", a), ("b", b)):
                order = np.random.default_rng([0, crc(f"order/{step}"), stage, epoch]).permutation(80)
                np.testing.assert_array_equal(phase.order(epoch).permutation(80), order)
                seen.append(tuple(order))
            seen += [
                tuple(np.ravel(jax.random.key_data(controls[control])))
                for control in names
                if control != "b_augment_key"
            ]
    assert len(set(seen)) == len(seen) == 4 * 7


def test_positions_of_the_calibration_s_streams(whole):
    """Five passes of ten steps, each over an order and views of its own."""
    phase, seen = whole.todo["calibration"], []
    for epoch in range(phase.epochs):
        controls = phase.controls(Progress(), epoch)
        for name, stream in (("augment", ""), ("mix", "/mix"), ("dropout", "/dropout")):
            assert controls[f"{name}_key"] == key(f"calibrate{stream}", epoch), name
        order = np.random.default_rng([0, crc("order/calibrate"), 0, epoch]).permutation(80)
        np.testing.assert_array_equal(phase.order(epoch).permutation(80), order)
        seen.append(tuple(order))
    assert len(set(seen)) == 5


def test_every_step_is_compiled_once(whole):
    assert [step.compiled._cache_size() for step in whole.run.steps.values()] == [1, 1, 1]


def test_a_step_is_compiled_once_for_each_mask(data_file, tmp_path):
    """Two stages, the second with a part of the student frozen: the A-Step once, the B-Step twice, and nothing else
    than the calibration is a training step."""
    run, variables, todo = start(
        read_recipe("l1_ib", data_file, use_partial_freeze=True, student_freeze_level=(-1, 1), a_step_views=1), tmp_path
    )
    run_all(run, variables, todo)
    assert [step.compiled._cache_size() for step in run.steps.values()] == [1] * 4
    assert sorted(optimizer for optimizer, _ in run.steps) == ["a", "b", "b", "calibration"]


def test_training_helps(data_file, tmp_path):
    """Longer than the others: synergy, and the student, who learns from it, start at chance, 1/5, as does the average
    of teachers of random weights; both end far above it on the 20 validation images: here 13 are right, and all."""
    run, variables, todo = start(
        read_recipe("l2_cccp", data_file, student_epochs_per_stage=(4, 4), student_lr=0.02, teacher_adapt_epochs=4),
        tmp_path,
    )
    _, progress = run_all(run, variables, todo)
    metrics = run.record.metrics
    first = metrics["stage1/a/before/val_synergy"]
    assert max(metrics[f"stage1/a/epoch0{epoch}/val_synergy"] for epoch in (1, 2, 3, 4)) > first + 0.3
    assert progress.synergy_acc > 0.5 > 0.3 > metrics["stage1/b/epoch01/val_average"]
    assert progress.best["student"].score > 0.8


def test_bfloat16_stage_is_near_the_float32_one(whole, data_file, tmp_path):
    """A whole stage: every part of the losses within 5 % (or 0.02), every accuracy within three validation images."""
    run, variables, todo = start(dataclasses.replace(whole.run.recipe, use_amp=True, amp_dtype="bfloat16"), tmp_path)
    run_all(run, variables, {name: todo[name] for name in ("calibration", "stage1/a", "stage1/b")})
    compared = [
        key for key in run.record.metrics if key.startswith("stage1/") and not key.endswith(("/lr", "/skipped"))
    ]
    assert len(compared) > 40
    for key in compared:
        ours, theirs = run.record.metrics[key], whole.metrics[key]
        accuracy = "/val_" in key or key.endswith(("acc", "clipped"))
        np.testing.assert_allclose(
            ours, theirs, rtol=0 if accuracy else 0.05, atol=0.15 if accuracy else 0.02, err_msg=key
        )


# Best states ---------------------------------------------------------------------------------------------------------


def test_a_step_that_only_ruins_returns_what_came_in(whole, tmp_path):
    """SPEC 10.5: the incoming state competes, is restored bitwise with its accuracy, and what it ruined is gone."""
    run, todo = variant(whole, tmp_path, same_program=True, a_step_lr=30.0)
    incoming = run.validation.accuracies(run.nets, whole.variables)["synergy"]
    progress = Progress(synergy_acc=0.123)
    progress.epochs["b"] = 2
    after = runner.run_phase(run, todo["stage1/a"], whole.variables, progress)
    assert max(run.record.metrics[f"stage1/a/epoch0{epoch}/val_synergy"] for epoch in (1, 2)) < incoming
    assert same(after, whole.kept["stage2/b"])
    assert progress.synergy_acc == incoming == run.validation.accuracies(run.nets, after)["synergy"]
    assert progress.steps["a"] == 2 * STEPS  # the learning rate is not rewound
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(progress.opt_states["a"]))  # its moments were none


@pytest.mark.parametrize("classes", [(), ((0, 1, 2), (4, 3, 2)), ((0, 1), (1, 3))], ids=["all", "some", "not one"])
@pytest.mark.parametrize("base", ["avg", "mixture"])
def test_synergy_starts_as_its_base(data_file, base, classes):
    """Bitwise, on every image and in the first moments of a run; the base is another where teachers are."""
    recipe = read_recipe(f"l1_{base}", data_file, synergy_temp_learnable=True)
    nets = build.build_networks(recipe, 5)
    teachers = [model.clone(classes=known) for model, known in zip(nets.teachers, classes or ((), ()), strict=True)]
    nets = dataclasses.replace(nets, teachers=tuple(teachers))
    generator, covered = np.random.default_rng(0), nets.known.any(axis=0)
    variables = Variables({**random_variables(nets).params, **ensemble.init_fusion(nets, recipe.seed)}, {})
    logits = np.where(nets.known, generator.normal(0, 3, (30, 2, 5)), -np.inf).astype(np.float32)
    z = generator.normal(size=(30, 8)).astype(np.float32)
    synergy, alone, other = (
        jax.jit(functools.partial(function, nets, variables))(z, said)
        for function, said in ((ensemble.classify, logits), (ensemble.base, logits), (ensemble.base, logits[::-1]))
    )
    np.testing.assert_array_equal(synergy, alone)
    assert (np.isneginf(synergy) == ~covered).all() and not np.array_equal(alone, other)
    silent = ensemble.classify(nets, variables, z, None)
    np.testing.assert_array_equal(silent, np.broadcast_to(np.where(covered, 0, -np.inf), silent.shape))


@pytest.mark.parametrize("base", ["avg", "mixture"])
def test_an_a_step_that_only_ruins_ends_at_the_base(data_file, tmp_path, base):
    """The first A-Step of a run, too, since the state that comes in competes: synergy is never below what it started
    as on validation."""
    changes = {"a_step_lr": 300.0, "student_epochs_per_stage": (1,), "ib_mbm_kv": "feat_prob"}
    run, variables, todo = start(read_recipe(f"l1_{base}", data_file, **changes), tmp_path)
    for k, name in enumerate(run.nets.teacher_names):  # each output given to the class that it is largest for
        by_class = [run.validation.teacher_logits[run.data.validation.label == label, k].mean(0) for label in range(5)]
        order, layer = linear_sum_assignment(by_class, maximize=True)[1], variables.params[name]["classifier"]
        layer.update(kernel=layer["kernel"][:, order], bias=layer["bias"][order])
    run.validation.read_teachers(variables)
    progress = Progress()
    after = runner.run_phase(run, todo["stage1/a"], variables, progress)
    metrics = {name: value for name, value in run.record.metrics.items() if "/val_" in name}
    assert metrics["stage1/a/before/val_synergy"] == metrics["stage1/a/before/val_base"] == progress.synergy_acc
    assert all(metrics[f"stage1/a/epoch0{epoch}/val_synergy"] < progress.synergy_acc for epoch in (1, 2))
    found = run.validation.accuracies(run.nets, after)
    assert found["synergy"] == found["base"] == progress.synergy_acc
    assert same(after, variables)


@pytest.mark.parametrize("restore_best", [True, False])
def test_b_step_continues_from_the_best_epoch_of_the_run(whole, tmp_path, restore_best):
    """An epoch that learns, then one at a thousand times the rate; with restore_best the first one continues."""
    schedule = dataclasses.replace(whole.run.recipe.schedule, type="multistep", gamma=1e3, milestones=(1,))
    run, todo = variant(whole, tmp_path, same_program=True, schedule=schedule, restore_best=restore_best)
    progress = Progress(synergy_acc=0.9)
    after = jax.device_get(runner.run_phase(run, todo["stage1/b"], whole.variables, progress))
    logged = {
        name: [run.record.metrics[f"stage1/b/epoch0{epoch}/{name}"] for epoch in (1, 2)]
        for name in ("val_student", "lr")
    }
    np.testing.assert_allclose(logged["lr"], [0.01, 10.0], rtol=1e-6)
    accuracies, best, last = logged["val_student"], progress.best["student"], progress.last["student"]
    assert accuracies[0] > accuracies[1] and best.when == "B-Step, stage 1, epoch 1"
    continued, given_up = (best.held, last) if restore_best else (last, best.held)
    student = {name: leaves for name, leaves in after.params["student"].items() if name != "distill_adapter"}
    assert same({"params": {"student": student}, "batch_stats": {"student": after.batch_stats["student"]}}, continued)
    assert not same(continued, given_up)
    assert run.validation.accuracies(run.nets, after)["student"] == accuracies[0 if restore_best else 1]
    adapter = whole.kept["stage2/b"].params["student"]["distill_adapter"]
    assert same(after.params["student"]["distill_adapter"], adapter)
    assert (progress.opt_states["b"] is None) == restore_best and progress.steps["b"] == 2 * STEPS


def test_best_epoch_of_an_earlier_stage_still_counts(whole, tmp_path):
    run, todo = variant(whole, tmp_path, same_program=True, student_epochs_per_stage=(1,))
    own = jax.device_get(whole.variables.of("student"))
    best = Best(1.1, "an earlier one", {part: {"student": leaves} for part, leaves in own.items()})
    progress = Progress(synergy_acc=0.9, best={"student": best})
    after = runner.run_phase(run, todo["stage1/b"], whole.variables, progress)
    assert same(after, whole.kept["stage2/b"]) and progress.best["student"].when == "an earlier one"
    assert not same(progress.last["student"]["params"]["student"]["stage0"], own["params"]["stage0"])


# Freezing ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("level, freeze_bn", [(-1, True), (0, False), (1, False), (2, True)])
def test_frozen_stages_stand_still_and_the_others_do_not(whole, tmp_path, level, freeze_bn):
    """Bitwise, parameters and statistics, over AdamW steps with decay; at level 0 the head alone trains (SPEC 10.8)."""
    run, todo = variant(
        whole,
        tmp_path,
        use_partial_freeze=True,
        student_freeze_level=(level,),
        restore_best=False,
        student_freeze_bn=freeze_bn,
        student_epochs_per_stage=(1,),
        **LABELS_ALONE,
    )
    before = whole.kept["stage2/b"]
    after = jax.device_get(runner.run_phase(run, todo["stage1/b"], whole.variables, progress := Progress()))
    trains = ("stage0", "stage1", "stage2")[0 if level == -1 else 3 - level :]
    for stage in ("stage0", "stage1", "stage2"):
        old, new = before.params["student"][stage], after.params["student"][stage]
        assert same(old["conv"], new["conv"]) == (stage not in trains)
        assert same(old["bn"], new["bn"]) == (stage not in trains or freeze_bn)
        statistics = before.batch_stats["student"][stage], after.batch_stats["student"][stage]
        assert same(*statistics) == (stage not in trains or freeze_bn)
    assert not same(before.params["student"]["classifier"], after.params["student"]["classifier"])
    moments = optax.tree.get(progress.opt_states["b"], "mu")["student"]
    assert moments.keys() == {*trains, "classifier"}
    assert all(("bn" in moments[stage]) != freeze_bn for stage in trains)


def test_levels_by_stage_carry_the_moments(whole, tmp_path):
    """From everything to the last stage: the second stage goes on with the Adam state of what still trains."""
    changes = {
        "use_partial_freeze": True,
        "student_freeze_level": (-1, 1),
        "restore_best": False,
        "student_epochs_per_stage": (1, 1),
        **LABELS_ALONE,
    }
    run, todo = variant(whole, tmp_path, **changes)
    progress = Progress()
    middle = runner.run_phase(run, todo["stage1/b"], whole.variables, progress)
    first = progress.opt_states["b"]
    assert optax.tree.get(first, "mu")["student"].keys() == {"stage0", "stage1", "stage2", "classifier"}
    kept_first = jax.tree.map(np.copy, jax.device_get(first))
    # A second stage at a rate of zero, with the carried moments and without: only their history differs.
    still = changes | {"student_lr": 0.0, "schedule": dataclasses.replace(run.recipe.schedule, min_lr=0.0)}
    states = []
    for moments in (first, None):
        another, others = variant(whole, tmp_path, **still)
        with_or_without = Progress(opt_states={"b": moments}, best={"student": Best()})
        runner.run_phase(another, others["stage2/b"], middle, with_or_without)
        states.append(with_or_without.opt_states["b"])
    carried, without = (optax.tree.get(state, "mu")["student"] for state in states)
    assert carried.keys() == {"stage2", "classifier"}
    assert int(optax.tree.get(states[0], "count")) == 2 * STEPS
    for name in carried:
        jax.tree.map(
            lambda a, b, old: np.testing.assert_allclose(a - b, 0.9**STEPS * old, rtol=1e-3, atol=1e-6),
            carried[name],
            without[name],
            optax.tree.get(kept_first, "mu")["student"][name],
        )


def test_finetuned_teachers_move_within_their_levels_and_never_their_classifiers(whole, tmp_path):
    """SPEC 6: teacher 1 trains its last stage with its statistics, teacher 2 all stages but no normalisation."""
    first, second = whole.run.recipe.teachers
    teachers = (
        dataclasses.replace(first, freeze_level=(1,), freeze_bn=False),
        dataclasses.replace(second, freeze_level=(-1,), freeze_bn=True),
    )
    before = whole.kept["calibration"]  # its fusion network has yet to learn: the incoming state is not the best
    run, todo = variant(
        whole,
        tmp_path,
        train_distill_adapter_only=False,
        use_teacher_finetuning=True,
        teachers=teachers,
        use_partial_freeze=True,
        a_step_weight_decay=0.1,
        reg_lambda=0.1,
        student_epochs_per_stage=(1,),
        schedule=dataclasses.replace(whole.run.recipe.schedule, type="multistep", gamma=1e3, milestones=(1,)),
        variables=before,
    )
    progress = Progress()
    after = jax.device_get(runner.run_phase(run, todo["stage1/a"], before, progress))

    def changes(name):
        tree = {part: (getattr(before, part)[name], getattr(after, part)[name]) for part in ("params", "batch_stats")}
        changed = {
            child
            for child in tree["params"][0]
            if child not in ("stage0", "stage1") and not same(tree["params"][0][child], tree["params"][1][child])
        }
        for stage in ("stage0", "stage1"):
            changed |= {
                f"{stage}/{child}"
                for child, leaf in tree["params"][0][stage].items()
                if not same(leaf, tree["params"][1][stage][child])
            }
            changed |= set() if same(*(stats[stage] for stats in tree["batch_stats"])) else {f"{stage} statistics"}
        return changed

    assert changes("teacher1") == {"stage1/conv", "stage1/bn", "stage1 statistics", "distill_adapter"}
    assert changes("teacher2") == {"stage0/conv", "stage1/conv", "distill_adapter"}
    assert changes("student") - {"stage2"} == {"distill_adapter"}
    wanted = [
        model.apply(after.of(name), jnp.float32(run.data.validation.image), train=False).logit
        for name, model in zip(run.nets.teacher_names, run.nets.teachers)
    ]
    first, ruined = (run.record.metrics[f"stage1/a/epoch0{epoch}/val_synergy"] for epoch in (1, 2))
    assert progress.synergy_acc == first > ruined  # what is read of the teachers is of the epoch that is restored
    assert run.validation.accuracies(run.nets, after)["synergy"] == first
    (held,) = run.validation.bank.of("teachers").host["teachers"]
    np.testing.assert_allclose(held.logits, np.stack(wanted, axis=1), rtol=1e-4, atol=1e-4)


# Seeds ---------------------------------------------------------------------------------------------------------------


def test_every_config_of_the_ladder_starts_from_the_same_student_and_batches(data_file):
    """SPEC 7: bitwise the same initial backbone and classifier, split, order and augmentation; another seed, others."""
    initialise = functools.cache(init_network)  # many configs have equal networks

    def beginning(name, seed=0):
        recipe = read_recipe(name, data_file, seed=seed)
        data = build.load_data(recipe)
        nets = build.build_networks(recipe, data.num_classes)
        student = jax.tree.map(jnp.copy, initialise(nets.student, recipe.seed, "student", data.image_shape))
        assert ("distill_adapter" in student["params"]) == recipe.uses_fusion
        student["params"].pop("distill_adapter", None)
        shapes = build.variable_shapes(recipe, nets, data.image_shape)
        todo = train.phases_of(recipe, nets, shapes.params, {"train": len(data.train.label)}, {})
        steps = [phase for phase in todo if phase.optimizer == "b"]
        batches = [row for phase in steps for row in data.train.index[training_rows(80, 8, phase.order(1))]]
        keys = [jax.random.key_data(phase.controls(Progress(), 1)["augment_key"]) for phase in steps]
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
    run, variables, todo = start(
        read_recipe("l1_ib", data_file, a_step_views=2, b_step_views=2, **{"dataset.data_aug": 1}), tmp_path
    )
    images, index = np.asarray(run.data.train.image), run.data.train.index
    read = jax.jit(
        lambda key: {
            "teachers": run_teachers(run.nets, variables, augment(key, index, images, 1))[0],
            "student": run_student(run.nets, variables, augment(key, index, images, 1)),
        }
    )
    seen, sizes = [], Sizes(run.data.train.label, 23, (8, 8, 3), 5, "")
    for name, epoch in (("stage1/b", 0), ("stage1/b", 1), ("stage2/b", 1), ("stage1/a", 0), ("stage2/a", 1)):
        phase = todo[name]
        run.read_student(variables, phase.views)
        stored = {who: run.bank.of(who, phase.views[epoch]).resident[who] for who in phase.reads}
        assert set(stored) == ({"teachers", "student"} if name.endswith("a") else {"teachers"})
        key = phase.controls(Progress(), epoch)["augment_key"]
        expected, planned = read(key), plan.batch_shapes(sizes, 8, run.nets, phase.reads)
        for who in stored:
            jax.tree.map(
                lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), stored[who], expected[who]
            )
            jax.tree.map(
                lambda leaf, shape: np.testing.assert_equal(
                    (leaf.dtype, leaf.shape[1:]), (shape.dtype, shape.shape[1:])
                ),
                stored[who],
                planned[who],
            )
        seen.append(key)
    assert seen[1] == seen[2] == seen[4] != seen[0] == seen[3]  # the fourth epoch of the run sees the second view


def two_stages(data_file, folder, **changes):
    """l3_tadapt over two stages by plain SGD, whose rounding does not grow: the variables before and after, the run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            a_step,
            "make_optimizer",
            plain := lambda kind, **options: make_optimizer("sgd", **options | {"momentum": 0.0}),
        )
        patch.setattr(b_step, "make_optimizer", plain)
        run, variables, todo = start(
            read_recipe(
                "l3_tadapt",
                data_file,
                a_step_lr=0.05,
                student_lr=0.02,
                restore_best=False,
                **{"dataset.data_aug": 1},
                **changes,
            ),
            folder,
        )
        before = jax.device_get(variables)
        return before, jax.device_get(run_all(run, variables, todo)[0]), run, todo


def test_run_from_stored_views_is_the_run_that_streams_them(data_file, tmp_path):
    """As many views as epochs are what streaming draws; every variable after two stages agrees to 1e-5, whether outputs
    are stored on one device, spread over four, or, for want of memory, in part or not at all, and then computed from
    the same views; and however many steps a call does."""
    before, streamed, plain, _ = two_stages(data_file, tmp_path / "streamed")
    assert {"student/stage0", "ib_mbm/mu", "teacher1/distill_adapter"} <= moved(before, streamed)
    largest = max(np.abs(a - b).max() for a, b in zip(jax.tree.leaves(before.params), jax.tree.leaves(streamed.params)))
    assert largest > 0.01
    for name, changes, count in (
        ("device", {"steps_per_call": 5}, 4),
        ("four", {"num_devices": 4}, 4),
        ("some", {"device_data_gb": 56_000 / 2**30}, 2),
        ("none", {"device_data_gb": 0.0, "steps_per_call": 2}, 0),
    ):
        _, stored, run, todo = two_stages(data_file, tmp_path / name, a_step_views=4, b_step_views=4, **changes)
        views = {view for phase in todo.values() for view in phase.views}
        assert len(views) == 4 and sum(run.bank.of("teachers", view) is not None for view in views) == count, name
        assert not any(run.bank.of("student", view) for view in views)  # which trains again
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), stored, streamed)
        for key in (key for key in plain.record.metrics if key.startswith("stage")):
            np.testing.assert_allclose(run.record.metrics[key], plain.record.metrics[key], rtol=1e-4, err_msg=key)
    _, fewer, _, _ = two_stages(data_file, tmp_path / "fewer", a_step_views=1, b_step_views=1)
    assert not same(fewer.params["student"]["stage0"], streamed.params["student"]["stage0"])


def test_control_is_the_run_of_labels_alone(whole, data_file, tmp_path):
    """`train_control` of the fusion run and a run of ce_only: bitwise the same last and best student."""
    recipe = dataclasses.replace(whole.run.recipe, train_control=True)
    own = build.initial(recipe, whole.run.nets, whole.run.data.image_shape).variables
    run, todo = variant(
        whole,
        tmp_path,
        train_control=True,
        variables=Variables(
            whole.variables.params | {"control": own.params["control"]},
            whole.variables.batch_stats | {"control": own.batch_stats["control"]},
        ),
    )
    drawn = Variables({"control": own.params["control"]}, {"control": own.batch_stats["control"]})
    _, control = run_all(
        run,
        devices.replicate(drawn, run.feed.devices),
        {name: phase for name, phase in todo.items() if phase.network == "control"},
    )
    alone, variables, phases_alone = start(read_recipe("ce_only", data_file), tmp_path)
    _, progress = run_all(alone, variables, phases_alone)
    assert same(
        control.last["control"],
        {part: {"control": leaves["student"]} for part, leaves in progress.last["student"].items()},
    )
    assert same(control.best["control"].held["params"]["control"], progress.best["student"].held["params"]["student"])
    assert progress.distilled_steps == {"labels only": 4 * STEPS} and not control.distilled_steps
    assert run.record.metrics["control/stage2/b/epoch02/loss"] == alone.record.metrics["stage2/b/epoch02/loss"]
    assert (
        run.record.metrics["control/stage1/b/epoch01/val_control"]
        == alone.record.metrics["stage1/b/epoch01/val_student"]
    )
    assert not same(
        control.last["control"]["params"]["control"]["stage0"],
        whole.progress.last["student"]["params"]["student"]["stage0"],
    )


def test_first_stage_is_the_same_on_four_devices(whole, tmp_path):
    """Every loss and share of the training metrics to 1e-3: Adam lets rounding grow, though not that far."""
    run, variables, todo = start(dataclasses.replace(whole.run.recipe, num_devices=4), tmp_path)
    run_all(run, variables, {name: todo[name] for name in ("calibration", "stage1/a", "stage1/b")})
    assert len(run.feed.devices) == 4
    compared = [key for key in run.record.metrics if key.startswith("stage") and "/val_" not in key]
    assert len(compared) > 40
    for key in compared:
        np.testing.assert_allclose(run.record.metrics[key], whole.metrics[key], rtol=1e-3, atol=1e-6, err_msg=key)


def test_stages_repeat_bitwise(whole, tmp_path):
    """The same recipe again: bitwise the same variables and metrics."""
    run, variables, todo = start(whole.run.recipe, tmp_path)
    run.steps.update(whole.run.steps)
    variables, _ = run_all(run, variables, todo)
    assert same(variables, whole.kept["stage2/b"])
    metrics, before = (
        {key: value for key, value in metrics.items() if not key.startswith("time/")}
        for metrics in (run.record.metrics, whole.metrics)
    )
    assert metrics == before
    assert (run.record.folder / "checkpoints" / "stage1_last").is_dir()


def test_float16_stages_scale_their_losses(data_file, tmp_path):
    run, variables, todo = start(
        read_recipe("l3_tadapt", data_file, use_amp=True, amp_dtype="float16", student_epochs_per_stage=(1, 1)),
        tmp_path,
    )
    run_all(run, variables, todo)
    for key in ("stage1/a/epoch01", "stage1/b/epoch01", "stage2/b/epoch01"):
        assert 0 <= run.record.metrics[f"{key}/skipped"] < STEPS
    assert {step.compiled._cache_size() for step in run.steps.values()} == {1}
