"""ConvNeXt against timm's, its stages, where it starts, and what its weights fit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from networks import random_values, stage_shapes, variable_shapes

from asib_jax.models import MODELS
from asib_jax.models.convnext import Block, convnext
from asib_jax.models.kd_model import KDModel
from asib_jax.weights.reading import import_weights
from asib_jax.weights.torch_names import export_weights

WIDTHS, COUNTS = (8, 16, 16, 24), (1, 2, 1, 1)

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.pytorch
@pytest.mark.parametrize("small_input", [pytest.param(False, marks=pytest.mark.slow), True])
def test_network_equals_timm(small_input):
    import parity
    import torch
    from timm.models.convnext import ConvNeXt

    network = ConvNeXt(depths=COUNTS, dims=WIDTHS, num_classes=10)
    if small_input:
        network.stem[0] = torch.nn.Conv2d(3, WIDTHS[0], 3, 1, 1)
    errors = parity.errors(network, convnext(WIDTHS, COUNTS, 0.4, small_input), 33)
    assert parity.within_bounds(errors), errors
    assert errors["logits"] < 1e-5, errors  # gelu's approximation would cost 4e-4


@pytest.mark.parametrize(
    ("small_input", "size", "heights"), [(False, 224, (56, 56, 28, 14, 7)), (True, 32, (32, 32, 16, 8, 4))]
)
def test_stages(small_input, size, heights):
    """Stochastic depth rises from 0 to the last block's rate over all 36 blocks."""
    architecture = MODELS["convnext_s"](small_input)
    names, widths = ("stem", "stage1", "stage2", "stage3", "stage4"), (96, 96, 192, 384, 768)
    assert stage_shapes(architecture, size) == list(zip(names, heights, widths))
    rates = [
        block.args[0]
        for _, factory in architecture.stages[1:]
        for name, block in factory.keywords["parts"]
        if name != "downsample"
    ]
    np.testing.assert_allclose(rates, np.linspace(0, 0.4, 36), rtol=1e-12)


def test_only_the_stem_kernel_does_not_fit_small_images():
    native, small = convnext(WIDTHS, COUNTS, 0.4, False), convnext(WIDTHS, COUNTS, 0.4, True)
    values = random_values(variable_shapes(KDModel(native, 10, (0.5,), (0.25,)), 32))
    shapes = variable_shapes(KDModel(small, 10, (0.5,), (0.25,)))
    imported = import_weights(export_weights(values, small), jax.tree.map(jnp.zeros_like, shapes), small)
    [fresh] = imported.fresh.values()
    assert "stem.0.weight (4, 4, 3, 8), the model's params/stem/conv/kernel (3, 3, 3, 8)" in fresh
    expected = flatten_dict(values) | {("params", "stem", "conv", "kernel"): np.zeros((3, 3, 3, 8))}
    jax.tree.map(np.testing.assert_array_equal, flatten_dict(imported.variables), expected)


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1e-3), (100, 0.1)])
def test_layer_norm(mean, deviation):
    """The closed form in float64 to 1e-3, where epsilon is half of it and where E[x^2] - E[x]^2 would be 5 % off."""
    x = np.random.default_rng(0).normal(mean, deviation, (3, 24)).astype(np.float32)
    norm = convnext(WIDTHS, COUNTS, 0.4, False).pooled_norm(name=None)
    scale, bias = np.linspace(1, 2, 24), np.linspace(-1, 1, 24)
    centred = np.float64(x) - np.float64(x).mean(1, keepdims=True)
    expected = centred / np.sqrt((centred**2).mean(1, keepdims=True) + 1e-6) * scale + bias
    np.testing.assert_allclose(norm.apply({"params": {"scale": scale, "bias": bias}}, x), expected, atol=1e-3)


def test_initial_values():
    """As the original's: of the two kernels there are 392 and 256 draws."""
    block = Block(0.5, dtype=jnp.float32, axis_name=None)
    params = jax.jit(lambda: block.init(jax.random.key(1), jnp.zeros((1, 3, 3, 8)), train=False))()["params"]
    np.testing.assert_array_equal(params["gamma"], np.full(8, 1e-6, np.float32))
    np.testing.assert_allclose(np.std(params["depthwise"]["kernel"]), 0.02, rtol=0.2)
    np.testing.assert_allclose(np.std(params["fc1"]["kernel"]), 0.02, rtol=0.2)
