"""Scales of least output error: candidates solved and compared, then a closed-form refit."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from adaround_ext.config import AdaRoundConfig
from adaround_ext.grid import QuantGrid, next_scale, stored_scale
from adaround_ext.linalg.cuda_graph import repeat_captured
from adaround_ext.linalg.products import fixed_bmm
from adaround_ext.linalg.sums import double_sum
from adaround_ext.linalg.tiles import TileSize
from adaround_ext.process.one_thread import on_one_thread
from adaround_ext.rounding.gptq import GptqFactor, OrderedCholesky
from adaround_ext.rounding.search import MAX_SWEEPS, descend
from adaround_ext.rounding.solution import Quadratic, Solution, per_scale
from adaround_ext.rounding.stacked import stacks

# Candidates are shares of the scale of least squared weight error, from about 1 - 2/3 of this
# spread to 1 + 1/3 of it. Where the rounding makes up for the error of other weights a finer grid
# pays, though it clips more: of 21 shares from 0.6 to 1.4 the best lay there for most rows.
_SPREAD = 0.42
_MAX_HALVINGS = 3
# Of the descents by which candidates are judged. A processor has them for nothing; on a GPU, where
# rows of the Gram matrix come from memory, the later sweeps change as much again as the first two,
# and the best candidate ends its descent anyway.
_SWEEPS = TileSize(cpu=MAX_SWEEPS, cuda=2)


def search_scales(
    quadratic: Quadratic,
    grid: QuantGrid,
    factor: GptqFactor,
    rows_per_scale: list[int] | None,
    candidates: int,
    config: AdaRoundConfig,
) -> Solution:
    """The best of ``candidates`` scales around ``grid`` for each row, then of zero points nearby.

    A candidate is judged by what it is for: it is rounded by GPTQ, refined and its scale refitted,
    all in milliseconds, and the loss that remains decides. A few are spread out; each further two
    are below and above the best so far, half as far away as the ones before. ``rows_per_scale`` as
    in :func:`adaround_ext.rounding.solution.per_scale`.
    """
    sweeps = _SWEEPS.on(grid.scale.device)
    halvings = min(max((candidates - 3) // 2, 0), _MAX_HALVINGS)
    spread_out = candidates - 2 * halvings

    def best_of(grids: list[QuantGrid], best: Solution | None = None) -> Solution:
        for batch, stack in stacks(grids, quadratic, rows_per_scale):
            problem, grid = stack.quadratic, stack.grid(batch)
            solution = Solution.of(factor.codes(problem.target, grid), grid, problem)
            if config.refine:
                solution = descend(solution, problem, sweeps)
            solution = refit_scales(solution, problem, stack.rows_per_scale, config, sweeps)
            for candidate in stack.apart(solution):
                best = candidate if best is None else best.better(candidate, rows_per_scale)
        assert best is not None
        return best

    best = best_of([_scaled(grid, share, config) for share in _shares(spread_out)])
    away = _step(spread_out)
    for _ in range(halvings):
        away /= 2
        best = best_of([_scaled(best.grid, 1 + change, config) for change in (-away, away)], best)
    if not config.symmetric:
        best = best_of([_moved(best.grid, offset) for offset in (-1, 1)], best)
    return best


def search_group_scales(
    solution: Solution, quadratic: Quadratic, candidates: int, config: AdaRoundConfig
) -> Solution:
    """Scale and codes of one group of columns after the other, given those of all others.

    Groups of a row couple through G: with the others' errors fixed, a group's loss is a quadratic
    in its own weights, with the group's own square of G and the minimum at
    t_g = w_q,g - r_g G_gg^-1 for the residual r. So each is :func:`search_scales` again, on the
    group alone.
    """
    groups = _GroupSearch(solution, quadratic, candidates, config)
    repeat_captured(groups.step, solution.grid.scale.shape[1], quadratic.gram.device, chunk=1)
    searched = groups.solution()
    if config.refine:
        searched = descend(searched, quadratic)
    return solution.better(refit_scales(searched, quadratic, None, config), None)


class _GroupSearch:
    """State of :func:`search_group_scales`: a step is a group, from the first to the last.

    A step may be captured in a CUDA graph: it always works on the same memory, and its number is
    on the device.
    """

    def __init__(
        self, solution: Solution, quadratic: Quadratic, candidates: int, config: AdaRoundConfig
    ) -> None:
        self._quadratic, self._candidates, self._config = quadratic, candidates, config
        self._grid = grid = solution.grid
        gram = quadratic.gram
        rows, self._n_groups = len(solution.codes), grid.scale.shape[1]
        grams, cols, size = len(gram), gram.shape[1], gram.shape[1] // self._n_groups
        self._codes, self._residual = solution.codes.clone(), solution.residual.clone()
        self._scale, self._zero_point = grid.scale.clone(), grid.zero_point.clone()
        # What belongs to a group is picked by its number on the device, the second dimension of
        # each.
        self._number = torch.zeros(1, dtype=torch.int64, device=gram.device)
        self._group_codes, self._group_residual = (
            values.view(rows, self._n_groups, size) for values in (self._codes, self._residual)
        )
        self._gram_rows = gram.view(grams, self._n_groups, size, cols)
        squares = self._gram_rows.view(grams, self._n_groups, size, self._n_groups, size)
        self._grams = squares.diagonal(dim1=1, dim2=3).permute(0, 3, 1, 2).contiguous()
        cholesky = OrderedCholesky.of(self._grams.flatten(0, 1).double())
        identity = torch.eye(size, dtype=torch.float64, device=gram.device)
        self._inverses = cholesky.solve(identity.expand(grams * self._n_groups, size, size))
        self._factors = cholesky.gptq_factor()

    def step(self) -> None:
        """The next group's scale and codes, and the residual of all columns after them."""
        grid = QuantGrid(
            self._scale.index_select(1, self._number),
            self._zero_point.index_select(1, self._number),
            self._grid.qmin,
            self._grid.qmax,
        )
        codes = self._of_group(self._group_codes)
        weight_q = grid.dequantize(codes)
        best = self._searched(codes, grid, weight_q)
        change = best.grid.dequantize(best.codes) - weight_q
        product = fixed_bmm(self._quadratic.grouped(change), self._of_group(self._gram_rows))
        self._residual.add_(product.reshape(self._residual.shape))
        self._group_codes.index_copy_(1, self._number, best.codes[:, None])
        self._scale.index_copy_(1, self._number, best.grid.scale)
        self._zero_point.index_copy_(1, self._number, best.grid.zero_point)
        self._number.add_(1)

    def _searched(self, codes: Tensor, grid: QuantGrid, weight_q: Tensor) -> Solution:
        """The group's solution, no worse than the one that it has."""
        residual = self._quadratic.grouped(self._of_group(self._group_residual)).double()
        moved = fixed_bmm(residual, self._of_grams(self._inverses)).reshape(weight_q.shape)
        gram, unit = self._of_group(self._grams), self._quadratic.unit
        quadratic = Quadratic(gram, (weight_q - moved).float(), unit)
        before = Solution.of(codes, grid, quadratic)
        factor = GptqFactor(
            self._of_grams(self._factors.feedback), self._of_grams(self._factors.order)
        )
        after = search_scales(quadratic, grid, factor, None, self._candidates, self._config)
        return before.better(after, None)

    def _of_group(self, values: Tensor) -> Tensor:
        return values.index_select(1, self._number)[:, 0]

    def _of_grams(self, values: Tensor) -> Tensor:
        """The same of values [grams n_groups, ...]."""
        return self._of_group(values.view(-1, self._n_groups, *values.shape[1:]))

    def solution(self) -> Solution:
        """All groups' codes on their scales."""
        grid = replace(self._grid, scale=self._scale, zero_point=self._zero_point)
        return Solution.of(self._codes, grid, self._quadratic)


