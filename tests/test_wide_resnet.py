"""Wide ResNets against PyTorch networks written here from the paper, with the names of Tian et al.'s (2020) weights."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.models.kd_model import KDModel
from asib_jax.models.wide_resnet import wide_resnet


@pytest.mark.parametrize(("depth", "widen"), [(16, 1), (10, 2)])
def test_network_equals_pytorch(depth, widen):
    """The first stage has a shortcut of x in all blocks, or one of a convolution at stride 1."""
    pytest.importorskip("torch")
    import parity
    import torch_networks
    errors = parity.errors(torch_networks.wide_resnet(depth, widen, 10), wide_resnet(depth, widen), 16)
    assert parity.within_bounds(errors), errors


@pytest.mark.parametrize(("depth", "widen", "count"), [(40, 2, 2_255_156), (40, 1, 569_780), (16, 2, 703_284)])
def test_stages_and_size(depth, widen, count):
    """At 100 classes the network of `torch_networks` has as many parameters. Maps of 32, 32, 16 and 8 pixels."""
    architecture = wide_resnet(depth, widen)
    model = KDModel(architecture, 100, (0.5,), (0.25,))
    x = jnp.zeros((1, 32, 32, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), x, train=False))["params"]
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == count
    expected = [("stem", 32, 16), ("layer1", 32, 16 * widen), ("layer2", 16, 32 * widen), ("layer3", 8, 64 * widen)]
    for (name, factory), stage_shape in zip(architecture.stages, expected, strict=True):
        stage = factory(dtype=jnp.float32, axis_name=None)
        x, _ = jax.eval_shape(lambda x: stage.init_with_output(jax.random.key(0), x, train=False), x)
        assert (name, x.shape[1], x.shape[3]) == stage_shape


def test_training_in_bfloat16():
    model = KDModel(wide_resnet(10, 1), 5, (0.5,), (0.25,), dtype=jnp.bfloat16)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)

    generator = np.random.default_rng(1)
    fresh = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, train=False))
    variables = jax.tree.map(lambda leaf: generator.uniform(-0.3, 0.9, leaf.shape).astype(np.float32), fresh)
    run = jax.jit(lambda variables: model.apply(variables, pixels, train=True, mutable=["batch_stats"]))
    outputs, updates = run(variables)
    assert outputs.feat_4d.dtype == jnp.bfloat16 and (outputs.feat_4d >= 0).all()  # after the final relu
    assert {leaf.dtype for leaf in jax.tree.leaves((fresh, updates, outputs.feat_2d, outputs.logit))} == {
        jnp.dtype("float32")}
    np.testing.assert_allclose(outputs.feat_2d, np.asarray(outputs.feat_4d, np.float64).mean((1, 2)), rtol=1e-6)
    assert np.isfinite(outputs.logit).all()
