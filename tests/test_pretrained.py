"""Importing weights: the network computes what PyTorch computes, and nothing is left over unnoticed."""

import re

import jax
import numpy as np
import pytest
from networks import variable_shapes

from asib_jax.models.kd_model import KDModel
from asib_jax.models.resnet import cifar_resnet, imagenet_resnet
from asib_jax.weights.reading import fit_variables, import_weights
from asib_jax.weights.torch_names import export_weights

CLASSES = 5
SMALL = KDModel(
    cifar_resnet(8, widths=(2, 3, 4), stem=2), CLASSES, (0.5,), (0.25,), adapter_dim=3, residual_adapter=True
)


def zeros_of(model):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), variable_shapes(model))


def state_for(model):
    """A random PyTorch state dict for SMALL's backbone and classifier, its names spelt out here rather than derived."""
    generator, state = np.random.default_rng(0), {}

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{leaf}"] = generator.uniform(0.5, 1.5, width).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    def conv(name, outputs, inputs, kernel):
        state[f"{name}.weight"] = generator.normal(size=(outputs, inputs, kernel, kernel)).astype(np.float32)

    conv("conv1", 2, 3, 3)
    norm("bn1", 2)
    for layer, inputs, width in ((1, 2, 2), (2, 2, 3), (3, 3, 4)):
        conv(f"layer{layer}.0.conv1", width, inputs, 3)
        norm(f"layer{layer}.0.bn1", width)
        conv(f"layer{layer}.0.conv2", width, width, 3)
        norm(f"layer{layer}.0.bn2", width)
        if inputs != width:
            conv(f"layer{layer}.0.downsample.0", width, inputs, 1)
            norm(f"layer{layer}.0.downsample.1", width)
    state["fc.weight"] = generator.normal(size=(model.num_classes, 4)).astype(np.float32)
    state["fc.bias"] = generator.normal(size=model.num_classes).astype(np.float32)
    return state


@pytest.mark.pytorch
@pytest.mark.parametrize(
    ("block", "widths", "counts", "stem", "architecture", "size"),
    [
        ("basic", (4, 6, 8), (2, 2, 2), (3, 4, 1, False), cifar_resnet(14, widths=(4, 6, 8), stem=4), 16),
        pytest.param(
            "bottleneck",
            (64, 128, 256, 512),
            (2, 1, 1, 1),
            (7, 64, 2, True),
            imagenet_resnet((2, 1, 1, 1), False),
            64,
            marks=pytest.mark.slow,
        ),
        ("bottleneck", (64, 128, 256, 512), (1, 1, 1, 1), (3, 64, 1, False), imagenet_resnet((1, 1, 1, 1), True), 16),
    ],
)
def test_network_equals_pytorch(block, widths, counts, stem, architecture, size):
    """Outputs, statistics and gradients as `parity.errors` describes; the weights exported again, bit by bit."""
    import parity
    import torch_networks

    errors = parity.errors(torch_networks.resnet(block, widths, counts, stem, parity.CLASSES), architecture, size)
    assert parity.within_bounds(errors), errors


def test_every_leaf_comes_from_its_source():
    """Layouts by hand for one leaf of each kind; adapters keep what they had; the common other names mean the same."""
    state, variables = state_for(SMALL), zeros_of(SMALL)
    variables["params"]["distill_adapter"]["fc1"]["bias"] += 3
    imported = import_weights(state, variables, SMALL.architecture).variables
    assert jax.tree.structure(imported) == jax.tree.structure(variables)
    params, stats = imported["params"], imported["batch_stats"]
    block = params["layer2"]["block0"]
    kernel, shortcut = state["layer2.0.conv1.weight"], state["layer2.0.downsample.0.weight"]
    assert block["conv1"]["kernel"][2, 0, 1, 2] == kernel[2, 1, 2, 0]  # [row, column, in, out], [out, in, row, column]
    np.testing.assert_array_equal(block["downsample_conv"]["kernel"][0, 0], shortcut[..., 0, 0].T)
    np.testing.assert_array_equal(block["downsample_bn"]["scale"], state["layer2.0.downsample.1.weight"])
    np.testing.assert_array_equal(params["stem"]["bn"]["bias"], state["bn1.bias"])
    np.testing.assert_array_equal(stats["layer3"]["block0"]["bn2"]["mean"], state["layer3.0.bn2.running_mean"])
    np.testing.assert_array_equal(stats["layer3"]["block0"]["bn2"]["var"], state["layer3.0.bn2.running_var"])
    np.testing.assert_array_equal(params["classifier"]["kernel"], state["fc.weight"].T)
    np.testing.assert_array_equal(params["distill_adapter"]["fc1"]["bias"], 3)
    np.testing.assert_array_equal(params["residual_adapter"]["kernel"], 0)

    renamed = {re.sub(r"^fc\b", "linear", name.replace("downsample", "shortcut")): v for name, v in state.items()}
    assert "linear.bias" in renamed and "layer2.0.shortcut.0.weight" in renamed
    again = import_weights(renamed, variables, SMALL.architecture).variables
    jax.tree.map(np.testing.assert_array_equal, again, imported)


