"""EfficientNet against PyTorch under both libraries' names and with TensorFlow's padding; its size, stages, dropout."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from asib_jax.models.efficientnet import Block, efficientnet
from asib_jax.models.kd_model import KDModel
from asib_jax.pretrained import export_weights, import_weights

WIDTH, DEPTH = 0.25, 0.3  # one block in every stage, two in the sixth
NAMES = ("stem", *(f"blocks{i}" for i in range(1, 8)))

pytestmark = pytest.mark.usefixtures("quick_compilation")


def model_and_shapes(architecture, size, classes=10, **fields):
    model = KDModel(architecture, classes, (0.5,), (0.25,), **fields)
    pixels = jnp.zeros((1, size, size, 3))
    return model, jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, train=False))


def random_values(shapes):
    generator = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (generator.uniform(0.5, 1.5, leaf.shape) if leaf.ndim == 1 else
                                      generator.normal(0, np.prod(leaf.shape[:-1]) ** -0.5, leaf.shape))
                        .astype(np.float32), shapes)


def timm_network(**options):
    pytest.importorskip("timm")
    from timm.models.efficientnet import _gen_efficientnet
    return _gen_efficientnet("efficientnet_b0", WIDTH, DEPTH, num_classes=10, **options)


def torchvision_network():
    from torchvision.models import efficientnet as torchvision
    settings, _ = torchvision._efficientnet_conf("efficientnet_b0", width_mult=WIDTH, depth_mult=DEPTH)
    network = torchvision.EfficientNet(settings, 0.2, num_classes=10)
    network.features[0][0].stride = (1, 1)
    return network


@pytest.mark.parametrize(("build", "small_input", "tensorflow", "size"), [
    (timm_network, False, False, 33),
    (torchvision_network, True, False, 32),
    # 38 -> 19 -> 10 -> 5 -> 3 -> 2: strides on even sizes, where TensorFlow pads one side more, and on odd ones
    (lambda: timm_network(bn_eps=1e-3, pad_type="same"), False, True, 38),
], ids=["timm", "torchvision, small", "timm tf_"])
def test_network_equals_pytorch(build, small_input, tensorflow, size):
    pytest.importorskip("torch")
    pytest.importorskip("torchvision_cpu")
    import parity
    errors = parity.errors(build(), efficientnet(WIDTH, DEPTH, 0.2, small_input, tensorflow), size)
    assert parity.within_bounds(errors), errors


@pytest.mark.parametrize(("arguments", "count"), [
    ((1.0, 1.0, 0.2, False), 5_288_548),
    ((1.1, 1.2, 0.3, True), 9_109_994),
    ((4.3, 5.3, 0.5, False, True), 480_309_308),
], ids=["b0", "b2", "l2"])
def test_size(arguments, count):
    """timm's and torchvision's counts of parameters at 1000 classes."""
    _, shapes = model_and_shapes(efficientnet(*arguments), 32, classes=1000)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes["params"])) == count


@pytest.mark.parametrize(("small_input", "size", "heights"), [(False, 224, (112, 112, 56, 28, 14, 14, 7, 7)),
                                                              (True, 32, (32, 32, 16, 8, 4, 4, 2, 2))])
def test_stages(small_input, size, heights):
    """Names in order; resolutions and widths of table 1 of the paper; stochastic depth rising by 0.2 / 16 a block."""
    architecture = efficientnet(1.0, 1.0, 0.2, small_input)
    x = jnp.zeros((1, size, size, 3))
    for (name, factory), expected, height, width in zip(architecture.stages, NAMES, heights,
                                                        (32, 16, 24, 40, 80, 112, 192, 1280), strict=True):
        stage = factory(dtype=jnp.float32, axis_name=None)
        x, _ = jax.eval_shape(lambda x: stage.init_with_output(jax.random.key(0), x, train=False), x)
        assert (name, x.shape) == (expected, (1, height, height, width))
    rates = [block.args[4] for _, factory in architecture.stages[1:] for name, block in factory.keywords["parts"]
             if name != "head"]
    np.testing.assert_allclose(rates, np.arange(16) * 0.2 / 16, rtol=1e-12)


def test_weights_fit_small_images_whole():
    _, shapes = model_and_shapes(efficientnet(WIDTH, DEPTH, 0.2, False), 32)
    architecture = efficientnet(WIDTH, DEPTH, 0.2, True)
    values = random_values(shapes)
    _, small = model_and_shapes(architecture, 32)
    imported = import_weights(export_weights(values, architecture), small, architecture)
    assert imported.fresh == ()
    jax.tree.map(np.testing.assert_array_equal, flatten_dict(imported.variables), flatten_dict(values))


def test_block_drops_whole_examples():
    """x + branch without keys; with them x or x + 2 branch at rate 1/2. Depthwise kernels start with variance 2/9."""
    x = np.random.default_rng(0).normal(size=(64, 3, 3, 8)).astype(np.float32)
    block = Block(6, 3, 1, 8, 0.5, False, jnp.float32, None)

    @jax.jit
    def run(keys):
        variables = block.init(jax.random.key(1), x, train=False, dropout_keys=None)
        return variables, *(block.apply(variables, x, train=False, dropout_keys=k) - x for k in (None, keys))

    variables, branch, seen = run(jax.random.split(jax.random.key(2), 64))
    kept = np.abs(seen).max((1, 2, 3)) > 0
    np.testing.assert_allclose(seen[kept], 2 * branch[kept], rtol=1e-4, atol=1e-5)
    assert 12 <= kept.sum() <= 52  # five standard deviations around 32
    kernel = variables["params"]["depthwise_conv"]["kernel"]
    np.testing.assert_allclose(np.var(kernel), 2 / 9, rtol=0.3)  # of 432 draws: four standard deviations


def test_training_in_bfloat16_with_stochastic_depth():
    """With statistics at rest, training without keys is evaluation. bfloat16's features are float32's to 1 %;
    stochastic depth at the network's own rates changes those of some example by more than 3 %."""
    architecture = efficientnet(WIDTH, DEPTH, 0.2, True)
    model, shapes = model_and_shapes(architecture, 16)
    half, half_shapes = model_and_shapes(architecture, 16, dtype=jnp.bfloat16)
    variables = random_values(shapes)
    pixels = np.random.default_rng(1).integers(0, 256, (8, 16, 16, 3), np.uint8)

    @jax.jit
    def run(variables, keys):
        def trained(keys):
            return half.apply(variables, pixels, train=True, freeze_bn=True, dropout_keys=keys)
        evaluated = [network.apply(variables, pixels, train=False) for network in (model, half)]
        return *evaluated, trained(None), trained(keys)

    plain, halved, trained, dropped = run(variables, jax.random.split(jax.random.key(3), 8))
    np.testing.assert_array_equal(trained.logit, halved.logit)
    assert {leaf.dtype for leaf in jax.tree.leaves(half_shapes)} == {jnp.dtype("float32")}
    assert (halved.feat_4d.dtype, halved.feat_2d.dtype, halved.logit.dtype) == ("bfloat16", "float32", "float32")
    scale = np.abs(plain.feat_2d).max()
    assert np.abs(halved.feat_2d - plain.feat_2d).max() < 0.01 * scale
    assert np.abs(dropped.feat_2d - halved.feat_2d).max() > 0.03 * scale
