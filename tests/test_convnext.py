"""ConvNeXt against timm's, its size, its stages and its stochastic depth."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from asib_jax.models.convnext import Block, convnext
from asib_jax.models.kd_model import KDModel
from asib_jax.pretrained import export_weights, import_weights

WIDTHS, COUNTS = (8, 16, 16, 24), (1, 2, 1, 1)
SMALL, LARGE = (96, 192, 384, 768), (192, 384, 768, 1536)
FULL = (3, 3, 27, 3)

pytestmark = pytest.mark.usefixtures("quick_compilation")


def model_and_shapes(architecture, size, classes=10, **fields):
    model = KDModel(architecture, classes, (0.5,), (0.25,), **fields)
    pixels = jnp.zeros((1, size, size, 3))
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, train=False))


def random_values(shapes):
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: generator.normal(0.5 if leaf.ndim == 1 else 0.0, 0.2, leaf.shape)
                        .astype(np.float32), shapes)


@pytest.mark.parametrize("small_input", [False, True])
def test_network_equals_timm(small_input):
    pytest.importorskip("torch")
    pytest.importorskip("torchvision_cpu")
    pytest.importorskip("timm")
    import parity
    import torch
    from timm.models.convnext import ConvNeXt
    network = ConvNeXt(depths=COUNTS, dims=WIDTHS, num_classes=10)
    if small_input:
        network.stem[0] = torch.nn.Conv2d(3, WIDTHS[0], 3, 1, 1)
    errors = parity.errors(network, convnext(WIDTHS, COUNTS, 0.4, small_input), 33)
    for name, error in errors.items():
        assert error < (1e-4 if "gradient" in name else 1e-5), errors  # gelu's approximation would cost 6e-5 and 1e-3


@pytest.mark.parametrize(("widths", "count"), [(SMALL, 50_223_688), (LARGE, 197_767_336)])
def test_size(widths, count):
    """timm's counts of parameters, of which none is a batch statistic."""
    _, shapes = model_and_shapes(convnext(widths, FULL, 0.4, False), 32, classes=1000)
    assert list(shapes) == ["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count


@pytest.mark.parametrize(("small_input", "size", "heights"), [(False, 224, (56, 56, 28, 14, 7)),
                                                              (True, 32, (32, 32, 16, 8, 4))])
def test_stages(small_input, size, heights):
    """Names in order, resolutions and widths; stochastic depth from 0 to the last block's rate over all 36 blocks."""
    architecture = convnext(SMALL, FULL, 0.4, small_input)
    x = jnp.zeros((1, size, size, 3))
    for (name, factory), expected, height, width in zip(architecture.stages,
                                                        ("stem", "stage1", "stage2", "stage3", "stage4"),
                                                        heights, (96, *SMALL), strict=True):
        stage = factory(dtype=jnp.float32, axis_name=None)
        x, _ = jax.eval_shape(lambda x: stage.init_with_output(jax.random.key(0), x, train=False), x)
        assert (name, x.shape) == (expected, (1, height, height, width))
    rates = [block.args[0] for _, factory in architecture.stages[1:] for name, block in factory.keywords["parts"]
             if name != "downsample"]
    np.testing.assert_allclose(rates, np.linspace(0, 0.4, 36), rtol=1e-12)


def test_only_the_stem_kernel_does_not_fit_small_images():
    _, native = model_and_shapes(convnext(WIDTHS, COUNTS, 0.4, False), 32)
    architecture = convnext(WIDTHS, COUNTS, 0.4, True)
    _, small = model_and_shapes(architecture, 32)
    values = random_values(native)
    imported = import_weights(export_weights(values, architecture), jax.tree.map(jnp.zeros_like, small), architecture)
    [fresh] = imported.fresh
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
    expected = centred / np.sqrt((centred ** 2).mean(1, keepdims=True) + 1e-6) * scale + bias
    np.testing.assert_allclose(norm.apply({"params": {"scale": scale, "bias": bias}}, x), expected, atol=1e-3)


def test_block_drops_whole_examples():
    """x + branch without keys; with them x or x + 2 branch at rate 1/2. Parameters start as the original's."""
    x = np.random.default_rng(0).normal(size=(64, 3, 3, 8)).astype(np.float32)
    block = Block(0.5, jnp.float32, None)

    @jax.jit
    def run(keys):
        params = block.init(jax.random.key(1), x, dropout_keys=None)["params"]
        ones = params | {"gamma": jnp.ones(8)}
        return params, *(block.apply({"params": ones}, x, dropout_keys=k) - x for k in (None, keys))

    params, branch, seen = run(jax.random.split(jax.random.key(2), 64))
    kept = np.abs(seen).max((1, 2, 3)) > 0
    np.testing.assert_allclose(seen[kept], 2 * branch[kept], rtol=1e-4, atol=1e-6)
    assert 12 <= kept.sum() <= 52  # five standard deviations around 32
    np.testing.assert_array_equal(params["gamma"], np.full(8, 1e-6, np.float32))
    np.testing.assert_allclose(np.std(params["depthwise"]["kernel"]), 0.02, rtol=0.2)  # of 392 draws
    np.testing.assert_allclose(np.std(params["fc1"]["kernel"]), 0.02, rtol=0.2)  # of 256 draws


def test_training_in_bfloat16_with_stochastic_depth():
    """Training without keys is evaluation, with them every example changes; bfloat16's features are right to 1 %."""
    architecture = convnext(WIDTHS, (1, 1, 1, 1), 0.9, True)
    model, shapes = model_and_shapes(architecture, 8)
    half, half_shapes = model_and_shapes(architecture, 8, dtype=jnp.bfloat16)
    variables = random_values(shapes)
    pixels = np.random.default_rng(1).integers(0, 256, (4, 8, 8, 3), np.uint8)

    @jax.jit
    def run(variables, keys):
        return (model.apply(variables, pixels, train=False), model.apply(variables, pixels, train=True),
                half.apply(variables, pixels, train=True), half.apply(variables, pixels, train=True, dropout_keys=keys))

    plain, trained, halved, dropped = run(variables, jax.random.split(jax.random.key(3), 4))
    np.testing.assert_array_equal(plain.logit, trained.logit)
    assert {leaf.dtype for leaf in jax.tree.leaves(half_shapes)} == {jnp.dtype("float32")}
    assert (halved.feat_4d.dtype, halved.feat_2d.dtype, halved.logit.dtype) == ("bfloat16", "float32", "float32")
    scale = np.abs(plain.feat_2d).max()
    assert np.abs(halved.feat_2d - plain.feat_2d).max() < 0.01 * scale
    assert (np.abs(dropped.feat_2d - halved.feat_2d).max(1) > 0.1 * scale).all()
