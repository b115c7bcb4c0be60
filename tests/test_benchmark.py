"""The benchmark: projections and operations against counts by hand, and a whole measurement of tiny networks."""

import json
import math
import time
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from launching import launch
from networks import convolutions, full_size_shapes

from asib_jax import build, recipe as recipes
from asib_jax.models import MODELS
from asib_jax.recipe import checks
from asib_jax.tools import benchmark, benchmark_report, cost, device_check, workloads
from configs import l2_cccp, l4_full

RATES = {"a_streaming": 10, "a_stored": 200, "b_streaming": 5, "b_stored": 20, "read_teachers": 50, "read_student": 400}
TINY = {
    "model.student.name": "tiny_scratch",
    "teacher1.name": "tiny_teacher",
    "teacher2.name": "tiny_teacher",
    "num_devices": 1,
    "distill_out_dim": 8,
    "ib_mbm_out_dim": 8,
    "ib_mbm_n_head": 2,
    "dataset.train_subset": 70,
    "a_step_views": 3,
    "b_step_views": 0,
}


def read(module, profile, **changes):
    config = module.get_config(profile)
    config.update_from_flattened_dict(changes)
    return workloads.synthetic(recipes.read(config))


@pytest.mark.parametrize(
    "a_views, b_views, seconds",
    [
        (0, 0, 8 * 90 / 10 + 7 * 90 / 5),
        # One view: the teachers read it once, the student in both stages.
        (1, 1, 100 / 50 + 2 * 100 / 400 + 8 * 90 / 200 + 7 * 90 / 20),
        # The A-epochs 0..3 and 4..7 modulo 3 are the views 0 1 2 0 and 1 2 0 1.
        (3, 0, 3 * 100 / 50 + 6 * 100 / 400 + 8 * 90 / 200 + 7 * 90 / 5),
        # As many views as A-epochs, four a stage; the B-Step's first three epochs have views of these, too.
        (8, 3, 8 * 100 / 50 + 8 * 100 / 400 + 8 * 90 / 200 + 7 * 90 / 20),
        # Two of the A-Step are among the six of the B-Step: five epochs of its first stage and one of the second.
        (2, 6, 6 * 100 / 50 + 4 * 100 / 400 + 8 * 90 / 200 + 7 * 90 / 20),
    ],
)
def test_projection_of_a_run(a_views, b_views, seconds):
    """Two stages of 4 A-epochs with 5 and 2 B-epochs; 100 images, of which an epoch's batches take 90."""
    found = benchmark.project(RATES, *described((4, 4), (5, 2), a_views, b_views), images=100, epoch_images=90)
    assert found == pytest.approx(seconds, rel=1e-12)


def test_projection_of_one_a_step():
    """Five epochs with three views; no rate of a B-Step is needed."""
    rates = {name: RATES[name] for name in ("a_stored", "read_teachers", "read_student")}
    found = benchmark.project(rates, *described((5,), (), 3, 0), images=100, epoch_images=90)
    assert found == pytest.approx(3 * 100 / 50 + 3 * 100 / 400 + 5 * 90 / 200, rel=1e-12)


def test_projection_where_some_views_do_not_fit():
    """Of three views one is held: of six epochs two read it, four run the networks."""
    phases, _ = described((6,), (), 3, 0)
    found = benchmark.project(RATES, phases, frozenset({(0, 1)}), images=100, epoch_images=90)
    expected = (
        100 / RATES["read_teachers"]
        + 100 / RATES["read_student"]
        + 90 * (2 / RATES["a_stored"] + 4 / RATES["a_streaming"])
    )
    assert found == pytest.approx(expected, rel=1e-12)


def described(a_lengths, b_lengths, a_views, b_views):
    """What phases of these lengths say of their epochs, and all views that they read, stored."""

    def views(lengths, stage, count):
        numbers = [sum(lengths[:stage]) + epoch for epoch in range(lengths[stage])]
        starts = [(s, e) for s, length in enumerate(lengths) for e in range(length)]
        return tuple(starts[number % count] if count else starts[number] for number in numbers)

    phases = [
        SimpleNamespace(
            optimizer="a", views=views(a_lengths, stage, a_views), reads={"teachers", "student"} if a_views else set()
        )
        for stage in range(len(a_lengths))
    ]
    phases += [
        SimpleNamespace(optimizer="b", views=views(b_lengths, stage, b_views), reads={"teachers"} if b_views else set())
        for stage in range(len(b_lengths))
    ]
    return phases, frozenset(view for phase in phases if phase.reads for view in phase.views)


