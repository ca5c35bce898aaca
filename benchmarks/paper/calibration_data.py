"""Images to calibrate with: the digits that a network was trained on, and other kinds.

All are float32 [count, 1, 8, 8] in 0..1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.workloads import digits


def own(count: int, seed: int) -> Tensor:
    """Digits of the training images, drawn without replacement."""
    images = digits.load().training_images
    return images[torch.randperm(len(images), generator=_generator(seed))[:count]]


def inverted(count: int, seed: int) -> Tensor:
    """The same digits, black on white where they were white on black."""
    return 1 - own(count, seed)


def textures(count: int, seed: int) -> Tensor:
    """Smooth random images: noise of 3x3 cells, enlarged, with the digits' range."""
    cells = torch.rand(count, 1, 3, 3, generator=_generator(seed))
    return F.interpolate(cells, (8, 8), mode="bicubic").clamp(0, 1)


def noise(count: int, seed: int) -> Tensor:
    """Independent pixels, uniform in 0..1."""
    return torch.rand(count, 1, 8, 8, generator=_generator(seed))


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


DOMAINS: dict[str, Callable[[int, int], Tensor]] = {
    "own": own,
    "inverted": inverted,
    "textures": textures,
    "noise": noise,
}
