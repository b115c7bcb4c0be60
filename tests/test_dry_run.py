"""What `--dry_run` tells: the counts of a run's own data and networks, and nothing left behind."""

import importlib
import re
import socket

import pytest
from huggingface_hub import constants
from launching import ROOT, launch

from asib_jax import build, recipe as recipes
from asib_jax.data import sources
from asib_jax.recipe import checks
from asib_jax.tools import dry_run, plan as plans
from asib_jax.weights import teacher_store

LADDER = ("ce_only", "l0_baseline", "side_fusion", "l1_ib", "l2_cccp", "l3_tadapt", "l4_full", "side_cccp_ppf")
FINETUNE = sorted(path.stem for path in (ROOT / "configs").glob("finetune_*.py"))


def read_recipe(name, profile, **changes):
    config = importlib.import_module(f"configs.{name}").get_config(profile)
    config.update_from_flattened_dict(changes)
    recipe = recipes.read(config)
    checks.check(recipe)
    return recipe


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    """`configs/l4_full.py:digits` on the four devices of the tests, and its plan."""
    recipe = read_recipe("l4_full", "digits", results_dir=str(tmp_path_factory.mktemp("results")))
    return recipe, plans.make(recipe)


def test_images_are_those_of_a_run(digits):
    recipe, plan = digits
    data = build.load_data(recipe)
    assert plan.images == {
        "train": len(data.train.label),
        "teacher_train": len(data.teacher_train.label),
        "validation": len(data.validation.label),
        "test": len(data.test.label),
    }
    assert (plan.sizes.image_shape, plan.sizes.num_classes) == (data.image_shape, data.num_classes)
    assert plan.batch == 32 / 4


@pytest.mark.parametrize(
    "name, profile, images",
    [
        ("l2_cccp", "", (45_000, 45_000, 5_000, 10_000)),
        ("l2_cccp", "small", (5_000, 48_000, 2_000, 10_000)),
        ("finetune_resnet152_imagenet32", "", (1_153_050, 1_153_050, 128_117, 50_000)),  # of 1,281,167 a tenth, rounded
    ],
)
def test_images_of_published_data_sets(name, profile, images):
    recipe = recipes.read(importlib.import_module(f"configs.{name}").get_config(profile))
    sizes = sources.sizes(recipe.dataset.name)
    assert (*map(len, build.divide(recipe, sizes.labels)[:3]), sizes.test) == images


def test_too_few_images_for_a_batch():
    recipe = read_recipe("ce_only", "digits", **{"dataset.train_subset": 20})
    with pytest.raises(ValueError, match="dataset.batch_size=32 is larger than the 20 images"):
        plans.make(recipe)


def test_steps(digits):
    """1006 images in batches of 32 are 31 steps for a teacher, 100 are 3 for the student; nt and ns are 1."""
    stages = [
        ("A-Step, stage 1", 8, 24),
        ("B-Step, stage 1", 30, 90),
        ("A-Step, stage 2", 8, 24),
        ("B-Step, stage 2", 30, 90),
    ]
    control = [("control, stage 1", 30, 90), ("control, stage 2", 30, 90)]
    assert [step[:3] for step in digits[1].steps] == [("teacher1", 10, 310), ("teacher2", 10, 310), *stages, *control]


def linear(inputs, outputs):
    return inputs * outputs + outputs


