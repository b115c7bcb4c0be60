"""MobileNetV2 against PyTorch under both libraries' names, and its stages."""

import pytest
from networks import stage_shapes

from asib_jax.models import MODELS
from asib_jax.models.mobilenet import Row, mobilenet_v2

SHORT = (Row(1, 16, 1, 1), Row(2, 16, 2, 2), Row(3, 24, 1, 1))  # with and without expansion, shortcut and stride

pytestmark = pytest.mark.usefixtures("quick_compilation")


def torchvision_network():
    from torchvision.models import MobileNetV2

    return MobileNetV2(num_classes=10, inverted_residual_setting=[[*row] for row in SHORT])


def timm_network():
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet
    from torch.nn import ReLU6

    blocks = decode_arch_def([["ds_r1_k3_s1_c16"], ["ir_r2_k3_s2_e2_c16"], ["ir_r1_k3_s1_e3_c24"]])
    network = EfficientNet(blocks, num_classes=10, act_layer=ReLU6)
    network.conv_stem.stride = (1, 1)
    return network


@pytest.mark.pytorch
@pytest.mark.parametrize(
    ("build", "small_input", "size"),
    [pytest.param(torchvision_network, False, 32, marks=pytest.mark.slow), (timm_network, True, 16)],
)
def test_network_equals_pytorch(build, small_input, size):
    import parity

    errors = parity.errors(build(), mobilenet_v2(SHORT, small_input), size)
    assert parity.within_bounds(errors), errors


@pytest.mark.parametrize(
    ("small_input", "size", "heights"),
    [(False, 224, (112, 112, 56, 28, 14, 14, 7, 7)), (True, 32, (32, 32, 16, 8, 4, 4, 2, 2))],
)
def test_stages(small_input, size, heights):
    """Resolutions and channels of table 2 of the paper; torchvision's rate of dropout."""
    architecture = MODELS["mobilenet_v2"](small_input)
    names, widths = ("stem", *(f"layer{i}" for i in range(1, 8))), (32, 16, 24, 32, 64, 96, 160, 1280)
    assert stage_shapes(architecture, size) == list(zip(names, heights, widths))
    assert architecture.dropout == 0.2
