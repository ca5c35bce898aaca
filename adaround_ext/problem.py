"""What is solved together, and what a solver returns."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext import ops
from adaround_ext.grid import QuantGrid
from adaround_ext.layers import MatrixLayer
from adaround_ext.objective import GramObjective, SampledObjective
from adaround_ext.solution import comparable


@dataclass(frozen=True)
class Problem:
    """Layers whose rows, stacked to weight [rows, cols], are solved under one objective."""

    layers: list[MatrixLayer]
    weight: Tensor
    objective: GramObjective | SampledObjective
    kind: str
    reason: str
    samples: int
    collecting_seconds: float
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return ", ".join(str(layer.layer) for layer in self.layers)

    @property
    def sizes(self) -> list[int]:
        return [layer.rows for layer in self.layers]

    def new_bias(self, weight_q: Tensor) -> Tensor:
        """The biases that take up the mean error of weight_q, float64 [rows]."""
        assert isinstance(self.objective, GramObjective)
        change = self.objective.bias_change(weight_q)
        for part, layer in zip(change.split(self.sizes), self.layers, strict=True):
            if layer.bias is not None:
                part += layer.bias
        return change

    def stored_losses(self, codes: Tensor, grid: QuantGrid) -> Tensor:
        """Row losses, float64 [rows], of weights and biases as the layer's dtype stores them."""
        dtype = self.layers[0].weight.dtype
        stored = ops.dequantize(codes, grid.scale, grid.zero_point).to(dtype).float()
        losses = self.objective.row_losses(stored)
        if self.objective.centred:
            bias = self.new_bias(stored)
            losses = losses + (bias.to(dtype).double() - bias).square()
        return comparable(losses)


@dataclass
class Outcome:
    """What a solver found. grid has a row of scales a row of codes."""

    codes: Tensor
    grid: QuantGrid
    losses: dict[str, Tensor]  # float64 [rows] each
    fallback: Tensor  # rows in which rounding to nearest was kept
    starts: dict[str, Tensor]  # rows that each start won
    undecided: Tensor | None = None  # [rows, cols], at the end of the annealing
    improvable: Tensor | None = None  # rows in which a change of one code would help


class Stopwatch:
    """Seconds of the parts of a solution, in the order they came."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds = seconds
        self._device = device
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self._device.type == "cuda":  # else what is queued would count as the next part's
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