def test_ratios_are_of_the_same_round():
    assert benchmark.paired_ratio([2, 8, 30], [1, 2, 10]) == 3  # of 2, 4 and 3; the medians' would be 4


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_products_in_the_run_s_type(dtype):
    (product,) = device_check.matmuls(jax.devices()[:1], 96, dtype)
    assert product.rate > 0 and product.error < 1e-5


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """Of networks of two convolutions and of one, on random digits, with a rival of 3200 images a second at most."""

    def rival(recipe, data, platform):
        def work(seconds):
            time.sleep(0.01)
            return 32

        return {"torch_a": work, "torch_b": work}

    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(MODELS, "tiny", lambda small_input: convolutions(8, 16))
        patch.setitem(MODELS, "tiny_teacher", lambda small_input: convolutions(16))
        patch.setattr(device_check, "matmul_size", lambda platform: 96)
        recipe = read(l2_cccp, "digits", **TINY)
        report = benchmark.measure(recipe, random=True, seconds=0.0, rival=rival)
        nets = build.build_networks(recipe, 10)
    jax.config.update("jax_disable_most_optimizations", False)
    return {"config": "tiny", **report}, nets


def test_what_does_not_fit_is_not_measured_as_stored():
    """The bank holds no view: there is no A- or B-Step from stored outputs."""
    bank = SimpleNamespace(of=lambda who, view: None)
    phase = SimpleNamespace(reads={"teachers"}, views=((0, 0),))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workloads, "phase_of", lambda context, variables, kind: phase)
        context = SimpleNamespace(bank=bank, recipe=SimpleNamespace(uses_fusion=True))
        assert workloads.stored_works(context, None) == {}
        bank.of = lambda who, view: "held"
        assert set(workloads.stored_works(context, None)) == {"a_stored", "b_stored"}


def numbers(value) -> list[float]:
    if isinstance(value, dict | list):
        return [n for part in (value.values() if isinstance(value, dict) else value) for n in numbers(part)]
    return [value] if isinstance(value, int | float) and not isinstance(value, bool) else []


def test_everything_is_measured(report):
    """Every figure is a finite, positive one and survives JSON; what follows from others does."""
    report = json.loads(json.dumps(report[0]))
    steps = {"a_streaming", "a_stored", "b_streaming", "b_stored"}
    rates, rounds = report["images_per_second"], report["images_per_second_of_each_round"]
    assert rates.keys() == rounds.keys() == report["warm_up"].keys() == benchmark.TITLES.keys()
    for key in ("flops_per_image", "flops_per_second", "share_of_matmul", "ratio_to_torch"):
        assert report[key].keys() == steps
    measured = [
        report[key]
        for key in (
            "images_per_second",
            "images_per_second_of_each_round",
            "view_seconds",
            "first_step_seconds",
            "matmul_flops_per_second",
            "flops_per_image",
            "share_of_matmul",
            "ratio_to_torch",
        )
    ]
    measured += [[warm["first_call_seconds"], warm["peak_bytes"]] for warm in report["warm_up"].values()]
    assert all(math.isfinite(n) and n > 0 for n in numbers(measured)) and len(numbers(measured)) > 80
    assert all(warm["compile_seconds"] >= 0 for warm in report["warm_up"].values())
    assert all(len(values) == report["rounds"] == 5 for values in rounds.values())
    assert (report["images"], report["devices"], report["batch_size"]) == ({"train": 70, "validation": 252}, 1, 32)
    for name in steps:
        rate = np.median(rounds[name])
        assert report["share_of_matmul"][name] == pytest.approx(
            rate * report["flops_per_image"][name] / report["matmul_flops_per_second"], rel=1e-9
        )
        ratios = np.divide(rounds[name], rounds[f"torch_{name[0]}"])
        assert report["ratio_to_torch"][name] == pytest.approx(np.median(ratios), rel=1e-9)
    assert 0 < rates["torch_a"] <= 3200
    assert report["view_seconds"]["read_student"] == pytest.approx(70 / rates["read_student"], rel=1e-9)


