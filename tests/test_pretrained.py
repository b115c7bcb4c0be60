"""Importing weights: the network computes what PyTorch computes, and nothing is left over unnoticed."""
import hashlib
import re

import jax
import numpy as np
import pytest
from safetensors.numpy import save_file

from asib_jax.models.kd_model import KDModel
from asib_jax.models.resnet import cifar_resnet, imagenet_resnet
from asib_jax.pretrained import digest, import_weights, load_weights

CLASSES = 5
SMALL = KDModel(cifar_resnet(8, widths=(2, 3, 4), stem=2), CLASSES, (0.5,), (0.25,), adapter_dim=3,
                residual_adapter=True)
SHAPE = (1, 8, 8, 3)


def torch_resnet(torch, block, widths, counts, stem, classes):
    """A ResNet with torchvision's module names, written down independently. stem: (kernel, width, stride, pool)."""
    nn = torch.nn

    class Block(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            outputs = width if block == "basic" else 4 * width
            if block == "basic":
                self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
                self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            else:
                self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
                self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
                self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
                self.bn3 = nn.BatchNorm2d(outputs)
            self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
            if stride != 1 or inputs != outputs:
                shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                self.downsample = nn.Sequential(shortcut, nn.BatchNorm2d(outputs))

        def forward(self, x):
            y = self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
            if block == "bottleneck":
                y = self.bn3(self.conv3(torch.relu(y)))
            return torch.relu(y + (self.downsample(x) if hasattr(self, "downsample") else x))

    class ResNet(nn.Module):
        def __init__(self):
            super().__init__()
            kernel, inputs, stride, self.pool = stem
            self.conv1 = nn.Conv2d(3, inputs, kernel, stride, kernel // 2, bias=False)
            self.bn1 = nn.BatchNorm2d(inputs)
            for i, (width, count) in enumerate(zip(widths, counts)):
                blocks = []
                for j in range(count):
                    blocks.append(Block(inputs, width, 2 if i > 0 and j == 0 else 1))
                    inputs = width if block == "basic" else 4 * width
                setattr(self, f"layer{i + 1}", nn.Sequential(*blocks))
            self.stages = len(widths)
            self.fc = nn.Linear(inputs, classes)

        def forward(self, x):
            x = torch.relu(self.bn1(self.conv1(x)))
            x = nn.functional.max_pool2d(x, 3, 2, 1) if self.pool else x
            for i in range(self.stages):
                x = getattr(self, f"layer{i + 1}")(x)
            feat_2d = x.mean((2, 3))
            return feat_2d, self.fc(feat_2d)

    return ResNet()


def numpy_state(network):
    return {name: value.numpy().copy() for name, value in network.state_dict().items()}


def shapes_of(model, shape=SHAPE):
    return jax.eval_shape(lambda key: model.init(key, np.zeros(shape, np.float32), train=False), jax.random.key(0))


def zeros_of(model, shape=SHAPE):
    return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes_of(model, shape))


def state_for(model):
    """A random PyTorch state dict for SMALL's backbone and classifier, its names spelt out here rather than derived."""
    generator, state = np.random.default_rng(0), {}

    def norm(name, width):
        for leaf in ("weight", "bias", "running_mean", "running_var"):
            state[f"{name}.{leaf}"] = generator.uniform(0.5, 1.5, width).astype(np.float32)
        state[f"{name}.num_batches_tracked"] = np.array(7)

    def conv(name, outputs, inputs, kernel):
        state[f"{name}.weight"] = generator.normal(size=(outputs, inputs, kernel, kernel)).astype(np.float32)

    conv("conv1", 2, 3, 3)
    norm("bn1", 2)
    for layer, inputs, width in ((1, 2, 2), (2, 2, 3), (3, 3, 4)):
        conv(f"layer{layer}.0.conv1", width, inputs, 3)
        norm(f"layer{layer}.0.bn1", width)
        conv(f"layer{layer}.0.conv2", width, width, 3)
        norm(f"layer{layer}.0.bn2", width)
        if inputs != width:
            conv(f"layer{layer}.0.downsample.0", width, inputs, 1)
            norm(f"layer{layer}.0.downsample.1", width)
    state["fc.weight"] = generator.normal(size=(model.num_classes, 4)).astype(np.float32)
    state["fc.bias"] = generator.normal(size=model.num_classes).astype(np.float32)
    return state


@pytest.mark.parametrize(("block", "widths", "counts", "stem", "architecture", "size"), [
    ("basic", (4, 6, 8), (2, 2, 2), (3, 4, 1, False), cifar_resnet(14, widths=(4, 6, 8), stem=4), 16),
    ("bottleneck", (64, 128, 256, 512), (2, 1, 1, 1), (7, 64, 2, True), imagenet_resnet((2, 1, 1, 1), False), 64),
    ("bottleneck", (64, 128, 256, 512), (1, 1, 1, 1), (3, 64, 1, False), imagenet_resnet((1, 1, 1, 1), True), 16),
])
def test_network_equals_pytorch(block, widths, counts, stem, architecture, size):
    """feat_2d and logits to 1e-4 relative, in evaluation; and after one training pass the new running statistics."""
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    network = torch_resnet(torch, block, widths, counts, stem, CLASSES)
    positions = {}  # BatchNorm's name -> how many values a statistic is taken over
    for name, module in network.named_modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for leaf in (module.weight.data, module.bias.data, module.running_mean, module.running_var):
                leaf.uniform_(0.5, 1.5)
            module.register_forward_hook(lambda m, args, out, name=name: positions.update({name: out[:, 0].numel()}))
    old = numpy_state(network)
    model = KDModel(architecture, CLASSES, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25))
    shape = (4, size, size, 3)
    variables = import_weights(old, shapes_of(model, shape))
    pixels = np.random.default_rng(0).integers(0, 256, shape, np.uint8)

    @jax.jit
    def run(variables):
        return (model.apply(variables, pixels, train=False),
                model.apply(variables, pixels, train=True, mutable=["batch_stats"]))

    evaluated, (trained, updates) = run(variables)
    x = torch.tensor(((pixels / 255 - model.mean) / model.std).astype(np.float32).transpose(0, 3, 1, 2))
    with torch.no_grad():
        expected = network.eval()(x)
        expected_trained = network.train()(x)
    new = numpy_state(network)
    for name, n in positions.items():  # PyTorch's running variance takes in the unbiased one, ours the biased
        taken_in = new[f"{name}.running_var"] - 0.9 * old[f"{name}.running_var"]
        new[f"{name}.running_var"] -= taken_in / n
    expected_stats = import_weights(new, variables)["batch_stats"]

    def close(actual, expected, rtol=1e-4):
        np.testing.assert_allclose(actual, expected, rtol=rtol, atol=rtol * np.abs(expected).max())

    close(evaluated.feat_2d, expected[0].numpy())
    close(evaluated.logit, expected[1].numpy())
    close(trained.logit, expected_trained[1].numpy(), 1e-3)  # a training pass divides by spreads of few values
    jax.tree.map(close, updates["batch_stats"], expected_stats)


