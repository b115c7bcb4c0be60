"""How far a network here is from PyTorch's with the same weights."""

import copy

import jax
import numpy as np
import torch

from asib_jax.models.kd_model import KDModel
from asib_jax.models.layers import Architecture
from asib_jax.weights.reading import import_weights
from asib_jax.weights.torch_names import export_weights

CLASSES, MEAN, STD = 10, (0.5, 0.4, 0.3), (0.2, 0.3, 0.25)


def errors(network: torch.nn.Module, architecture: Architecture, size: int, batch: int = 4) -> dict[str, float]:
    """Largest difference over largest magnitude. In float32: evaluation's logits and feat_2d; logits and running
    statistics (worst tensor) after one training pass without dropout. In float64: that pass's gradients of the first
    and last layer. In float32 rounding decides on a slope wherever an activation lies near a kink of relu, and a deep
    network has millions: PyTorch's own gradients are percents away from those it computes in float64.

    PyTorch's running variance takes in the unbiased variance of the batch, ours the biased: PyTorch's is corrected by
    the factor before it is compared. Asserts that the weights exported again, under the convention that fits best, are
    PyTorch's own, bit by bit.
    """
    model = KDModel(architecture, CLASSES, MEAN, STD)
    pixels = np.random.default_rng(0).integers(0, 256, (batch, size, size, 3), np.uint8)
    _randomise(network, pixels)
    labels = np.arange(batch) % CLASSES
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0), pixels, train=False))
    old, wide = _state(network), copy.deepcopy(network).double()
    variables, fresh = import_weights(old, shapes, architecture)
    assert not fresh, fresh
    exports = [export_weights(variables, architecture._replace(names=(names,))) for names in architecture.names]
    _assert_strict_round_trip(network, max(exports, key=lambda exported: len(exported.keys() & old.keys())))
    evaluated, (trained, new) = _torch_evaluation(network, pixels), _torch_training(network, pixels)
    ours, ours_trained, stats = jax.jit(lambda v: _forward(model, v, pixels))(variables)
    expected = import_weights(new, shapes, architecture).variables.get("batch_stats", {})
    first_grad, last_grad = _torch_gradients(wide, pixels, labels)
    grads = _gradients(model, variables, pixels, labels)
    return {
        "logits": relative(ours.logit, evaluated["logits"]),
        "feat_2d": relative(ours.feat_2d, evaluated["feat_2d"]),
        "training logits": relative(ours_trained, trained),
        "statistics": float(np.max([0.0, *jax.tree.leaves(jax.tree.map(relative, stats, expected))])),  # max hides nan
        "first gradient": relative(_first_kernel(grads[architecture.stages[0][0]]), first_grad.transpose(2, 3, 1, 0)),
        "last gradient": relative(grads["classifier"]["kernel"], last_grad.T),
    }


# A training pass divides by spreads of few values, which magnifies the rounding of float32.
BOUNDS = {
    "logits": 1e-4,
    "feat_2d": 1e-4,
    "training logits": 1e-3,
    "statistics": 1e-4,
    "first gradient": 1e-5,
    "last gradient": 1e-5,
}


def within_bounds(errors: dict[str, float]) -> bool:
    return all(errors[name] <= bound for name, bound in BOUNDS.items())


def relative(actual, expected) -> float:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def _randomise(network: torch.nn.Module, pixels: np.ndarray) -> None:
    """The same values whatever was drawn before, also where initialisers leave constants; no dropout of any kind.

    Running statistics are those of the images but for random factors: with any others activations grow from layer to
    layer, until float32 and float64 disagree in PyTorch, too.
    """
    torch.manual_seed(0)
    for module in network.modules():
        for name in ("drop_prob", "drop_rate", "p"):  # timm's and torchvision's stochastic depth, dropout
            if isinstance(getattr(module, name, None), float):
                setattr(module, name, 0.0)
    for name, leaf in network.named_parameters():
        if leaf.ndim > 1:
            torch.nn.init.kaiming_normal_(leaf)
        elif name.endswith(("weight", "gamma")):
            leaf.data.uniform_(0.5, 1.5)
        elif leaf.ndim == 1:
            leaf.data.uniform_(-0.5, 0.5)
    norms = list(_norms(network).values())
    momenta = [module.momentum for module in norms]
    for module in norms:
        module.momentum = 1.0
    with torch.no_grad():
        network.train()(_normalised(pixels))
    for module, momentum in zip(norms, momenta):
        module.momentum = momentum
        module.num_batches_tracked.zero_()
        for leaf in (module.running_mean, module.running_var):
            leaf.mul_(torch.empty_like(leaf).uniform_(0.8, 1.25))


