"""ShuffleNetV2 against torchvision, its size and resolutions, the shuffle by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.models.kd_model import KDModel
from asib_jax.models.shufflenet import shuffle, shufflenet_v2


@pytest.mark.parametrize("small_input", [False, True])
def test_network_equals_torchvision(small_input):
    pytest.importorskip("torchvision_cpu")
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


@pytest.mark.parametrize(("small_input", "size", "heights"), [
    (False, 224, (56, 28, 14, 7)),
    (True, 32, (32, 16, 8, 4)),
])
def test_stages_and_size(small_input, size, heights):
    """Resolutions and channels of table 5 of the paper; torchvision's count of parameters."""
    architecture = shufflenet_v2((4, 8, 4), (116, 232, 464), small_input)
    model = KDModel(architecture, 1000, (0.5,), (0.25,))
    x = jnp.zeros((1, size, size, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 2_278_604
    assert [name for name, _ in architecture.stages] == ["stem", "stage2", "stage3", "stage4"]
    for (_, factory), height, width in zip(architecture.stages, heights, (24, 116, 232, 1024), strict=True):
        stage = factory(dtype=jnp.float32, axis_name=None)
        x, _ = jax.eval_shape(lambda x: stage.init_with_output(jax.random.key(0), x, train=False), x)
        assert x.shape == (1, height, height, width)


def test_training_in_bfloat16():
    model = KDModel(shufflenet_v2((1,), (8,), True), 5, (0.5,), (0.25,), dtype=jnp.bfloat16)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)

    generator = np.random.default_rng(1)
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, train=False))
    variables = jax.tree.map(lambda leaf: generator.uniform(-0.3, 0.9, leaf.shape).astype(np.float32), fresh)
    run = jax.jit(lambda variables: model.apply(variables, pixels, train=True, mutable=["batch_stats"]))
    outputs, updates = run(variables)
    assert outputs.feat_4d.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((fresh, updates, outputs.feat_2d, outputs.logit))} == {
        jnp.dtype("float32")}
    np.testing.assert_allclose(outputs.feat_2d, np.asarray(outputs.feat_4d, np.float64).mean((1, 2)), rtol=1e-6)
    assert np.isfinite(outputs.logit).all()
