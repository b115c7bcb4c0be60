"""A finished run on disk and back: what was trained here is stored, what was imported is refound by digest."""

import collections
import dataclasses
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from asib_jax import build, recipe, teachers
from asib_jax.errors import UserError
from asib_jax.models.ensemble import Variables, init_network
from asib_jax.record import finished
from asib_jax.record.experiment import Record
from asib_jax.record.snapshots import Snapshots
from asib_jax.weights import origins
from asib_jax.weights.reading import read_weights
from configs import l1_ib

SHAPE = (8, 8, 1)


def resnet8_weights(path) -> None:
    """Random weights of a ResNet-8 for grey images and 10 classes, under PyTorch's names."""
    generator, state = np.random.default_rng(0), {}

    def conv_norm(conv, norm, outputs, inputs, kernel=3):
        state[f"{conv}.weight"] = generator.normal(size=(outputs, inputs, kernel, kernel))
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{norm}.{leaf}"] = generator.uniform(0.5, 1.5, outputs)

    conv_norm("conv1", "bn1", 16, 1)
    for layer, inputs, width in ((1, 16, 16), (2, 16, 32), (3, 32, 64)):
        conv_norm(f"layer{layer}.0.conv1", f"layer{layer}.0.bn1", width, inputs)
        conv_norm(f"layer{layer}.0.conv2", f"layer{layer}.0.bn2", width, width)
        if inputs != width:
            conv_norm(f"layer{layer}.0.downsample.0", f"layer{layer}.0.downsample.1", width, inputs, kernel=1)
    state |= {"fc.weight": generator.normal(size=(10, 64)), "fc.bias": generator.normal(size=10)}
    np.savez(path, **{name: value.astype(np.float32) for name, value in state.items()})


@pytest.fixture(scope="module")
def saved(tmp_path_factory, quick_compilation):
    """A saved run with one teacher trained here and one imported: folder, recipe, networks and what was saved."""
    tmp_path = tmp_path_factory.mktemp("run")
    resnet8_weights(tmp_path / "teacher2.npz")
    config = l1_ib.get_config("digits")
    config.teacher1.name = "resnet8"
    config.teacher2.weights, config.teacher2.train_epochs = str(tmp_path / "teacher2.npz"), 0
    settings = recipe.read(config)
    nets = build.build_networks(settings, 10)
    student = build.initial(settings, nets, SHAPE).variables
    trained = init_network(nets.teachers[0], 5, "teacher1", SHAPE)
    imported, _ = read_weights(
        settings.teachers[1].weights,
        "teacher2.weights",
        nets.teachers[1],
        init_network(nets.teachers[1], settings.seed, "teacher2", SHAPE),
        sha256="",
    )
    imported["params"]["distill_adapter"] = jax.tree.map(lambda leaf: leaf + 1, imported["params"]["distill_adapter"])
    variables = Variables(
        {**student.params, "teacher1": trained["params"], "teacher2": imported["params"]},
        {**student.batch_stats, "teacher1": trained["batch_stats"], "teacher2": imported["batch_stats"]},
    )
    done = finished.Finished(
        variables,
        {"last": variables.of("student"), "best": variables.of("student")},
        collections.Counter({"synergy": 30, "avg (gate shut)": 10}),
    )
    record = Record.create(tmp_path / "results", "l1_ib", "", config.to_dict())
    record.log("weights/teacher2", origins.digest(settings.teachers[1].weights))  # as `teachers.collect` does
    finished.save(record, settings, nets, done)
    return record.folder, settings, nets, done