def refit_scales(
    solution: Solution,
    quadratic: Quadratic,
    rows_per_scale: list[int] | None,
    config: AdaRoundConfig,
    sweeps: int = MAX_SWEEPS,
) -> Solution:
    """The scales of least loss for these codes, then, where ``config.refine``, better codes.

    Multiplying the n_groups scales of a row by f changes its loss to a quadratic in f with matrix
    A[g, h] = w_q,g G w_q,h^T and right-hand side b[g] = w_q,g G t^T, for the part w_q,g of group g
    and the target t: f = A^-1 b. Rows that came out worse, by rounding scales to ``scale_dtype``,
    stay as they were.
    """
    grid = solution.grid
    weight_q = grid.dequantize(solution.codes)
    n_groups = grid.scale.shape[1]
    product = solution.residual + quadratic.target_product  # w_q G
    right = _group_sums(weight_q * quadratic.target_product, n_groups)
    if n_groups == 1:
        matrix = _group_sums(weight_q * product, 1)[:, :, None]
    else:
        matrix = _between_groups(weight_q, quadratic, n_groups)
    matrix = per_scale(quadratic.unit[:, None, None] * matrix, rows_per_scale)
    right = per_scale(quadratic.unit[:, None] * right, rows_per_scale)
    # A group whose codes are all zero has no say, and its scale no effect.
    empty = ~(matrix.diagonal(dim1=1, dim2=2) > 0)
    matrix.diagonal(dim1=1, dim2=2).masked_fill_(empty, 1.0)
    if n_groups == 1:
        factors = right / matrix[:, :, 0]
    else:
        solve = partial(torch.linalg.solve_ex, matrix, right)
        factors = on_one_thread(solve, matrix.device).result
    usable = (factors > 0) & factors.isfinite() & ~empty
    scale = stored_scale(grid.scale.double() * factors, config.scale_dtype)
    scale = torch.where(usable, scale, grid.scale)
    refitted = replace(grid, scale=scale)
    residual = None
    if n_groups == 1:
        residual = (scale / grid.scale) * product - quadratic.target_product
    new = Solution.of(solution.codes, refitted, quadratic, residual)
    if config.refine:
        new = descend(new, quadratic, sweeps)
    return solution.better(new, rows_per_scale)


