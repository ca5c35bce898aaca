"""ResNet-18, ResNet-50 and MobileNetV2 with random weights, and images that need no download.

Layers, names and sizes are those of torchvision, so that a ``state_dict`` of it loads here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

Network = TypeVar("Network", bound=nn.Module)
_STATISTICS_IMAGES, _STATISTICS_SIZE = 32, 128  # with fewer images, the scale drifts with depth
_FINEST_NOISE = 64  # of the colour noise, in cells a side


class _BasicBlock(nn.Module):
    """Two 3x3 convolutions: He et al. 2016, figure 5."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return y


class _Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions; the 3x3 has the stride, as in torchvision."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = self.expansion * width
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = _downsample(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        y = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return y


def _downsample(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if inputs == outputs and stride == 1:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))


class ResNet(nn.Module):
    """Images [n, 3, height, width] to logits [n, 1000] by four stages of residual blocks."""

    def __init__(self, block: type[_BasicBlock | _Bottleneck], depths: tuple[int, ...]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.relu = nn.ReLU(inplace=True)
        self.maxpool = nn.MaxPool2d(3, 2, 1)
        e = block.expansion
        self.layer1 = _stage(block, 64, 64, depths[0], 1)
        self.layer2 = _stage(block, 64 * e, 128, depths[1], 2)
        self.layer3 = _stage(block, 128 * e, 256, depths[2], 2)
        self.layer4 = _stage(block, 256 * e, 512, depths[3], 2)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(512 * e, 1000)

    def forward(self, x: Tensor) -> Tensor:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        logits: Tensor = self.fc(self.avgpool(x).flatten(1))
        return logits


def _stage(
    block: type[_BasicBlock | _Bottleneck], inputs: int, width: int, depth: int, stride: int
) -> nn.Sequential:
    further = [block(width * block.expansion, width, 1) for _ in range(depth - 1)]
    return nn.Sequential(block(inputs, width, stride), *further)


class _InvertedResidual(nn.Module):
    """Expansion, depthwise convolution, linear projection: Sandler et al. 2018, table 1."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        width = inputs * expansion
        layers = [_conv_bn_relu6(inputs, width, 1)] if expansion > 1 else []
        layers.append(_conv_bn_relu6(width, width, 3, stride, groups=width))
        self.conv = nn.Sequential(
            *layers, nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        )
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.conv(x)
        return x + y if self.residual else y


def _conv_bn_relu6(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU6(inplace=True),
    )


class MobileNetV2(nn.Module):
    """Images [n, 3, height, width] to logits [n, 1000] by inverted residuals (width 1.0)."""

    # Expansion, channels, blocks and stride of each stage: Sandler et al. 2018, table 2.
    stages = (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    )

    def __init__(self) -> None:
        super().__init__()
        features: list[nn.Module] = [_conv_bn_relu6(3, 32, 3, 2)]
        inputs = 32
        for expansion, channels, blocks, stride in self.stages:
            for i in range(blocks):
                step = stride if i == 0 else 1
                features.append(_InvertedResidual(inputs, channels, step, expansion))
                inputs = channels
        features.append(_conv_bn_relu6(inputs, 1280, 1))
        self.features = nn.Sequential(*features)
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, 1000))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        logits: Tensor = self.classifier(F.adaptive_avg_pool2d(x, 1).flatten(1))
        return logits


def resnet18(seed: int = 0) -> ResNet:
    """ResNet-18 (He et al. 2016) in float32 and eval mode, its weights drawn by ``seed``."""
    return _built(lambda: ResNet(_BasicBlock, (2, 2, 2, 2)), seed)


def resnet50(seed: int = 0) -> ResNet:
    """ResNet-50 (He et al. 2016) in float32 and eval mode, its weights drawn by ``seed``."""
    return _built(lambda: ResNet(_Bottleneck, (3, 4, 6, 3)), seed)


def mobilenet_v2(seed: int = 0) -> MobileNetV2:
    """MobileNetV2 (Sandler et al. 2018) in float32 and eval mode, its weights drawn by ``seed``."""
    return _built(MobileNetV2, seed)


def _built(make: Callable[[], Network], seed: int) -> Network:
    """The network with seeded weights and running statistics; the global generator stays."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
            elif isinstance(module, nn.BatchNorm2d):  # not 1 and 0: so folding has work to do
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, std=0.2)
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)
    _set_statistics(model, seed)
    return model.eval()


@torch.no_grad()
def _set_statistics(model: nn.Module, seed: int) -> None:
    """Mean and variance of every BatchNorm from one batch, at a reduced resolution."""
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train()
        norm.momentum = 1.0
    # Not the images that synthetic_images yields for this seed.
    model(torch.stack([_image(_STATISTICS_SIZE, (seed, i, 1)) for i in range(_STATISTICS_IMAGES)]))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def synthetic_images(
    count: int, batch_size: int, size: int = 224, seed: int = 0
) -> Iterator[Tensor]:
    """``count`` images of smooth colour noise, as batches float32 [batch_size, 3, size, size].

    Over many images the mean is about 0 and the standard deviation about 1. An image depends on
    ``seed``, ``size`` and its index only, and no more than one batch is held. The last batch may be
    smaller. ValueError for a count, batch_size or size below 1.
    """
    for name, value in (("count", count), ("batch_size", batch_size), ("size", size)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    starts = range(0, count, batch_size)
    return (
        torch.stack([_image(size, (seed, i)) for i in range(n, min(n + batch_size, count))])
        for n in starts
    )


def _image(size: int, key: tuple[int, ...]) -> Tensor:
    """Noise with half the amplitude at twice the frequency, mostly grey, as [3, size, size]."""
    random = np.random.default_rng(key)

    def normal(*shape: int) -> Tensor:
        return torch.from_numpy(random.standard_normal(shape, np.float32))

    side, amplitude = 1, 1.0
    x = torch.zeros(1, 3, 1, 1)
    while side < size:
        side, amplitude = min(2 * side, size), amplitude / 2
        x = F.interpolate(x, size=(side, side), mode="bilinear")
        if side <= _FINEST_NOISE:  # finer than that, it is only smoothed
            x = x + amplitude * (normal(1, 1, side, side) + 0.5 * normal(1, 3, side, side))
    # Contrast, brightness and colour differ by image: 0.7 + 0.3 of the variance.
    contrast, shade = 0.6 + 0.5 * random.random(), 0.45 * normal(1) + 0.3 * normal(3)
    x = (x[0] - x.mean()) / x.std().clamp_min(1e-6)
    return contrast * x + shade[:, None, None]
