"""A solution of one Gram problem, and how the better of two is taken row by row."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext.grid import QuantGrid
from adaround_ext.linalg.sums import double_sum
from adaround_ext.ops import rounding as ops
from adaround_ext.rounding.quadratic import Quadratic


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
        error = ops.dequantize(codes, grid.scale, grid.zero_point) - quadratic.target
        if residual is None:
            residual = quadratic.residual(error)
        losses = quadratic.unit * double_sum(residual * error, 1)
        return Solution(codes, grid, residual, comparable(losses))

    def better(self, other: Solution, owners: list[int] | None) -> Solution:
        """In each row the one with the lower loss, this one where they are equal.

        Rows that share a scale (``owners``, see :func:`per_owner`) go together, unless both are on
        the same grid.
        """
        same_grid = other.grid is self.grid
        gains = self.losses - other.losses
        take = (gains if same_grid else per_owner(gains, owners)) > 0

        def chosen(theirs: Tensor, own: Tensor) -> Tensor:
            return torch.where(take[:, None], theirs, own)

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


def per_owner(values: Tensor, owners: list[int] | None) -> Tensor:
    """values [rows, ...] summed over rows of one owner, for each row.

    owners: how many consecutive rows share each scale; None where each row owns its own.
    """
    if owners is None:
        return values
    parts = values.split(owners)
    return torch.cat([part.sum(0, keepdim=True).expand_as(part) for part in parts])


def comparable(losses: Tensor) -> Tensor:
    """NaN, which beyond the range of a dtype may come of infinity, is worse than any number."""
    return losses.nan_to_num(nan=torch.inf, posinf=torch.inf)
