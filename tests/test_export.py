"""A run's student under PyTorch's names: read back bitwise here, and run by torchvision."""

import collections
import json
import pathlib

import jax
import numpy as np
import pytest
from disk import longest_file
from launching import launch
from safetensors import safe_open

from asib_jax import build, recipe as recipes
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Networks, Variables, init_network
from asib_jax.record import finished
from asib_jax.record.experiment import Record
from asib_jax.tools import export
from asib_jax.weights import checkpoint, origins, reading
from configs import ce_only


def build_student(name="resnet8", small_input=True, shape=(8, 8, 1), **changes):
    """A config with the student called `name`, for 10 classes, its model and the shapes of its variables."""
    config = ce_only.get_config("digits")
    config.update_from_flattened_dict({"model.student.name": name, "dataset.small_input": small_input, **changes})
    recipe = recipes.read(config)
    model = build.build_networks(recipe, 10).student
    with jax.disable_jit():  # initialisers name options for a compiler
        return config, model, jax.eval_shape(lambda: init_network(model, 0, "student", shape))


def draw(shapes, seed):
    generator = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda leaf: generator.normal(size=leaf.shape).astype(np.float32), shapes)
    return jax.tree_util.tree_map_with_path(lambda path, leaf: np.abs(leaf) if "var" in str(path[-1]) else leaf, drawn)


def save_run(folder, config, model, students):
    record = Record.create(folder, "test", "", config.to_dict())
    last = students["last"]
    variables = Variables({"student": last["params"]}, {"student": last["batch_stats"]})
    finished.save(
        record, recipes.read(config), Networks(model), finished.Finished(variables, students, collections.Counter())
    )
    return record.folder


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config, model, shapes = build_student()
    students = {"best": draw(shapes, 0), "last": draw(shapes, 1)}
    return save_run(tmp_path_factory.mktemp("results"), config, model, students), model, shapes, students


@pytest.mark.parametrize("student", ["best", "last"])
@pytest.mark.parametrize("kind", ["safetensors", "npz"])
def test_comes_back_bitwise(run, tmp_path, student, kind):
    folder, model, shapes, students = run
    path, _ = export.export(folder, student, kind, tmp_path / f"weights.{kind}")
    back, fresh = reading.import_weights(origins.load(path), shapes, model.architecture)
    assert fresh == {}
    jax.tree.map(np.testing.assert_array_equal, back, students[student])


def test_what_the_file_says_of_itself(run):
    folder, _, _, _ = run
    path, about = export.export(folder, "best", "safetensors")
    assert path == folder / "student.safetensors"
    with safe_open(path, "numpy") as file:
        said = file.metadata()
    assert said == {
        "network": "resnet8",
        "num_classes": "10",
        "mean": "[0.305]",
        "std": "[0.376]",
        "small_input": "true",
        "run": folder.name,
        "student": "best",
    }
    assert json.loads(said["mean"]) == list(about["mean"])
    written = path.read_bytes()
    with pytest.raises(UserError, match=r"student\.safetensors exists; choose another with --out"):
        export.export(folder, "last", "safetensors")
    assert path.read_bytes() == written


@pytest.mark.parametrize(
    "student, out, message",
    [
        ("worst", None, r"--student=worst: the run in .* has best, last"),
        ("best", "student.npz", r"--out=student\.npz must end in \.safetensors"),
    ],
)
def test_what_is_refused(run, student, out, message):
    with pytest.raises(ValueError, match=message):
        export.export(run[0], student, "safetensors", out and pathlib.Path(out))


def test_a_residual_adapter_is_refused(tmp_path):
    config, model, shapes = build_student(**{"model.student.use_adapter": True})
    folder = save_run(tmp_path, config, model, {"best": draw(shapes, 0), "last": draw(shapes, 0)})
    with pytest.raises(ValueError, match=r"model\.student\.use_adapter"):
        export.export(folder, "best", "safetensors")
    assert not (folder / "student.safetensors").exists()


def test_a_network_without_batch_statistics(tmp_path):
    """Checkpoints keep no empty branch."""
    params = {"classifier": {"kernel": np.ones((2, 3), np.float32)}}
    checkpoint.save(tmp_path / "checkpoints" / "final", {"students": {"last": {"params": params, "batch_stats": {}}}})
    assert finished.load_students(tmp_path)["last"]["batch_stats"] == {}


@pytest.mark.pytorch
def test_torchvision_runs_it(tmp_path, quick_compilation):
    """MobileNetV2 with torchvision's initial weights and running statistics drawn at random."""
    import torch
    from safetensors.torch import load_file
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    origin = mobilenet_v2(num_classes=10)
    for name, buffer in origin.named_buffers():
        if name.endswith(("mean", "var")):
            buffer.uniform_(0.5, 1.0)
    state = {name: value.numpy() for name, value in origin.state_dict().items()}
    changes = {"model.student.mean": (0.4, 0.5, 0.6), "model.student.std": (0.2, 0.3, 0.4)}
    config, model, shapes = build_student("mobilenet_v2", small_input=False, shape=(64, 64, 3), **changes)
    student, _ = reading.import_weights(state, shapes, model.architecture)
    path, about = export.export(save_run(tmp_path, config, model, {"last": student}), "last", "safetensors")

    theirs = mobilenet_v2(num_classes=about["num_classes"]).eval()
    theirs.load_state_dict(load_file(path), strict=True)
    pixels = np.random.default_rng(0).integers(0, 256, (2, 64, 64, 3)).astype(np.float32)
    normalised = ((pixels / 255 - about["mean"]) / about["std"]).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.from_numpy(normalised.transpose(0, 3, 1, 2))).numpy()
    found = jax.jit(lambda variables, pixels: model.apply(variables, pixels, train=False).logit)(student, pixels)
    assert np.abs(expected).max() > 0.1
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_a_file_that_a_disk_does_not_take_leaves_nothing(run, tmp_path):
    """Not a part of one that a reader would take for the whole."""
    with longest_file(1000), pytest.raises(UserError, match=r"student.npz cannot be written \(File too large\).*--out"):
        export.export(run[0], "last", "npz", tmp_path / "student.npz")
    assert not list(tmp_path.iterdir())


def test_the_command(run, tmp_path):
    out = launch("export", f"--run={run[0]}", "--student=last", "--format=npz", f"--out={tmp_path}/last.npz")
    assert out.returncode == 0, out.stderr
    assert out.stdout.startswith(f"{tmp_path}/last.npz\n  network: resnet8\n")
    assert "conv1.weight" in origins.load(tmp_path / "last.npz")
    nothing = launch("export", f"--run={tmp_path}")
    assert nothing.returncode != 0 and "is no run folder" in nothing.stderr and "Traceback" not in nothing.stderr