def test_every_leaf_comes_from_its_source():
    """Layouts by hand for one leaf of each kind; adapters keep what they had; the common other names mean the same."""
    state, variables = state_for(SMALL), zeros_of(SMALL)
    variables["params"]["distill_adapter"]["fc1"]["bias"] += 3
    imported = import_weights(state, variables)
    assert jax.tree.structure(imported) == jax.tree.structure(variables)
    params, stats = imported["params"], imported["batch_stats"]
    block = params["layer2"]["block0"]
    kernel, shortcut = state["layer2.0.conv1.weight"], state["layer2.0.downsample.0.weight"]
    assert block["conv1"]["kernel"][2, 0, 1, 2] == kernel[2, 1, 2, 0]  # [row, column, in, out], [out, in, row, column]
    np.testing.assert_array_equal(block["downsample_conv"]["kernel"][0, 0], shortcut[..., 0, 0].T)
    np.testing.assert_array_equal(block["downsample_bn"]["scale"], state["layer2.0.downsample.1.weight"])
    np.testing.assert_array_equal(params["stem"]["bn"]["bias"], state["bn1.bias"])
    np.testing.assert_array_equal(stats["layer3"]["block0"]["bn2"]["mean"], state["layer3.0.bn2.running_mean"])
    np.testing.assert_array_equal(stats["layer3"]["block0"]["bn2"]["var"], state["layer3.0.bn2.running_var"])
    np.testing.assert_array_equal(params["classifier"]["kernel"], state["fc.weight"].T)
    np.testing.assert_array_equal(params["distill_adapter"]["fc1"]["bias"], 3)
    np.testing.assert_array_equal(params["residual_adapter"]["kernel"], 0)

    renamed = {re.sub(r"^fc\b", "linear", name.replace("downsample", "shortcut")): v for name, v in state.items()}
    assert "linear.bias" in renamed and "layer2.0.shortcut.0.weight" in renamed
    jax.tree.map(np.testing.assert_array_equal, import_weights(renamed, variables), imported)


