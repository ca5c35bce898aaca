"""What is solved together, and what a solver returns."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext import ops
from adaround_ext.grid import QuantGrid
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.sampled_objective import SampledObjective
from adaround_ext.rounding.solution import comparable


@dataclass(frozen=True)
class Problem:
    """Layers whose rows, stacked to weight [rows, cols], are solved under one objective.

    sizes: rows of each layer. bias: float64 [rows], 0 where there is none. rows_chosen: whether
    the model's data decided which rows the layers got, so that targets are those of some only.
    first_row: of ``weight`` in the problem that this one is some rows of.
    """

    layers: list[MatrixLayer]
    sizes: list[int]
    weight: Tensor
    bias: Tensor
    objective: GramObjective | SampledObjective
    kind: str
    reason: str
    samples: int
    collecting_seconds: float
    notes: tuple[str, ...] = ()
    rows_chosen: bool = False
    first_row: int = 0

    @property
    def name(self) -> str:
        return ", ".join(str(layer.layer) for layer in self.layers)

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and biases as the layers store them."""
        return self.layers[0].weight.dtype

    @property
    def grams(self) -> int:
        """Of the Gram objective: how many matrices; 0 for the sampled one."""
        return len(self.objective.gram) if isinstance(self.objective, GramObjective) else 0

    def rows(self, part: slice | Tensor) -> Problem:
        """The same for some rows, which own their scales and share one Gram matrix."""
        assert isinstance(self.objective, GramObjective)
        weight = self.weight[part]
        return dataclasses.replace(
            self,
            sizes=[len(weight)],
            weight=weight,
            bias=self.bias[part],
            objective=self.objective.rows(part),
            first_row=self.first_row + (part.start if isinstance(part, slice) else 0),
        )

    @staticmethod
    def join(problems: Sequence[Problem]) -> Problem:
        """One problem of the rows of all, which have weights and Gram matrices of one shape."""
        first = problems[0]
        if len(problems) == 1:
            return first
        objectives = [own.objective for own in problems]
        return dataclasses.replace(
            first,
            layers=[layer for own in problems for layer in own.layers],
            sizes=[rows for own in problems for rows in own.sizes],
            weight=torch.cat([own.weight for own in problems]),
            bias=torch.cat([own.bias for own in problems]),
            objective=GramObjective.join([o for o in objectives if isinstance(o, GramObjective)]),
            collecting_seconds=sum(own.collecting_seconds for own in problems),
        )

    def new_bias(self, weight_q: Tensor) -> Tensor:
        """The biases that take up the mean error of weight_q, float64 [rows]."""
        assert isinstance(self.objective, GramObjective)
        return self.objective.bias_change(weight_q) + self.bias

    def stored_losses(self, codes: Tensor, grid: QuantGrid) -> Tensor:
        """Row losses, float64 [rows], of weights and biases as the layer's dtype stores them."""
        stored = ops.dequantize(codes, grid.scale, grid.zero_point).to(self.dtype).float()
        losses = self.objective.row_losses(stored)
        if self.objective.centred:
            bias = self.new_bias(stored)
            losses = losses + (bias.to(self.dtype).double() - bias).square()
        return comparable(losses)
