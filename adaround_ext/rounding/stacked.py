"""Stacked problems: solutions of one problem at once.

Alone, a small one leaves most of the processor idle.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from adaround_ext.grid import QuantGrid
from adaround_ext.linalg.tiles import TileSize
from adaround_ext.rounding.solution import Quadratic, Solution

T = TypeVar("T")
# So many weights at once: on a processor what its caches hold, since with more than that one
# solution after the other was faster; on a GPU what gives all of it something to do.
WEIGHTS_AT_ONCE = TileSize(cpu=1 << 18, cuda=1 << 25)


def at_once(weights: int, device: torch.device) -> int:
    """How many tasks on so many weights each are done at once, one at least."""
    return max(1, WEIGHTS_AT_ONCE.on(device) // max(weights, 1))


class StackedProblem:
    """``count`` solutions of a problem as one solution of a problem with count times the rows.

    Rows are independent, so that each has the bits that it would have alone (on CUDA, and of
    convolutions with groups, as far as a library's products do not depend on the number of rows).
    Rows of one group stay together.
    rows_per_scale: see :func:`adaround_ext.rounding.solution.per_scale`; None with groups.
    """

    def __init__(self, quadratic: Quadratic, rows_per_scale: list[int] | None, count: int) -> None:
        self._one, self._count = quadratic, count
        self.quadratic = quadratic
        self.rows_per_scale = None if rows_per_scale is None else rows_per_scale * count
        if count > 1:
            self.quadratic = Quadratic(
                quadratic.gram,
                self._join([quadratic.target] * count),
                self._join([quadratic.unit[:, None]] * count)[:, 0],
            )
            self.quadratic.target_product = self._join([quadratic.target_product] * count)

    def grid(self, grids: Sequence[QuantGrid]) -> QuantGrid:
        """One grid for all solutions, from each one's, with a row of scales a row."""
        first = grids[0]
        if self._count == 1:
            return first
        scale, zero_point = (
            self._join([getattr(grid, name) for grid in grids]) for name in ("scale", "zero_point")
        )
        return QuantGrid(scale, zero_point, first.qmin, first.qmax)

    def solution(self, solutions: Sequence[Solution]) -> Solution:
        """One solution from all."""
        if self._count == 1:
            return solutions[0]
        return Solution(
            self._join([solution.codes for solution in solutions]),
            self.grid([one.grid for one in solutions]),
            self._join([one.residual for one in solutions]),
            self._join([one.losses[:, None] for one in solutions])[:, 0],
        )

    def apart(self, solution: Solution) -> list[Solution]:
        """The solutions that one solution of all is made of."""
        if self._count == 1:
            return [solution]
        grid = solution.grid
        return [
            Solution(codes, QuantGrid(scale, zero_point, grid.qmin, grid.qmax), residual, losses)
            for codes, scale, zero_point, residual, losses in zip(
                self._split(solution.codes),
                self._split(grid.scale),
                self._split(grid.zero_point),
                self._split(solution.residual),
                [losses[:, 0] for losses in self._split(solution.losses[:, None])],
                strict=True,
            )
        ]

    def _join(self, values: Sequence[Tensor]) -> Tensor:
        """Of each solution [rows, n], group by group."""
        return torch.stack([self._one.grouped(tensor) for tensor in values], 1).flatten(0, 2)

    def _split(self, values: Tensor) -> list[Tensor]:
        """What :meth:`_join` joined."""
        groups = len(self._one.gram)
        of_solutions = values.view(groups, self._count, -1, values.shape[1]).unbind(1)
        return [rows.flatten(0, 1) for rows in of_solutions]


def stacks(
    items: Sequence[T], quadratic: Quadratic, rows_per_scale: list[int] | None = None
) -> Iterator[tuple[Sequence[T], StackedProblem]]:
    """Of what solutions are made from, as many at a time as are to be found at once."""
    most = at_once(quadratic.target.numel(), quadratic.target.device)
    if rows_per_scale is not None and len(quadratic.gram) > 1:
        most = 1
    for begin in range(0, len(items), most):
        batch = items[begin : begin + most]
        yield batch, StackedProblem(quadratic, rows_per_scale, len(batch))