def _norms(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {
        name: module
        for name, module in network.named_modules()
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
    }


def _state(network: torch.nn.Module) -> dict[str, np.ndarray]:
    return {name: value.detach().numpy().copy() for name, value in network.state_dict().items()}


def _assert_strict_round_trip(network: torch.nn.Module, exported: dict[str, np.ndarray]) -> None:
    before = _state(network)
    network.load_state_dict({name: torch.from_numpy(value.copy()) for name, value in exported.items()}, strict=True)
    for name, value in _state(network).items():
        np.testing.assert_array_equal(value, before[name], err_msg=name)


def _normalised(pixels: np.ndarray, dtype: type = np.float32) -> torch.Tensor:
    """As KDModel does it, so that both networks start from the same numbers to the last bit of float64."""
    scaled = pixels.astype(np.float32) / np.float32(255)
    return torch.tensor(((scaled - np.array(MEAN)) / np.array(STD)).astype(dtype).transpose(0, 3, 1, 2))


def _classifier(network: torch.nn.Module) -> tuple[str, torch.nn.Linear]:
    """The last linear layer, whose input is feat_2d."""
    return [(n, m) for n, m in network.named_modules() if isinstance(m, torch.nn.Linear)][-1]


def _first_kernel(stage: dict) -> np.ndarray:
    """The kernel of the convolution that reads the image: the only one with three input channels."""
    return next(leaf for leaf in jax.tree.leaves(stage) if leaf.ndim == 4 and leaf.shape[2] == 3)


def _torch_evaluation(network, pixels) -> dict[str, np.ndarray]:
    seen = {}
    hook = _classifier(network)[1].register_forward_pre_hook(lambda m, inputs: seen.update(feat_2d=inputs[0].numpy()))
    with torch.no_grad():
        seen["logits"] = network.eval()(_normalised(pixels)).numpy()
    hook.remove()
    return seen


def _torch_training(network, pixels) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits of one training pass, and the state after it with variances as if PyTorch took in the biased ones."""
    norms = _norms(network)
    old, counts = _state(network), {}  # counts: how many values a statistic is taken over
    for name, module in norms.items():
        module.register_forward_hook(lambda m, args, out, name=name: counts.update({name: out[:, 0].numel()}))
    with torch.no_grad():
        logits = network.train()(_normalised(pixels)).numpy()
    new = _state(network)
    for name, module in norms.items():
        taken_in = new[f"{name}.running_var"] - (1 - module.momentum) * old[f"{name}.running_var"]
        new[f"{name}.running_var"] -= taken_in / counts[name]
    return logits, new


def _torch_gradients(network, pixels, labels) -> tuple[np.ndarray, np.ndarray]:
    first = next(module for module in network.modules() if isinstance(module, torch.nn.Conv2d))
    logits = network.train()(_normalised(pixels, np.float64))
    torch.nn.functional.cross_entropy(logits, torch.tensor(labels)).backward()
    return first.weight.grad.numpy(), _classifier(network)[1].weight.grad.numpy()


def _forward(model, variables, pixels):
    trained, changed = model.apply(variables, pixels, train=True, mutable=["batch_stats"])
    return model.apply(variables, pixels, train=False), trained.logit, changed.get("batch_stats", {})


def _gradients(model, variables, pixels, labels) -> dict:
    """Of the parameters, with the stages in float64."""

    def loss(params, rest):
        outputs, _ = wide.apply({**rest, "params": params}, pixels, train=True, mutable=["batch_stats"])
        return -jax.nn.log_softmax(outputs.logit)[np.arange(len(labels)), labels].mean()

    with jax.enable_x64(True):
        wide = model.clone(dtype=np.float64)
        variables = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), variables)
        return jax.device_get(jax.jit(jax.grad(loss))(variables["params"], variables))
