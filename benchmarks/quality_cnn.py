"""A small convolutional network for bench quality, trained here on scikit-learn's digits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import common
from benchmarks.quality_layers import Moments, Subject, check_moments

_TRAINING_IMAGES, _CALIBRATION_IMAGES = 1400, 512  # of 1797; the others are held out
_EPOCHS, _BATCH = 20, 64


def convolutions(device: torch.device) -> Iterator[Subject]:
    """Its Conv2d layers, with the images' activations before each; ImportError without sklearn."""
    images, labels = _digits(device)
    training, test = slice(_TRAINING_IMAGES), slice(_TRAINING_IMAGES, None)
    model = _network().to(device)
    _train(model, images[training], labels[training])
    correct = (model(images[test]).argmax(1) == labels[test]).float().mean()
    common.note(f"CNN on digits: test accuracy {float(correct):.2%} of {len(labels[test])} images")
    calibration, held_out = images[:_CALIBRATION_IMAGES], images[test]
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d):
            moments = [Moments.of(layer, [x]) for x in (calibration, held_out)]
            check_moments(layer, held_out, moments[1])
            yield Subject("cnn", f"cnn.{name}", layer, calibration, *moments)
        with torch.no_grad():
            calibration, held_out = layer(calibration), layer(held_out)


def _digits(device: torch.device) -> tuple[Tensor, Tensor]:
    """(images [1797, 1, 8, 8], labels), in an order drawn once."""
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        needs = "the digits need the package scikit-learn"
        raise ImportError(f'{needs}: pip install "adaround_ext[demo]"') from error
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))
    images = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 16
    return images.to(device), torch.from_numpy(digits.target).long()[order].to(device)


def _network() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[tuple[str, nn.Module]] = [
        ("first", nn.Conv2d(1, 32, 3, padding=1)),
        ("second", nn.Conv2d(32, 64, 3, padding=1)),
        ("depthwise", nn.Conv2d(64, 64, 3, padding=1, groups=64)),
        ("pointwise", nn.Conv2d(64, 128, 1)),
        ("strided", nn.Conv2d(128, 64, 3, stride=2, padding=1)),
    ]
    modules = OrderedDict[str, nn.Module]()
    for name, layer in layers:
        modules[name], modules[f"{name}_relu"] = layer, nn.ReLU()
    modules["flatten"], modules["head"] = nn.Flatten(), nn.Linear(64 * 4 * 4, 10)
    return nn.Sequential(modules)


def _train(model: nn.Module, images: Tensor, labels: Tensor) -> None:
    generator = torch.Generator().manual_seed(0)
    adam = torch.optim.Adam(model.parameters(), 2e-3)
    steps = _EPOCHS * (len(images) // _BATCH)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in range(_EPOCHS):
        order = torch.randperm(len(images), generator=generator).to(images.device)
        for chosen in order[: len(images) // _BATCH * _BATCH].split(_BATCH):
            adam.zero_grad()
            F.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            adam.step()
            decay.step()
