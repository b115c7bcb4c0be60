"""Wide ResNets against PyTorch networks written here from the paper, with the names of Tian et al.'s (2020) weights."""

import pytest
from networks import stage_shapes

from asib_jax.models.wide_resnet import wide_resnet

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.pytorch
@pytest.mark.parametrize(("depth", "widen"), [pytest.param(16, 1, marks=pytest.mark.slow), (10, 2)])
def test_network_equals_pytorch(depth, widen):
    """The first stage has a shortcut of x in all blocks, or one of a convolution at stride 1."""
    import parity
    import torch_networks

    errors = parity.errors(torch_networks.wide_resnet(depth, widen, 10), wide_resnet(depth, widen), 16)
    assert parity.within_bounds(errors), errors


def test_stages():
    assert stage_shapes(wide_resnet(16, 2), 32) == [
        ("stem", 32, 16),
        ("layer1", 32, 32),
        ("layer2", 16, 64),
        ("layer3", 8, 128),
    ]
