"""Solutions of one quadratic form, of which the better of two is taken row by row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adaround_ext.grid import QuantGrid
from adaround_ext.linalg.products import fixed_bmm
from adaround_ext.linalg.sums import double_sum


@dataclass(frozen=True)
class Solution:
    """Codes on their grid, with what the search needs to go on from them.

    codes [rows, cols]; grid with a row of scales a row of codes; residual float32 [rows, cols],
    D* (G + d I); losses float64 [rows], the damped loss of each row.
    """

    codes: Tensor
    grid: QuantGrid
    residual: Tensor
    losses: Tensor

    @staticmethod
    def of(
        codes: Tensor, grid: QuantGrid, quadratic: Quadratic, residual: Tensor | None = None
    ) -> Solution:
        """These codes with their residual and losses under ``quadratic``.

        ``residual`` [rows, cols] where it is known already, which saves a matrix product.
        """
        error = grid.dequantize(codes) - quadratic.target
        if residual is None:
            residual = quadratic.residual(error)
        losses = quadratic.unit * double_sum(residual * error, 1)
        return Solution(codes, grid, residual, comparable(losses))

    def better(self, other: Solution, rows_per_scale: list[int] | None) -> Solution:
        """In each row the one with the lower loss, this one where they are equal.

        Rows that share a scale (``rows_per_scale``, see :func:`per_scale`) go together, unless both
        are on the same grid.
        """
        same_grid = other.grid is self.grid
        gains = self.losses - other.losses
        take = (gains if same_grid else per_scale(gains, rows_per_scale)) > 0

        def chosen(theirs: Tensor, ours: Tensor) -> Tensor:
            return torch.where(take[:, None], theirs, ours)

        grid = self.grid
        if not same_grid:
            scale = chosen(other.grid.scale, grid.scale)
            zero_point = chosen(other.grid.zero_point, grid.zero_point)
            grid = dataclasses.replace(grid, scale=scale, zero_point=zero_point)
        return Solution(
            chosen(other.codes, self.codes),
            grid,
            chosen(other.residual, self.residual),
            torch.where(take, other.losses, self.losses),
        )


def per_scale(values: Tensor, rows_per_scale: list[int] | None) -> Tensor:
    """values [rows, ...] summed over the rows of one scale, for each row.

    rows_per_scale: how many consecutive rows share each scale; None where each row has its own.
    """
    if rows_per_scale is None:
        return values
    of_scales = values.split(rows_per_scale)
    return torch.cat([rows.sum(0, keepdim=True).expand_as(rows) for rows in of_scales])


def comparable(losses: Tensor) -> Tensor:
    """NaN, which beyond the range of a dtype may come of infinity, is worse than any number."""
    return losses.nan_to_num(nan=torch.inf, posinf=torch.inf)


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
