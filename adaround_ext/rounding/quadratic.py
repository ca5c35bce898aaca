"""The quadratic that discrete solvers minimise."""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from adaround_ext.linalg.products import fixed_bmm


class Quadratic:
    """unit (w_q - target) gram (w_q - target)^T of each row.

    gram float32 [groups, cols, cols], symmetric; target float32 [rows, cols]; rows / groups
    consecutive rows share a matrix. unit float64 [rows], 1 if not given, makes the losses of rows
    comparable where groups have matrices in different units.
    """

    def __init__(self, gram: Tensor, target: Tensor, unit: Tensor | None = None) -> None:
        self.gram = gram
        self.target = target
        self.unit = target.new_ones(len(target), dtype=torch.float64) if unit is None else unit

    def residual(self, error: Tensor) -> Tensor:
        """error gram, float32 [rows, cols]: half the gradient."""
        product = fixed_bmm(self.grouped(error), self.gram)
        return product.reshape(error.shape).contiguous()

    @cached_property
    def target_product(self) -> Tensor:
        """target gram, float32 [rows, cols]."""
        return self.residual(self.target)

    def grouped(self, rows: Tensor) -> Tensor:
        """[rows, n] as [groups, rows / groups, n]."""
        return rows.reshape(len(self.gram), -1, rows.shape[1])