def test_what_does_not_fit_is_named():
    state, variables = state_for(SMALL), zeros_of(SMALL)

    def refusal(changes=(), without=()):
        with pytest.raises(ValueError) as error:
            import_weights(
                {k: v for k, v in {**state, **dict(changes)}.items() if k not in without}, variables, SMALL.architecture
            )
        return str(error.value)

    extra = {f"layer1.{i}.conv1.weight": state["layer1.0.conv1.weight"] for i in range(1, 13)}
    message = refusal(extra)
    assert "source keys without a place in the model (12)" in message and "layer1.10.conv1.weight" in message
    assert "layer1.11.conv1.weight" not in message and "... and 2 more" in message
    message = refusal(without=("layer1.0.bn2.running_var", "fc.weight"))
    assert "model leaves without a source (2)" in message
    assert "params/classifier/kernel" in message and "batch_stats/layer1/block0/bn2/var" in message
    assert "adapter" not in message
    message = refusal({"layer1.0.conv1.weight": np.zeros((2, 2, 7, 7), np.float32)})
    assert "different shapes (1)" in message
    assert "layer1.0.conv1.weight (7, 7, 2, 2), the model's params/layer1/block0/conv1/kernel (3, 3, 2, 2)" in message
    assert "different shapes (1)" in refusal({"conv1.weight": np.zeros((2, 1, 3, 3), np.float32)})  # grey images
    assert "(1):\n  head.weight" in refusal({"head.weight": np.zeros((5, 4))})
    assert "(1):\n  linear.bias" in refusal({"linear.bias": state["fc.bias"]})  # the classifier is taken already


def test_other_classes_and_another_window_keep_their_initial_values():
    """Only the classifier and the first stage's kernel may; everything else is taken over."""
    state = state_for(SMALL)
    state["conv1.weight"] = np.ones((2, 3, 7, 7), np.float32)
    state["fc.weight"], state["fc.bias"] = np.ones((9, 4), np.float32), np.ones(9, np.float32)
    variables, fresh = imported = import_weights(state, zeros_of(SMALL), SMALL.architecture)
    assert fresh == {
        "params/stem/conv/kernel": "conv1.weight (7, 7, 3, 2), the model's params/stem/conv/kernel (3, 3, 3, 2)",
        "params/classifier/kernel": "fc.weight (4, 9), the model's params/classifier/kernel (4, 5)",
        "params/classifier/bias": "fc.bias (9,), the model's params/classifier/bias (5,)",
    }
    assert imported.random_stem(SMALL) == fresh["params/stem/conv/kernel"]
    params = variables["params"]
    for leaf in (params["stem"]["conv"]["kernel"], params["classifier"]["kernel"], params["classifier"]["bias"]):
        assert not np.any(leaf)
    np.testing.assert_array_equal(params["stem"]["bn"]["bias"], state["bn1.bias"])


def test_export_is_the_inverse():
    """Bit by bit, with BatchNorm's counters at 0; but not of a network that PyTorch has not."""
    model = KDModel(SMALL.architecture, CLASSES, (0.5,), (0.25,), adapter_dim=3)
    state = state_for(model)
    exported = export_weights(import_weights(state, zeros_of(model), model.architecture).variables, model.architecture)
    assert exported.keys() == state.keys()
    for name, value in exported.items():
        expected = 0 if name.endswith("num_batches_tracked") else state[name]
        np.testing.assert_array_equal(value, expected)
        assert value.flags.c_contiguous and value.dtype == (np.int64 if name.endswith("tracked") else np.float32)
    with pytest.raises(ValueError, match="residual adapter"):
        export_weights(zeros_of(SMALL), SMALL.architecture)


def test_variables_of_our_own_fit_by_the_same_rules():
    """A checkpoint of the same network, with another adapter and other classes; not one of another depth."""
    model = KDModel(SMALL.architecture, CLASSES + 2, (0.5,), (0.25,), adapter_dim=6)
    stored = jax.tree.map(lambda leaf: leaf + 1, zeros_of(model))
    variables, fresh = imported = fit_variables(stored, zeros_of(SMALL), SMALL.architecture)
    assert list(fresh) == ["params/classifier/bias", "params/classifier/kernel"] and not imported.random_stem(SMALL)
    assert {
        float(leaf.max())
        for name, branch in variables["params"].items()
        for leaf in jax.tree.leaves(branch)
        if name.startswith(("stem", "layer"))
    } == {1.0}
    assert not np.any(variables["params"]["distill_adapter"]["fc2"]["kernel"])
    stored["params"]["layer2"]["block1"] = stored["params"]["layer2"]["block0"]
    with pytest.raises(ValueError, match="source keys without a place .*\n  params/layer2/block1/bn1/bias"):
        fit_variables(stored, zeros_of(SMALL), SMALL.architecture)
