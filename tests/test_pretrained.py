"""Importing weights: the network computes what PyTorch computes, and nothing is left over unnoticed."""

import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from networks import convolutions, make_split, random_values, variable_shapes

from asib_jax.errors import UserError
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


def holding(number):
    """The array with this number as its first."""

    def changed(array):
        array = array.copy()
        array.flat[0] = number
        return array

    return changed


BROKEN = [
    ("conv1.weight", holding(np.nan), "the model's params/stem/conv/kernel: 1 of 54 numbers are not finite"),
    ("conv1.weight", holding(-np.inf), "1 of 54 numbers are not finite"),
    ("layer2.0.bn1.weight", holding(np.inf), "params/layer2/block0/bn1/scale: 1 of 3 numbers are not finite"),
    ("layer3.0.bn2.running_mean", holding(np.nan), "batch_stats/layer3/block0/bn2/mean: 1 of 4 numbers"),
    ("bn1.running_var", holding(np.nan), "batch_stats/stem/bn/var: 1 of 2 numbers"),
    ("fc.bias", holding(np.nan), "params/classifier/bias: 1 of 5 numbers"),
    ("fc.weight", lambda array: np.full((9, 4), np.nan, np.float32), "36 of 36 numbers"),  # though it is left out
    ("conv1.weight", holding(1e38), "it holds 1e+38, beyond float16's 65504"),
    ("layer1.0.conv2.weight", holding(-7e4), "it holds -70000, beyond"),
    ("bn1.running_mean", lambda array: holding(1e300)(np.float64(array)), "1 of 2 numbers"),  # infinite in float32
    ("bn1.bias", lambda array: holding(np.inf)(np.float16(array)), "1 of 2 numbers"),
    ("bn1.bias", lambda array: holding(np.nan)(array.astype(ml_dtypes.bfloat16)), "1 of 2 numbers"),
    ("bn1.running_var", holding(-1e-3), "it holds a variance of -0.001"),
    *(
        (name, lambda array, kind=kind: array.astype(kind), f"its type is {kind}, not one of floating-point numbers")
        for name, kind in (
            ("conv1.weight", "int8"),
            ("fc.weight", "uint8"),
            ("bn1.bias", "bool"),
            ("bn1.running_var", "int64"),
            ("fc.bias", "complex64"),
        )
    ),
]


@pytest.mark.parametrize("name, change, told", BROKEN, ids=[f"{k}-{case[0]}" for k, case in enumerate(BROKEN)])
def test_broken_arrays_are_named(name, change, told):
    state = state_for(SMALL)
    state[name] = change(state[name])
    with pytest.raises(UserError, match="^the weights are broken\n.*leaves \\(1\\)") as caught:
        import_weights(state, zeros_of(SMALL), SMALL.architecture)
    assert f"\n  {name}, the model's " in str(caught.value) and told in str(caught.value)


def test_what_is_unusual_is_not_broken():
    """A variance of 0, a large statistic, narrow and wide types."""
    state = state_for(SMALL)
    state["bn1.running_var"], state["bn1.running_mean"] = np.zeros(2, np.float32), np.float32([1e5, -3e7])
    for name, kind in (("conv1.weight", np.float16), ("bn1.bias", ml_dtypes.bfloat16), ("fc.bias", np.float64)):
        state[name] = state[name].astype(kind)
    variables = import_weights(state, zeros_of(SMALL), SMALL.architecture).variables
    np.testing.assert_array_equal(variables["batch_stats"]["stem"]["bn"]["mean"], np.float32([1e5, -3e7]))
    np.testing.assert_array_equal(variables["params"]["stem"]["bn"]["bias"], np.float32(state["bn1.bias"]))


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="of XLA's CPU compiler")
def test_what_comes_out_does_not_tell_that_weights_are_broken():
    """One NaN in the first layer: every logit is NaN, but finite once compiled, where a relu joined to a mean takes NaN
    for 0. So it is refused where it is read."""
    model = KDModel(convolutions(5), CLASSES, (0.5,), (0.3,))
    variables, image = random_values(variable_shapes(model)), jnp.float32(make_split(64).image)
    variables["params"]["stage0"]["conv"]["kernel"].flat[0] = np.nan

    def logits(variables, image):
        return model.apply(variables, image, train=False).logit

    assert jnp.isnan(logits(variables, image)).all() and jnp.isfinite(jax.jit(logits)(variables, image)).all()
    with pytest.raises(UserError, match="params/stage0/conv/kernel: 1 of 135 numbers are not finite"):
        fit_variables(variables, variable_shapes(model), model.architecture)


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