def _group_sums(values: Tensor, n_groups: int) -> Tensor:
    """Sums over the columns of each group, float64 [rows, n_groups]."""
    return double_sum(values.view(len(values), n_groups, -1), 2)


def _between_groups(weight_q: Tensor, quadratic: Quadratic, n_groups: int) -> Tensor:
    """w_q,g G w_q,h^T, float64 [rows, n_groups, n_groups], symmetric: together half a product."""
    rows, cols = weight_q.shape
    gram, size = quadratic.gram, cols // n_groups
    matrix = weight_q.new_empty(rows, n_groups, n_groups, dtype=torch.float64)
    for group in range(n_groups):
        begin = group * size
        of_group = weight_q[:, begin : begin + size].reshape(len(gram), -1, size)
        product = fixed_bmm(of_group, gram[:, begin : begin + size, begin:]).reshape(rows, -1)
        sums = _group_sums(product * weight_q[:, begin:], n_groups - group)
        matrix[:, group, group:] = sums
        matrix[:, group:, group] = sums
    return matrix


def _shares(candidates: int) -> list[float]:
    """One of them is the scale itself: 0.88 and 1 for two, 0.81 to 1 for three."""
    below = -(-2 * (candidates - 1) // 3)
    return [1 + _step(candidates) * k for k in range(-below, candidates - below)]


def _step(candidates: int) -> float:
    """Between neighbouring shares."""
    return _SPREAD / (candidates + 1.5)


def _scaled(grid: QuantGrid, share: float, config: AdaRoundConfig) -> QuantGrid:
    """The grid shrunk or stretched about its middle, as far as whole zero points allow."""
    scale = stored_scale(grid.scale * share, config.scale_dtype)
    if share != 1 and config.scale_dtype != torch.float32:  # no candidate twice
        neighbour = next_scale(grid.scale, config.scale_dtype, share > 1)
        scale = torch.where(scale == grid.scale, neighbour, scale)
    if config.symmetric:
        return replace(grid, scale=scale)
    middle = (grid.qmin + grid.qmax) / 2
    zero_point = middle - grid.scale * (middle - grid.zero_point) / scale
    zero_point = zero_point.round().clamp(grid.qmin, grid.qmax).to(torch.int32)
    return replace(grid, scale=scale, zero_point=zero_point)


def _moved(grid: QuantGrid, offset: int) -> QuantGrid:
    return replace(grid, zero_point=(grid.zero_point + offset).clamp(grid.qmin, grid.qmax))
