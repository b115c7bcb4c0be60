"""EfficientNet against PyTorch under both libraries' names and with TensorFlow's padding; its stages and weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from networks import random_values, stage_shapes, variable_shapes

from asib_jax.models import MODELS
from asib_jax.models.efficientnet import efficientnet
from asib_jax.models.kd_model import KDModel
from asib_jax.weights.reading import import_weights
from asib_jax.weights.torch_names import export_weights

WIDTH, DEPTH = 0.25, 0.3  # one block in every stage, two in the sixth

pytestmark = pytest.mark.usefixtures("quick_compilation")


def timm_network(**options):
    from timm.models.efficientnet import _gen_efficientnet

    return _gen_efficientnet("efficientnet_b0", WIDTH, DEPTH, num_classes=10, **options)


def torchvision_network():
    from torchvision.models import efficientnet as torchvision

    settings, _ = torchvision._efficientnet_conf("efficientnet_b0", width_mult=WIDTH, depth_mult=DEPTH)
    network = torchvision.EfficientNet(settings, 0.2, num_classes=10)
    network.features[0][0].stride = (1, 1)
    return network


@pytest.mark.pytorch
@pytest.mark.parametrize(
    ("build", "small_input", "tensorflow", "size"),
    [
        pytest.param(timm_network, False, False, 33, marks=pytest.mark.slow),
        (torchvision_network, True, False, 32),
        # 38 -> 19 -> 10 -> 5 -> 3 -> 2: strides on even sizes, where TensorFlow pads one side more, and on odd ones
        pytest.param(lambda: timm_network(bn_eps=1e-3, pad_type="same"), False, True, 38, marks=pytest.mark.slow),
    ],
    ids=["timm", "torchvision, small", "timm tf_"],
)
def test_network_equals_pytorch(build, small_input, tensorflow, size):
    import parity

    errors = parity.errors(build(), efficientnet(WIDTH, DEPTH, 0.2, small_input, tensorflow), size)
    assert parity.within_bounds(errors), errors


@pytest.mark.parametrize(
    ("small_input", "size", "heights"),
    [(False, 224, (112, 112, 56, 28, 14, 14, 7, 7)), (True, 32, (32, 32, 16, 8, 4, 4, 2, 2))],
)
def test_stages(small_input, size, heights):
    """Resolutions and widths of table 1 of the paper; stochastic depth rising by 0.2 / 16 a block."""
    architecture = MODELS["efficientnet_b0"](small_input)
    names, widths = ("stem", *(f"blocks{i}" for i in range(1, 8))), (32, 16, 24, 40, 80, 112, 192, 1280)
    assert stage_shapes(architecture, size) == list(zip(names, heights, widths))
    rates = [
        block.args[4]
        for _, factory in architecture.stages[1:]
        for name, block in factory.keywords["parts"]
        if name != "head"
    ]
    np.testing.assert_allclose(rates, np.arange(16) * 0.2 / 16, rtol=1e-12)


def test_weights_fit_small_images_whole():
    native, small = efficientnet(WIDTH, DEPTH, 0.2, False), efficientnet(WIDTH, DEPTH, 0.2, True)
    values = random_values(variable_shapes(KDModel(native, 10, (0.5,), (0.25,)), 32))
    shapes = variable_shapes(KDModel(small, 10, (0.5,), (0.25,)))
    imported = import_weights(export_weights(values, small), shapes, small)
    assert imported.fresh == {}
    jax.tree.map(np.testing.assert_array_equal, flatten_dict(imported.variables), flatten_dict(values))


def test_initial_depthwise_kernel():
    """Of variance 2/9, in 432 draws to four standard deviations."""
    (_, factory), *_ = MODELS["efficientnet_b0"](True).stages[2][1].keywords["parts"]
    block = factory(dtype=jnp.float32, axis_name=None)
    variables = jax.jit(lambda: block.init(jax.random.key(1), jnp.zeros((1, 3, 3, 8)), train=False))()
    np.testing.assert_allclose(np.var(variables["params"]["depthwise_conv"]["kernel"]), 2 / 9, rtol=0.3)