def resnet(blocks, channels=1, classes=10):
    """Parameters of a CIFAR ResNet (He et al. 2016) with projection shortcuts, and its channels under BatchNorm."""
    kernels = 9 * channels * 16 + 9 * 2 * blocks * 16**2
    kernels += sum(9 * (2 * blocks - 1) * width**2 + (9 + 1) * width * width // 2 for width in (32, 64))
    normalised = 16 + 2 * blocks * (16 + 32 + 64) + 32 + 64
    return kernels + 2 * normalised + linear(64, classes), normalised


def test_parameters_counted_by_hand(digits):
    """ResNet-8, -14 and -8 for 8x8x1 images of 10 classes, each with an adapter of 64 -> 64 -> 64."""
    networks = {"student": resnet(1), "teacher1": resnet(2), "teacher2": resnet(1)}
    adapter, plan = 2 * linear(64, 64), digits[1]
    backbones = {name: count for name, (count, _) in networks.items()}
    fusion = {"ib_mbm": 8 * linear(64, 64) - 64 + 3 * 2 * 64, "synergy_head": linear(64, 64) + linear(64, 10)}
    whole = {name: count + adapter for name, count in backbones.items()} | fusion
    assert {row.role: row.parameters for row in plan.networks} == whole
    trained = [{name: count for name, (count, _) in step.trained.items()} for step in plan.steps]
    assert trained[:2] == [{"teacher1": backbones["teacher1"]}, {"teacher2": backbones["teacher2"]}]
    assert trained[2] == trained[4] == fusion | dict.fromkeys(networks, adapter)  # train_distill_adapter_only
    assert trained[3] == {"student": backbones["student"]} and trained[6] == {"control": backbones["student"]}
    frozen = 9 * 16 + 2 * 9 * 16**2 + 2 * 3 * 16  # student_freeze_level=(-1, 2): the stem and layer1 stand still
    assert trained[5] == {"student": backbones["student"] - frozen}
    assert trained[7] == {"control": backbones["student"] - frozen}
    totals = [{name: total for name, (_, total) in step.trained.items()} for step in plan.steps]
    assert all(total.items() <= whole.items() for total in totals[:6])
    assert totals[6] == totals[7] == {"control": backbones["student"]}  # which needs no adapter
    statistics = {name: 2 * normalised for name, (_, normalised) in networks.items()}
    bytes_of = {name: 4 * (whole[name] + statistics.get(name, 0)) for name in whole}
    alone = 4 * (backbones["student"] + statistics["student"])
    assert [step.networks for step in plan.steps] == [
        bytes_of["teacher1"],
        bytes_of["teacher2"],
        *[sum(bytes_of.values())] * 4,
        alone,
        alone,
    ]


def test_memory_grows_with_what_trains(digits):
    teacher, _, a_step, b_step, _, b_frozen, *_ = (step.cost for step in digits[1].steps)
    assert b_frozen.activations.kept < b_step.activations.kept < teacher.activations.kept
    assert a_step.activations.kept < b_frozen.activations.kept  # no backbone is differentiated


def test_a_stage_whose_views_do_not_fit_has_the_cost_of_running_the_networks(tmp_path):
    """Twenty-four views, of which the first stage's twelve fit: the second stage differentiates the same, but its
    operations are the teachers'."""
    recipe = read_recipe(
        "l2_cccp", "digits", results_dir=str(tmp_path), a_step_views=16, b_step_views=0, num_devices=1,
        device_data_gb=100 * (72 + 8 * 2 * 4 * (64 + 10) + 8 * 4 * (64 + 10)) / 2**30,
    )  # fmt: skip
    plan = plans.make(recipe)
    assert "8 of 16 views are not stored" in plan.stored[1]
    first, second = (step.cost for step in plan.steps if step.title.startswith("A-Step"))
    assert (first.state, first.gradients) == (second.state, second.gradients)
    assert second.activations.operation > 10 * first.activations.operation


def test_text(digits):
    lines = dry_run.text(*digits).splitlines()
    assert lines[:3] == [
        "data: digits of scikit-learn; images 8x8x1, 10 classes",
        "  100 training (student), 1,006 training (teachers), 252 validation, 539 test images",
        "batches of 32, 8 on each device, float32",
    ]
    assert re.fullmatch(r"teacher1 +resnet14 +183,290 +0\.\d{3}  trained from scratch for 10 epochs", lines[6])
    assert lines[17].endswith("  student 72,906/86,074")
    assert lines[21] == (
        "in all 1,028 steps: teacher1 10 epochs, 310 steps; teacher2 10 epochs, 310 steps; A-Step 16 "
        "epochs, 48 steps; B-Step 60 epochs, 180 steps; control 60 epochs, 180 steps"
    )
    assert lines[22].startswith("stored: the teachers' outputs on 60 view(s) of 100 training images, and the student's")


def test_teachers_of_an_earlier_run_are_not_trained_again(tmp_path):
    recipe = read_recipe("l0_baseline", "digits", results_dir=str(tmp_path), teachers_only=True)
    folder = teacher_store.find(recipe, 0).folder
    (folder / "checkpoint").mkdir(parents=True)
    assert teacher_store.kept_folder(recipe, 0) == ""  # not whole without its key
    (folder / "key.json").write_text('{"key": {}, "reference": "", "images": ""}')
    plan = plans.make(recipe)
    assert [row.role for row in plan.networks] == ["teacher1", "teacher2"]
    assert plan.networks[0].origin == f"kept by an earlier run: {teacher_store.find(recipe, 0).folder}"
    assert [step[:3] for step in plan.steps] == [("teacher2", 10, 310)]


@pytest.mark.parametrize(
    "changes, origin",
    [
        (
            {"weights": "hf:nobody/nothing", "train_epochs": 0, "finetune_epochs": 4},
            "hf:nobody/nothing (to be downloaded), fine-tuned for 4 epochs",
        ),
        ({"weights": __file__, "train_epochs": 0}, f"{__file__}, as it is"),
        ({"early_stopping_patience": 3}, "trained from scratch for at most 10 epochs"),
    ],
)
def test_where_teachers_come_from(changes, origin):
    recipe = read_recipe("l0_baseline", "digits", **{f"teacher1.{key}": value for key, value in changes.items()})
    assert plans.origin(recipe.teachers[0], teacher_store.kept_folder(recipe, 0)) == origin


@pytest.fixture
def dry_launch(tmp_path, monkeypatch, compiled):
    """`launch/main.py --dry_run` with an empty cache of weights and no network: it compiles and leaves nothing."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(socket.socket, "connect", None)

    def run(*arguments):
        programs = compiled()
        out = launch("main", "--dry_run", *arguments, f"--config.results_dir={tmp_path}/results")
        assert compiled() == programs and not list(tmp_path.iterdir())
        return out

    return run


def test_full_scale_compiles_and_downloads_nothing(dry_launch):
    """ConvNeXt-L and ResNet-152 teach a ResNet-101: counts of parameters with a 3x3 stem and 100 classes."""
    out = dry_launch("--config=configs/l2_cccp.py")
    assert out.returncode == 0, out.stderr
    for line in (
        r"data: cifar100 as published, not read; images 32x32x3, 100 classes",
        r"student +resnet101_scratch +45,320,356 ",
        r"teacher1 +convnext_l .* hf:timm/\S+ \(to be downloaded\), fine-tuned for at most 20 epochs",
        r"B-Step, stage 2 +20 +14,060 .*  student 42,697,380/45,320,356",
    ):
        assert re.search(f"^{line}", out.stdout, re.MULTILINE), line


def test_errors_are_those_of_a_run(dry_launch):
    out = dry_launch("--config=configs/l2_cccp.py:digits", "--config.enable_kd_after_syn_acc=0.05")
    assert out.returncode != 0 and "error: enable_kd_after_syn_acc=0.05 is below chance" in out.stderr


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, profile",
    [*((name, profile) for name in LADDER for profile in ("", "small", "digits")), *((name, "") for name in FINETUNE)],
)
def test_every_config(name, profile):
    weights = {f"teacher{k}.weights": __file__ for k in (1, 2)} if profile == "small" else {}
    recipe = read_recipe(name, profile, **weights)
    plan = plans.make(recipe)
    assert plan.steps and f"in all {sum(step.steps for step in plan.steps):,} steps: " in dry_run.text(recipe, plan)