def test_everything_comes_back(saved):
    """Bitwise, the imported teacher's adapter included, though its backbone is not in the checkpoint."""
    folder, settings, nets, done = saved
    assert finished.read_recipe(folder) == settings
    back = finished.load(folder, settings, nets, SHAPE)
    assert jax.tree.structure(back.variables) == jax.tree.structure(done.variables)
    jax.tree.map(np.testing.assert_array_equal, (back.variables, back.students), (done.variables, done.students))
    assert back.distilled_steps == done.distilled_steps
    stored = finished.checkpoint.restore(folder / "checkpoints" / "final")["variables"]
    assert stored["teacher2"]["params"].keys() == {"distill_adapter"} and "stem" in stored["teacher1"]["params"]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["weights/teacher2"] == origins.digest(settings.teachers[1].weights)


def test_other_weights_are_refused(saved):
    folder, settings, nets, _ = saved
    path = settings.teachers[1].weights
    with np.load(path) as arrays:
        arrays = dict(arrays)
    np.savez(path, **arrays | {"fc.bias": arrays["fc.bias"] + 1})
    with pytest.raises(ValueError, match=r"teacher2\.npz \(teacher2\.weights\) is not the file this run used"):
        finished.load(folder, settings, nets, SHAPE)
    np.savez(path, **arrays)


@pytest.mark.parametrize("read", ["a finished run", "the student", "a teacher"])
def test_only_weights_of_the_given_digest_are_read(saved, tmp_path, read):
    """Files that are no weights are refused for their digest, which is compared first."""
    folder, settings, nets, _ = saved
    (tmp_path / "w.npz").write_bytes(b"never parsed")
    given, wrong = {"weights": str(tmp_path / "w.npz"), "weights_sha256": "0" * 64}, {"weights_sha256": "0" * 64}
    first, second = settings.teachers
    student = dataclasses.replace(settings.model.student, **given)
    with pytest.raises(UserError, match=r"\.weights=.* has the SHA-256 [0-9a-f]{64}, not 0{64} of "):
        if read == "a finished run":
            changed = dataclasses.replace(settings, teachers=(first, dataclasses.replace(second, **wrong)))
            finished.load(folder, changed, nets, SHAPE)
        elif read == "the student":
            changed = dataclasses.replace(settings, model=dataclasses.replace(settings.model, student=student))
            build.initial(changed, nets, SHAPE)
        else:
            changed = dataclasses.replace(settings, teachers=(dataclasses.replace(first, **given), second))
            record = Record.create(tmp_path / "results", "l1_ib", "", {"seed": 0})
            teachers.collect(
                changed,
                nets,
                SimpleNamespace(image_shape=SHAPE, sees=None, teacher_train=SimpleNamespace(label=np.zeros(1, int))),
                record,
                Snapshots(record),
            )


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_json_is_named(saved, name, content):
    folder, settings, nets, _ = saved
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is damaged"):
        finished.read_recipe(folder)
        finished.load(folder, settings, nets, SHAPE)
    (folder / name).write_bytes(whole)


def test_counts_that_are_none_are_named(saved):
    folder, settings, nets, _ = saved
    whole = (folder / "metrics.json").read_text()
    (folder / "metrics.json").write_text(json.dumps(json.loads(whole) | {"distilled_steps/synergy": "7"}))
    with pytest.raises(UserError, match=r"metrics\.json is damaged: of steps it has synergy '7'"):
        finished.load(folder, settings, nets, SHAPE)
    (folder / "metrics.json").write_text(whole)


def test_keys_of_another_version_are_told_with_their_file(saved, tmp_path):
    config = json.loads((saved[0] / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"taus": 2.0}))
    with pytest.raises(UserError, match=r"/config\.json: unknown key taus; .*; another version .* about\.json"):
        finished.read_recipe(tmp_path)


def test_a_run_that_did_not_finish_is_named(saved, tmp_path):
    _, settings, nets, _ = saved
    record = Record.create(tmp_path / "results", "l1_ib", "", {"seed": 0})
    with pytest.raises(UserError, match="final"):
        finished.load(record.folder, settings, nets, SHAPE)
    with pytest.raises(UserError, match="is no run folder"):
        finished.read_recipe(tmp_path)
