"""MobileNetV2 against PyTorch under both libraries' names, its size, its resolutions and its dropout."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from asib_jax.models.kd_model import KDModel
from asib_jax.models.mobilenet import ROWS, Row, mobilenet_v2

SHORT = (Row(1, 16, 1, 1), Row(2, 16, 2, 2), Row(3, 24, 1, 1))  # with and without expansion, shortcut and stride


def torchvision_network():
    from torchvision.models import MobileNetV2
    network = MobileNetV2(num_classes=10, inverted_residual_setting=[[*row] for row in SHORT])
    return network, network.features[0][0]


def timm_network():
    pytest.importorskip("timm")
    from timm.models._efficientnet_builder import decode_arch_def
    from timm.models.efficientnet import EfficientNet
    from torch.nn import ReLU6
    blocks = decode_arch_def([["ds_r1_k3_s1_c16"], ["ir_r2_k3_s2_e2_c16"], ["ir_r1_k3_s1_e3_c24"]])
    network = EfficientNet(blocks, num_classes=10, act_layer=ReLU6)
    return network, network.conv_stem


@pytest.mark.parametrize("build", [torchvision_network, timm_network])
@pytest.mark.parametrize("small_input", [False, True])
def test_network_equals_pytorch(build, small_input):
    pytest.importorskip("torchvision_cpu")
    import parity
    network, stem = build()
    stem.stride = (1, 1) if small_input else stem.stride
    errors = parity.errors(network, mobilenet_v2(SHORT, small_input), 16 if small_input else 32)
    assert parity.within_bounds(errors), errors


def shapes_of_stages(architecture, size):
    """Each stage's output (height, channels), and how many parameters the network has at 1000 classes."""
    model = KDModel(architecture, 1000, (0.5,), (0.25,))
    pixels = jnp.zeros((1, size, size, 3))
    params = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, train=False))["params"]
    shapes, x = {}, pixels
    for name, factory in architecture.stages:
        stage = factory(dtype=jnp.float32, axis_name=None)
        x, _ = jax.eval_shape(lambda x: stage.init_with_output(jax.random.key(0), x, train=False), x)
        shapes[name] = x.shape[1], x.shape[3]
    return shapes, sum(leaf.size for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize(("small_input", "size", "heights"), [
    (False, 224, (112, 112, 56, 28, 14, 14, 7, 7)),
    (True, 32, (32, 32, 16, 8, 4, 4, 2, 2)),
])
def test_stages_and_size(small_input, size, heights):
    """Resolutions and channels of table 2 of the paper; torchvision's count of parameters."""
    shapes, count = shapes_of_stages(mobilenet_v2(ROWS, small_input), size)
    names = ("stem", *(f"layer{i}" for i in range(1, 8)))
    assert list(shapes.items()) == list(zip(names, zip(heights, (32, 16, 24, 32, 64, 96, 160, 1280))))
    assert count == 3_504_872


def test_training_in_bfloat16_with_dropout():
    """With the identity as classifier, logits are the features, 0 or divided by .8, and none dropped without keys."""
    model = KDModel(mobilenet_v2(SHORT[:1], True), 1280, (0.5,), (0.25,), dtype=jnp.bfloat16)
    pixels = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 3), np.uint8)

    @jax.jit
    def run(keys):
        variables = model.init(jax.random.key(0), pixels, train=False)
        params = variables["params"] | {"classifier": {"kernel": jnp.eye(1280), "bias": jnp.zeros(1280)}}
        outputs = [model.apply(variables | {"params": params}, pixels, train=True, dropout_keys=keys,
                               mutable=["batch_stats"]) for keys in (keys, None)]
        return *outputs, variables

    (outputs, updates), (plain, _), variables = run(jax.random.split(jax.random.key(1), 4))
    assert outputs.feat_4d.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves((variables, updates, outputs.feat_2d, outputs.logit))} == {
        jnp.dtype("float32")}
    feat_2d = np.asarray(outputs.feat_2d)
    np.testing.assert_array_equal(plain.logit, feat_2d)
    dropped = (np.asarray(outputs.logit) == 0) & (feat_2d > 0)
    np.testing.assert_allclose(outputs.logit, np.where(dropped, 0, feat_2d / 0.8), rtol=1e-6)
    assert abs(dropped.sum() / (feat_2d > 0).sum() - 0.2) < 0.03  # five standard deviations of some 5,000 draws