def test_projections_are_of_the_rates(report):
    """The A-Step alone and the whole run, each with the configuration's views and with one."""
    report = report[0]
    rows, rates = report["projected_from_rates"], report["images_per_second"]
    assert [(row["part"], row["a_views"], row["b_views"]) for row in rows] == [
        ("A-Step of 8 epochs", 3, 0),
        ("whole run", 3, 0),
        ("A-Step of 8 epochs", 1, 0),
        ("whole run", 1, 1),
    ]
    reading = {name: 70 / rates[name] for name in ("read_teachers", "read_student")}
    a_epoch, b_epoch = 64 / rates["a_stored"], 64 / rates["b_streaming"]
    expected = 3 * reading["read_teachers"] + 6 * reading["read_student"] + 16 * a_epoch + 60 * b_epoch
    assert rows[1]["seconds"] == pytest.approx(expected, rel=1e-9)
    for row in rows:
        a_epochs, b_epochs = (8, 0) if row["part"].startswith("A") else (16, 60)
        theirs = a_epochs * 64 / rates["torch_a"] + b_epochs * 64 / rates["torch_b"]
        assert row["torch_seconds"] == pytest.approx(theirs, rel=1e-9)
        assert row["ratio"] == pytest.approx(row["torch_seconds"] / row["seconds"], rel=1e-9)


def test_the_text_shows_the_figures(report):
    report = report[0]
    lines = benchmark_report.text(report).splitlines()
    assert lines[0].startswith("tiny, random images and weights: tiny, tiny_teacher, tiny_teacher; 70 training and ")
    (line,) = [line for line in lines if line.startswith("B-Step, stored outputs")]
    cells = line.removeprefix("B-Step, stored outputs").split()
    rate = report["images_per_second"]["b_stored"]
    assert float(cells[0].replace(",", "")) == round(rate)
    assert cells[3:5] == [
        f"{report['ratio_to_torch']['b_stored']:.2f}",
        f"{report['flops_per_image']['b_stored'] / 1e6:,.2f}",
    ]


def forward_flops(model, count: int) -> float:
    """Of an image of a batch of `count`."""
    image = jax.ShapeDtypeStruct((count, 8, 8, 1), jnp.uint8)
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), train=False))

    return cost.flops(lambda *inputs: model.apply(*inputs, train=False).logit, shapes, image) / count


def test_operations_of_the_steps(report):
    """What stored outputs save are forward passes: of the teachers in the B-Step (to 1 %), of the student, too, in the
    A-Step, whose augmentation goes with them (to 5 %)."""
    report, nets = report
    flops = report["flops_per_image"]
    teachers, student = sum(forward_flops(model, 32) for model in nets.teachers), forward_flops(nets.student, 32)
    assert flops["b_streaming"] - flops["b_stored"] == pytest.approx(teachers, rel=0.01)
    assert flops["a_streaming"] - flops["a_stored"] == pytest.approx(teachers + student, rel=0.05)


def test_operations_of_the_b_step_by_hand(report):
    """Three times the student's convolutions, but for the first one's image, and the rest below a third of that."""
    # 8 positions of a kernel's 3 entries along an axis: 22 of the 24 meet the image; 4 with stride 2: 11 of 12. A
    # multiply-add is two operations.
    first, second = 2 * 22**2 * 1 * 8, 2 * 11**2 * 8 * 16
    convolved = 2 * first + 3 * second
    assert convolved < report[0]["flops_per_image"]["b_stored"] < 1.33 * convolved


@pytest.mark.parametrize("profile", ["", "small", "digits"])
def test_random_networks_take_no_weights(profile):
    """The same networks and training otherwise, and nothing that a check finds missing; given weights are ignored."""
    given = recipes.read(l2_cccp.get_config(profile))
    found = read(l2_cccp, profile, **{"teacher1.weights": "/nowhere.safetensors"})
    checks.check(found)
    assert not any(network.weights for network in (found.model.student, *found.teachers))
    assert [network.name for network in found.teachers] == [network.name for network in given.teachers]
    assert found.model.student.name == given.model.student.name.removesuffix("_scratch")
    assert (found.dataset, found.b_epochs, found.schedule) == (given.dataset, given.b_epochs, given.schedule)


