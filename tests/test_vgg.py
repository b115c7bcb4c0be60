"""VGG against a PyTorch network written here from the paper, with the names of Tian et al.'s (2020) weights."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.models.kd_model import KDModel
from asib_jax.models.vgg import vgg

NARROW = ((4, 6), (8,), (10,), (12,), (14, 16))
VGG8 = ((64,), (128,), (256,), (512,), (512,))
VGG13 = ((64, 64), (128, 128), (256, 256), (512, 512), (512, 512))


@pytest.mark.parametrize("size", [32, 64])
def test_network_equals_pytorch(size):
    pytest.importorskip("torch")
    import parity
    import torch_networks
    errors = parity.errors(torch_networks.vgg(NARROW, 10), vgg(NARROW), size)
    assert parity.within_bounds(errors), errors


@pytest.mark.parametrize(("widths", "size", "heights", "count"), [
    (VGG8, 32, (32, 16, 8, 4, 4), 3_965_028),
    (VGG13, 32, (32, 16, 8, 4, 4), 9_462_180),
    (VGG8, 8, (8, 4, 4, 4, 4), 3_965_028),
    (VGG8, 2, (2, 2, 2, 2, 2), 3_965_028),
])
def test_stages_and_size(widths, size, heights, count):
    """At 100 classes the network of `torch_networks` has as many parameters. Small images are not pooled away."""
    architecture = vgg(widths)
    model = KDModel(architecture, 100, (0.5,), (0.25,))
    x = jnp.zeros((1, size, size, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    assert [name for name, _ in architecture.stages] == ["stem", "layer1", "layer2", "layer3", "layer4"]
    for (_, factory), height, block in zip(architecture.stages, heights, widths, strict=True):
        stage = factory(dtype=jnp.float32, axis_name=None)
        x, _ = jax.eval_shape(lambda x: stage.init_with_output(jax.random.key(0), x, train=False), x)
        assert x.shape == (1, height, height, block[-1])


def test_training_in_bfloat16():
    model = KDModel(vgg(NARROW), 5, (0.5,), (0.25,), dtype=jnp.bfloat16)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)

    generator = np.random.default_rng(1)
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, train=False))
    variables = jax.tree.map(lambda leaf: generator.uniform(-0.3, 0.9, leaf.shape).astype(np.float32), fresh)
    run = jax.jit(lambda variables: model.apply(variables, pixels, train=True, mutable=["batch_stats"]))
    outputs, updates = run(variables)
    assert outputs.feat_4d.dtype == jnp.bfloat16 and outputs.feat_4d.shape == (4, 4, 4, 16)
    assert {leaf.dtype for leaf in jax.tree.leaves((fresh, updates, outputs.feat_2d, outputs.logit))} == {
        jnp.dtype("float32")}
    np.testing.assert_allclose(outputs.feat_2d, np.asarray(outputs.feat_4d, np.float64).mean((1, 2)), rtol=1e-6)
    assert np.isfinite(outputs.logit).all()
