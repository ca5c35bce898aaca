"""Discrete search over the whole grid, where AdaRound may only choose floor or ceil."""

from __future__ import annotations

import dataclasses

from torch import Tensor

from adaround_ext import ops
from adaround_ext.rounding.solution import Quadratic, Solution
from adaround_ext.rounding.stacked import stacks

# Descent ends by itself, when a sweep changes nothing; this bounds what rounding errors of
# the float32 residual could do.
MAX_SWEEPS = 100


def descend(solution: Solution, quadratic: Quadratic, sweeps: int = MAX_SWEEPS) -> Solution:
    """Coordinate descent until no single change of a code lowers the loss: ops.refine_."""
    codes, residual, grid = solution.codes.clone(), solution.residual.clone(), solution.grid
    ops.refine_(codes, residual, quadratic.gram, grid.scale, grid.qmin, grid.qmax, sweeps)
    return Solution.of(codes, grid, quadratic, residual)


def search(solution: Solution, quadratic: Quadratic, steps: int, seed: int) -> Solution:
    """Tabu search from a minimum, ops.tabu_search_, and the descent to the minimum it found."""
    codes, residual, grid = solution.codes.clone(), solution.residual.clone(), solution.grid
    ops.tabu_search_(codes, residual, quadratic.gram, grid.scale, grid.qmin, grid.qmax, steps, seed)
    # The residual afresh: thousands of changes in float32 have left their roundings in it.
    best = Solution.of(codes, grid, quadratic)
    return solution.better(descend(best, quadratic), None)


def search_all(
    solutions: list[Solution], quadratic: Quadratic, steps: int, seed: int
) -> list[Solution]:
    """:func:`search` from each of them, on its grid."""
    if steps == 0:
        return solutions
    searched = []
    for batch, stack in stacks(solutions, quadratic):
        of_batch = search(stack.solution(batch), stack.quadratic, steps, seed)
        for before, after in zip(batch, stack.apart(of_batch), strict=True):
            searched.append(dataclasses.replace(after, grid=before.grid))
    return searched


def rows_not_minimal(solution: Solution, quadratic: Quadratic) -> Tensor:
    """Flags rows in which a change of one code would still lower the loss: none is a minimum."""
    fresh = Solution.of(solution.codes, solution.grid, quadratic)
    codes, grid = fresh.codes.clone(), fresh.grid
    ops.refine_(codes, fresh.residual, quadratic.gram, grid.scale, grid.qmin, grid.qmax, 1)
    return (codes != solution.codes).any(1)
