"""Networks in PyTorch that no library has, written down from their descriptions under the names of common weights."""

from torch import nn


def resnet(block, widths, counts, stem, classes):
    """A ResNet with torchvision's module names, written down independently. stem: (kernel, width, stride, pool)."""

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
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_()))  # in place, as in torchvision
            if block == "bottleneck":
                y = self.bn3(self.conv3(y.relu_()))
            y += self.downsample(x) if hasattr(self, "downsample") else x
            return y.relu_()

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
            x = self.bn1(self.conv1(x)).relu_()
            x = nn.functional.max_pool2d(x, 3, 2, 1) if self.pool else x
            for i in range(self.stages):
                x = getattr(self, f"layer{i + 1}")(x)
            return self.fc(x.mean((2, 3)))

    return ResNet()


def wide_resnet(depth, widen, classes):
    class Layer(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            self.bn1, self.bn2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(width)
            self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
            if inputs != width:
                self.convShortcut = nn.Conv2d(inputs, width, 1, stride, bias=False)

        def forward(self, x):
            activated = self.bn1(x).relu()
            shortcut = self.convShortcut(activated) if hasattr(self, "convShortcut") else x
            return shortcut + self.conv2(self.bn2(self.conv1(activated)).relu())

    class Group(nn.Module):
        def __init__(self, inputs, width, stride):
            super().__init__()
            rest = [Layer(width, width, 1) for _ in range((depth - 4) // 6 - 1)]
            self.layer = nn.Sequential(Layer(inputs, width, stride), *rest)

    class WideResNet(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
            self.block1 = Group(16, 16 * widen, 1)
            self.block2 = Group(16 * widen, 32 * widen, 2)
            self.block3 = Group(32 * widen, 64 * widen, 2)
            self.bn1, self.fc = nn.BatchNorm2d(64 * widen), nn.Linear(64 * widen, classes)

        def forward(self, x):
            x = self.block3.layer(self.block2.layer(self.block1.layer(self.conv1(x))))
            return self.fc(nn.functional.adaptive_avg_pool2d(self.bn1(x).relu(), 1).flatten(1))

    return WideResNet()


def vgg(widths, classes):
    """Pools between the five blocks, but before the last one on images of 64 pixels only."""

    class VGG(nn.Module):
        def __init__(self):
            super().__init__()
            inputs = 3
            for i, block in enumerate(widths):
                layers = []
                for width in block:
                    layers += [nn.Conv2d(inputs, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
                    inputs = width
                setattr(self, f"block{i}", nn.Sequential(*layers))
            self.classifier = nn.Linear(inputs, classes)

        def forward(self, x):
            pools = 4 if x.shape[-1] == 64 else 3
            for i in range(len(widths)):
                x = nn.functional.max_pool2d(x, 2) if 0 < i <= pools else x
                x = getattr(self, f"block{i}")(x)
            return self.classifier(x.mean((2, 3)))

    return VGG()


_DEPTHS = {f"resnet{depth}": depth for depth in (8, 14, 20, 32, 44, 56, 110)}
_COUNTS = {"resnet50": (3, 4, 6, 3), "resnet101": (3, 4, 23, 3), "resnet152": (3, 8, 36, 3)}
_TIMM = {"convnext_s": "convnext_small", "convnext_l": "convnext_large"}
NAMED = (*_DEPTHS, *_COUNTS, *_TIMM)


def by_name(name, small_input, classes):
    """The network that asib_jax.models.MODELS calls so, one of NAMED, for colour images; ConvNeXt is timm's."""
    if name in _DEPTHS:
        return resnet("basic", (16, 32, 64), (_DEPTHS[name] // 6,) * 3, (3, 16, 1, False), classes)
    if name in _COUNTS:
        stem = (3, 64, 1, False) if small_input else (7, 64, 2, True)
        return resnet("bottleneck", (64, 128, 256, 512), _COUNTS[name], stem, classes)
    import timm
    import torchvision_cpu  # noqa: F401, before timm, which imports torchvision

    network = timm.create_model(_TIMM[name], num_classes=classes)
    if small_input:
        network.stem[0] = nn.Conv2d(3, network.stem[0].out_channels, 3, 1, 1)
    return network
