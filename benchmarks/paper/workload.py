"""Digits and networks trained on them here, as the experiments see them: one layer at a time."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from adaround_ext import AdaRoundConfig
from adaround_ext.grid import QuantGrid, make_grid
from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.ops import dequantize
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.trace import trace
from adaround_ext.transforms.batch_norm import fold_batch_norm_
from benchmarks.workloads import digits

CALIBRATION_IMAGES = 512
_CHUNK = 512  # images a run


class Images(NamedTuple):
    """Images [n, 1, 8, 8] with their labels [n]."""

    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Score:
    """accuracy in percent; loss, the mean cross-entropy; error, the logits' relative squared."""

    accuracy: float
    loss: float
    error: float

    @staticmethod
    def of(logits: Tensor, exact: Tensor, labels: Tensor) -> Score:
        """Of logits [n, classes] beside the ``exact`` ones of the full-precision network."""
        right = (logits.argmax(1) == labels).double().mean()
        loss = F.cross_entropy(logits.double(), labels)
        error = (logits - exact).square().sum() / exact.square().sum()
        return Score(100 * float(right), float(loss), float(error))


def in_parts(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    """The model's outputs, by parts of the images."""
    return torch.cat([model(chunk) for chunk in images.split(_CHUNK)])


def calibration() -> Images:
    data = digits.load()
    return Images(
        data.training_images[:CALIBRATION_IMAGES], data.training_labels[:CALIBRATION_IMAGES]
    )


def test_images(shifts: int = 1) -> Images:
    """The 497 test images, each at all places up to ``shifts`` pixels away, as in training.

    One image is 0.2 points of accuracy; with the shifts, 0.02.
    """
    data = digits.load()
    steps = [(i, j) for i in range(-shifts, shifts + 1) for j in range(-shifts, shifts + 1)]
    padded = F.pad(data.test_images, (shifts,) * 4)
    moved = [padded.roll(step, (2, 3)) for step in steps]
    inner = slice(shifts, shifts + data.test_images.shape[-1])
    images = torch.cat([images[:, :, inner, inner] for images in moved])
    return Images(images, data.test_labels.repeat(len(steps)))


@lru_cache(maxsize=8)
def _trained(kind: digits.Kind, seed: int, epochs: int | None) -> nn.Module:
    model = digits.trained(kind, seed, epochs)
    images = calibration().images[:1]

    def run() -> object:
        return model(images)

    with evaluation(model):
        fold_batch_norm_(model, trace(model, run), run)
    return model.requires_grad_(False)


def network(kind: digits.Kind = "residual", seed: int = 0, epochs: int | None = None) -> nn.Module:
    """A trained network with its batch norms folded, an own copy; trained once in a process."""
    return copy.deepcopy(_trained(kind, seed, epochs))


class Layer:
    """One layer of a network, whose weight matrix is replaced while the others stay."""

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model = model
        self.name = name
        self.matrix: MatrixLayer = matrix_layer(model.get_submodule(name))
        self.weight = self.matrix.weight_matrix()

    def grid(self, bits: int) -> QuantGrid:
        """The paper's: symmetric, one scale for the tensor, of least squared weight error."""
        return make_grid(
            self.weight, AdaRoundConfig(bits=bits, granularity="per_tensor", scale="mse")
        )

    def logits(self, weight: Tensor, images: Tensor) -> Tensor:
        """The network's outputs for this matrix [rows, cols], differentiable in it."""
        weights = {f"{self.name}.weight": self.matrix.weight_from_matrix(weight)}
        return in_parts(lambda chunk: functional_call(self.model, weights, (chunk,)), images)

    @torch.no_grad()
    def inputs(self, images: Tensor) -> Tensor:
        """What the layer gets for these images."""
        captured: list[Tensor] = []
        with self.matrix.layer.register_forward_pre_hook(
            lambda _, x: captured.append(x[0].clone())
        ):
            self.model(images)
        return captured[0]

    def scorer(self, data: Images) -> Scorer:
        return Scorer(self, data)


class Scorer:
    """Scores weight matrices on the same images."""

    def __init__(self, layer: Layer, data: Images) -> None:
        self.layer = layer
        self.data = data
        with torch.no_grad():
            self.logits = layer.logits(layer.weight, data.images)

    @torch.no_grad()
    def __call__(self, weight: Tensor) -> Score:
        return Score.of(self.layer.logits(weight, self.data.images), self.logits, self.data.labels)

    def codes(self, codes: Tensor, grid: QuantGrid) -> Score:
        return self(dequantize(codes, grid.scale, grid.zero_point))
