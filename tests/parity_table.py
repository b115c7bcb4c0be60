"""Every family at full size against PyTorch, as the table of docs/models.md:

python tests/parity_table.py [NAME ...]     # a quarter of an hour on one core; needs torchvision and timm
"""

import pathlib
import sys
from collections.abc import Callable
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import parity
import timm
import torch
import torch_networks
import torchvision
import torchvision_cpu  # noqa: F401, before torchvision
from torchvision.models.resnet import Bottleneck, ResNet

from asib_jax.models import MODELS
from asib_jax.models.convnext import convnext
from asib_jax.models.efficientnet import efficientnet
from asib_jax.models.layers import Architecture
from asib_jax.models.resnet import imagenet_resnet


class Case(NamedTuple):
    """network: makes PyTorch's; size: of its native images, in pixels; stem: makes its stem that of small images."""

    network: Callable[[], torch.nn.Module]
    size: int
    stem: Callable[[torch.nn.Module], None] | None = None
    architecture: Callable[[bool], Architecture] | None = None  # None: MODELS'


def _torchvision(name: str) -> Callable[[], torch.nn.Module]:
    return lambda: getattr(torchvision.models, name)(num_classes=parity.CLASSES)


def _timm(name: str, **options) -> Callable[[], torch.nn.Module]:
    return lambda: timm.create_model(name, num_classes=parity.CLASSES, **options)


def _small_resnet(network: torch.nn.Module) -> None:
    network.conv1, network.maxpool = torch.nn.Conv2d(3, 64, 3, 1, 1, bias=False), torch.nn.Identity()


def _small_convnext(network: torch.nn.Module) -> None:
    network.stem[0] = torch.nn.Conv2d(3, network.stem[0].out_channels, 3, 1, 1)


def _small_shufflenet(network: torch.nn.Module) -> None:
    network.conv1[0].stride, network.maxpool = (1, 1), torch.nn.Identity()


def _unit_stride(find: Callable[[torch.nn.Module], torch.nn.Conv2d]) -> Callable[[torch.nn.Module], None]:
    def change(network: torch.nn.Module) -> None:
        find(network).stride = (1, 1)

    return change


def _basic(depth: int, widths: tuple[int, ...] = (16, 32, 64), stem: int = 16) -> Case:
    counts = (depth // 6,) * 3
    return Case(lambda: torch_networks.resnet("basic", widths, counts, (3, stem, 1, False), parity.CLASSES), 32)


_TIMM_STEM, _FEATURES = _unit_stride(lambda n: n.conv_stem), _unit_stride(lambda n: n.features[0][0])
_L_WIDTHS = (192, 384, 768, 1536)
CASES = {
    "resnet20": _basic(20),
    "resnet56": _basic(56),
    "resnet8x4": _basic(8, (64, 128, 256), 32),
    "wrn_16_2": Case(lambda: torch_networks.wide_resnet(16, 2, parity.CLASSES), 32),
    "wrn_40_1": Case(lambda: torch_networks.wide_resnet(40, 1, parity.CLASSES), 32),
    "wrn_40_2": Case(lambda: torch_networks.wide_resnet(40, 2, parity.CLASSES), 32),
    "vgg8": Case(lambda: torch_networks.vgg(((64,), (128,), (256,), (512,), (512,)), parity.CLASSES), 32),
    "vgg13": Case(
        lambda: torch_networks.vgg(((64,) * 2, (128,) * 2, (256,) * 2, (512,) * 2, (512,) * 2), parity.CLASSES), 32
    ),
    "resnet50": Case(_torchvision("resnet50"), 224, _small_resnet),
    "resnet101": Case(_torchvision("resnet101"), 224, _small_resnet),
    "resnet152 (depths 3, 8, 9, 3)": Case(  # 50 blocks magnify the rounding of a training pass to 4e-4
        lambda: ResNet(Bottleneck, (3, 8, 9, 3), parity.CLASSES),
        224,
        _small_resnet,
        lambda small: imagenet_resnet((3, 8, 9, 3), small),
    ),
    "mobilenet_v2": Case(_torchvision("mobilenet_v2"), 224, _FEATURES),
    "mobilenet_v2 (timm)": Case(_timm("mobilenetv2_100"), 224, _TIMM_STEM),
    "shufflenet_v2": Case(_torchvision("shufflenet_v2_x1_0"), 224, _small_shufflenet),
    "efficientnet_b0": Case(_timm("efficientnet_b0"), 224, _TIMM_STEM),
    "efficientnet_b0 (torchvision)": Case(_torchvision("efficientnet_b0"), 224, _FEATURES),
    "efficientnet_b2": Case(_timm("efficientnet_b2"), 256, _TIMM_STEM),
    "efficientnet_l2 (B0's width and depth)": Case(
        _timm("tf_efficientnet_b0"), 224, _TIMM_STEM, lambda small: efficientnet(1.0, 1.0, 0.5, small, tensorflow=True)
    ),
    "convnext_s": Case(_timm("convnext_small"), 224, _small_convnext),
    "convnext_l (depths 1, 1, 3, 1)": Case(
        _timm("convnext_large", depths=(1, 1, 3, 1)),
        224,
        _small_convnext,
        lambda small: convnext(_L_WIDTHS, (1, 1, 3, 1), 0.5, small),
    ),
}


def measure(name: str, small_input: bool) -> dict[str, float]:
    """`parity.errors` of one case, at its native size or with the small stem on 32 pixels."""
    case, network = CASES[name], CASES[name].network()
    if small_input:
        case.stem(network)
    architecture = case.architecture or MODELS[name.split()[0]]
    return parity.errors(network, architecture(small_input), 32 if small_input else case.size)


def main(names: list[str]) -> None:
    print(f"PyTorch {torch.__version__}, torchvision {torchvision.__version__}, timm {timm.__version__}\n")
    print("| network | size | " + " | ".join(parity.BOUNDS) + " |")
    print("|---|---|" + "---|" * len(parity.BOUNDS))
    outside = []
    for name, case in CASES.items():
        if names and name.split()[0] not in names:
            continue
        for small_input in (False, True) if case.stem else (False,):
            errors = measure(name, small_input)
            size = "32, small stem" if small_input else case.size
            cells = " | ".join(f"{errors[key]:.0e}" if errors[key] else "none" for key in parity.BOUNDS)
            print(f"| {name} | {size} | {cells} |", flush=True)
            outside += [] if parity.within_bounds(errors) else [f"{name} at {size}"]
    if outside:
        sys.exit(f"further from PyTorch than {parity.BOUNDS}: {', '.join(outside)}")


if __name__ == "__main__":
    main(sys.argv[1:])
