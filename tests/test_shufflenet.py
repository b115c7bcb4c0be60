"""ShuffleNetV2 against torchvision, its stages, the shuffle by hand."""

import jax.numpy as jnp
import numpy as np
import pytest
from networks import stage_shapes

from asib_jax.models import MODELS
from asib_jax.models.shufflenet import shuffle, shufflenet_v2

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.mark.pytorch
@pytest.mark.parametrize("small_input", [pytest.param(False, marks=pytest.mark.slow), True])
def test_network_equals_torchvision(small_input):
    import parity
    import torch
    from torchvision.models import ShuffleNetV2

    network = ShuffleNetV2([2, 1, 1], [24, 8, 12, 16, 1024], num_classes=10)
    if small_input:
        network.conv1[0].stride, network.maxpool = (1, 1), torch.nn.Identity()
    errors = parity.errors(network, shufflenet_v2((2, 1, 1), (8, 12, 16), small_input), 32 if small_input else 64)
    assert parity.within_bounds(errors), errors


def test_shuffle_by_hand():
    left, right = jnp.arange(12.0).reshape(1, 2, 2, 3), -jnp.arange(12.0).reshape(1, 2, 2, 3)
    np.testing.assert_array_equal(shuffle(left, right)[0, 1, 0], [6, -6, 7, -7, 8, -8])


@pytest.mark.parametrize(
    ("small_input", "size", "heights"), [(False, 224, (56, 28, 14, 7)), (True, 32, (32, 16, 8, 4))]
)
def test_stages(small_input, size, heights):
    """Resolutions and channels of table 5 of the paper."""
    names, widths = ("stem", "stage2", "stage3", "stage4"), (24, 116, 232, 1024)
    assert stage_shapes(MODELS["shufflenet_v2"](small_input), size) == list(zip(names, heights, widths))