def test_what_does_not_fit_is_named():
    state, variables = state_for(SMALL), zeros_of(SMALL)

    def refusal(changes=(), without=()):
        with pytest.raises(ValueError) as error:
            import_weights({k: v for k, v in {**state, **dict(changes)}.items() if k not in without}, variables)
        return str(error.value)

    extra = {f"layer1.{i}.conv1.weight": state["layer1.0.conv1.weight"] for i in range(1, 13)}
    message = refusal(extra)
    assert "source keys without a place in the model (12)" in message and "layer1.10.conv1.weight" in message
    assert "layer1.11.conv1.weight" not in message and "... and 2 more" in message
    message = refusal(without=("layer1.0.bn2.running_var", "fc.weight"))
    assert "model leaves without a source (2)" in message
    assert "params/classifier/kernel" in message and "batch_stats/layer1/block0/bn2/var" in message
    assert "adapter" not in message
    message = refusal({"conv1.weight": np.zeros((2, 3, 7, 7), np.float32)})
    assert "different shapes (1)" in message
    assert "conv1.weight (7, 7, 3, 2), the model's params/stem/conv/kernel (3, 3, 3, 2)" in message
    assert "(1):\n  head.weight" in refusal({"head.weight": np.zeros((5, 4))})
    assert "(1):\n  linear.bias" in refusal({"linear.bias": state["fc.bias"]})  # the classifier is taken already
    message = refusal({"fc.weight": np.zeros((1000, 4)), "fc.bias": np.zeros(1000)})
    assert "the weights classify 1000 classes, the model 5" in message


def test_files(tmp_path):
    """Both formats give back the arrays; nothing that can hold code is read."""
    arrays = {"conv1.weight": np.arange(6, dtype=np.float32).reshape(1, 2, 3, 1), "fc.bias": np.float32([1, -2])}
    save_file(arrays, tmp_path / "a.safetensors")
    np.savez(tmp_path / "a.npz", **arrays)
    for name in ("a.safetensors", "a.npz"):
        loaded = load_weights(tmp_path / name)
        assert set(loaded) == set(arrays)
        for key in arrays:
            np.testing.assert_array_equal(loaded[key], arrays[key])
    np.savez(tmp_path / "pickled.npz", fc=np.array([{"a": 1}]))
    with pytest.raises(ValueError, match="allow_pickle=False"):
        load_weights(tmp_path / "pickled.npz")
    with pytest.raises(ValueError, match=r"a\.h5: expected \.safetensors or \.npz$"):
        load_weights(tmp_path / "a.h5")
    with pytest.raises(FileNotFoundError, match=r"absent\.safetensors"):
        load_weights(tmp_path / "absent.safetensors")
    assert digest(tmp_path / "a.npz") == hashlib.sha256((tmp_path / "a.npz").read_bytes()).hexdigest()


def test_the_conversion_a_refusal_suggests_works(tmp_path):
    torch = pytest.importorskip("torch")
    source = tmp_path / "weights.pth"
    torch.save({"fc.bias": torch.tensor([1.0, -2.0])}, source)
    with pytest.raises(ValueError, match="a .pth file is a pickle") as error:
        load_weights(source)
    exec(str(error.value).split("\n", 1)[1], {})
    np.testing.assert_array_equal(load_weights(tmp_path / "weights.safetensors")["fc.bias"], [1, -2])