def test_a_temperature_that_is_to_be_found_divides_by_nothing_yet():
    recipe = read(l2_cccp, "digits", **{"teacher1.temperature": 0.0, "teacher2.temperature": 3.0})
    np.testing.assert_array_equal(build.temperatures(recipe), [1, 3])


def test_random_images_of_the_published_size():
    """CIFAR-100 has 50,000 training images; a twentieth is validation here, and the student sees as many as asked."""
    recipe = read(l2_cccp, "", **{"dataset.val_fraction": 0.05, "dataset.train_subset": 640, "dataset.path": ""})
    data = workloads.synthetic_data(recipe)
    assert [len(split.label) for split in data[:4]] == [640, 47_500, 2500, 10_000]
    assert data.num_classes == 100 and data.image_shape == (32, 32, 3)
    pixels = np.asarray(data.train.image)
    assert pixels.dtype == np.uint8 and abs(pixels.mean() - 127.5) < 0.5 and not (pixels[0] == pixels[1]).all()
    np.testing.assert_array_equal(np.bincount(data.validation.label), [25] * 100)


@pytest.mark.pytorch
@pytest.mark.parametrize("name", ["resnet8", "resnet56", "resnet101", "convnext_l"])
def test_pytorch_has_the_same_networks(name):
    """As many parameters as ours with the small stem, without the statistics."""
    import torch
    import torch_networks

    assert set(torch_networks.NAMED) <= MODELS.keys()
    with torch.device("meta"):
        network = torch_networks.by_name(name, True, 100)
    ours = sum(leaf.size for leaf in jax.tree.leaves(full_size_shapes(name, 100, True)["params"]))
    assert sum(parameter.numel() for parameter in network.parameters()) == ours


@pytest.mark.pytorch
def test_pytorch_s_steps():
    """They work on whole batches, one at least, and for as long as they are told."""
    import torch_benchmark

    changes = {f"teacher{k}.name": "resnet8" for k in (1, 2)} | {"dataset.train_subset": 100, "dataset.batch_size": 40}
    recipe = read(l2_cccp, "small", **changes)
    torch_benchmark.check(recipe, 1)
    torch_benchmark.check(read(l2_cccp, "own"), 1)  # whose channels the data tell
    works = torch_benchmark.works(recipe, workloads.synthetic_data(recipe), "cpu")
    assert works.keys() == {"torch_a", "torch_b"}
    for work in works.values():
        assert work(0.0) == 40
        assert work(0.05) % 40 == 0


@pytest.mark.pytorch
@pytest.mark.parametrize(
    "module, profile, changes, message",
    [
        (l4_full, "small", {}, "use_partial_freeze=True, but the PyTorch version has 0 only"),
        (l2_cccp, "digits", {"dataset.data_aug": 1}, "colour images, which dataset.name='digits' has not"),
        (l2_cccp, "small", {"dataset.data_aug": 2}, "dataset.data_aug is 2; the PyTorch version has 0, 1, 3"),
        (l2_cccp, "small", {"teacher1.name": "wrn_16_2"}, "a network's name is 'wrn_16_2'; the PyTorch version has"),
    ],
)
def test_what_pytorch_has_not(module, profile, changes, message):
    import torch_benchmark

    with pytest.raises(ValueError, match=message):
        torch_benchmark.check(read(module, profile, **changes), 1)


def test_errors_come_before_any_work():
    """A configuration of teachers alone, or of copies, which no step runs; weights that are missing where random ones
    are not asked for."""
    for arguments, message in (
        (["--config=configs/finetune_resnet152_cifar100.py", "--synthetic"], "teachers_only=True"),
        (["--config=configs/l2_cccp.py:digits", "--config.teacher_folds=2", "--synthetic"], "teacher_folds=2"),
        (["--config=configs/l2_cccp.py:small"], "teacher1 (resnet56) has no weights"),
    ):
        result = launch("benchmark", *arguments)
        assert result.returncode == 2 and result.stderr.startswith("error: ") and message in result.stderr
