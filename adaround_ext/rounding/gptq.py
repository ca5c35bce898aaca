"""GPTQ (Frantar et al. 2023): the factor that its recursion needs, and the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext import ops
from adaround_ext.grid import QuantGrid
from adaround_ext.linalg.cholesky import Cholesky


@dataclass(frozen=True)
class GptqFactor:
    """feedback float32 [groups, cols, cols] and order int64 [groups, cols] of :func:`ops.gptq`."""

    feedback: Tensor
    order: Tensor

    @staticmethod
    def make(gram: Tensor) -> GptqFactor:
        """From a damped ``gram`` [groups, cols, cols]: columns of larger diagonal come first."""
        return OrderedCholesky.of(gram.double()).gptq_factor()

    def codes(self, weight: Tensor, grid: QuantGrid) -> Tensor:
        """Codes [rows, cols] for float32 ``weight``."""
        return ops.gptq(
            weight, self.feedback, self.order, grid.scale, grid.zero_point, grid.qmin, grid.qmax
        )


@dataclass(frozen=True)
class OrderedCholesky:
    """A factor of matrices in GPTQ's order turned round: columns of smaller diagonal come first.

    One factorisation serves GPTQ, H = R R^T with R upper triangular in its order, and solving.
    """

    factor: Cholesky
    order: Tensor  # int64 [groups, cols]

    @staticmethod
    def of(h: Tensor) -> OrderedCholesky:
        """Of float64 [groups, cols, cols]; ValueError for NaN or infinity."""
        order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True).flip(1)
        rows = order[:, :, None].expand_as(h)
        return OrderedCholesky(Cholesky.of(h.gather(1, rows).gather(2, rows.mT)), order)

    def gptq_factor(self) -> GptqFactor:
        upper = self.factor.lower.flip(1, 2)
        upper /= upper.diagonal(dim1=1, dim2=2)[:, None, :].clone()
        return GptqFactor(upper.float(), self.order.flip(1))

    def solve(self, right: Tensor) -> Tensor:
        """``right`` H^-1 for float64 [groups, rows, cols]."""
        order = self.order[:, None].expand_as(right)
        solved = self.factor.solve(right.gather(2, order))
        return torch.empty_like(solved).scatter_(2, order, solved)
