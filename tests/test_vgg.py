"""VGG against a PyTorch network written here from the paper, with the names of Tian et al.'s (2020) weights."""

import pytest
from networks import stage_shapes

from asib_jax.models import MODELS
from asib_jax.models.vgg import vgg

NARROW = ((4, 6), (8,), (10,), (12,), (14, 16))

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.pytorch
@pytest.mark.parametrize("size", [39, pytest.param(64, marks=pytest.mark.slow)])
def test_network_equals_pytorch(size):
    import parity
    import torch_networks

    errors = parity.errors(torch_networks.vgg(NARROW, 10), vgg(NARROW), size)
    assert parity.within_bounds(errors), errors


@pytest.mark.parametrize(
    ("size", "heights"),
    [
        (32, (32, 16, 8, 4, 4)),
        (20, (20, 10, 5, 2, 2)),
        (39, (39, 19, 9, 4, 4)),  # between them three halvings, as Tian et al.'s
        (19, (19, 9, 4, 4, 4)),
        (40, (40, 20, 10, 5, 2)),
        (64, (64, 32, 16, 8, 4)),
        (96, (96, 48, 24, 12, 6)),
        (2, (2, 2, 2, 2, 2)),  # small images are not pooled away
    ],
)
def test_stages(size, heights):
    names, widths = ("stem", "layer1", "layer2", "layer3", "layer4"), (64, 128, 256, 512, 512)
    assert stage_shapes(MODELS["vgg8"](True), size) == list(zip(names, heights, widths))
