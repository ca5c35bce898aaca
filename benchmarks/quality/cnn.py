"""A small convolutional network, trained here on scikit-learn's digits."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

import torch
from torch import nn

from benchmarks import common
from benchmarks.quality.layers import Moments, Subject, check_moments
from benchmarks.workloads import digits

_TRAINING_IMAGES, _CALIBRATION_IMAGES = 1400, 512  # of 1797; the others are held out
_EPOCHS = 20


def convolutions(device: torch.device) -> Iterator[Subject]:
    """Its Conv2d layers, with the images' activations before each; ImportError without sklearn."""
    images, labels = (x.to(device) for x in digits.shuffled())
    training, test = slice(_TRAINING_IMAGES), slice(_TRAINING_IMAGES, None)
    model = _network().to(device)
    digits.train(model, images[training], labels[training], epochs=_EPOCHS)
    correct = digits.accuracy(model, images[test], labels[test])
    common.note(f"CNN on digits: test accuracy {correct:.2%} of {len(labels[test])} images")
    calibration, held_out = images[:_CALIBRATION_IMAGES], images[test]
    for name, layer in model.named_children():
        if isinstance(layer, nn.Conv2d):
            moments = [Moments.of(layer, [x]) for x in (calibration, held_out)]
            check_moments(layer, held_out, moments[1])
            yield Subject("cnn", f"cnn.{name}", layer, calibration, *moments)
        with torch.no_grad():
            calibration, held_out = layer(calibration), layer(held_out)


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
