"""The last word of the inputs that a layer gets, where its targets may be other tokens' outputs.

Targets of the full-precision stream make up for errors of the layers before, which is worth some
error of the layer itself. Where only some rows have a partner there, it may cost more than that.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from adaround_ext import ops
from adaround_ext.config import AdaRoundConfig
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.outcome import Solved
from adaround_ext.rounding.problem import Problem


def no_worse_on_inputs(
    problem: Problem,
    solved: Solved,
    config: AdaRoundConfig,
    solve: Callable[[Problem], Solved],
    size: int,
) -> Solved:
    """``solved``, but rows that change their outputs more than rounding to nearest does are solved
    with the layer's outputs on its inputs as targets.

    Where rows share a scale all of them are, if together they do. ``solve`` gives the rows of a
    problem; size: of the blocks in which a row has the same bits whatever else is solved.
    """
    objective = problem.objective
    assert isinstance(objective, GramObjective)
    plain = dataclasses.replace(problem, objective=objective.without_targets())
    change, nearest = _changes(plain, solved), _nearest_changes(plain, config)
    if len(solved.scale) < len(change):
        return solve(plain) if float(change.sum()) > float(nearest.sum()) else solved
    worse = change > nearest
    if not bool(worse.any()):
        return solved
    if problem.grams > 1:
        return solved.with_rows(worse, solve(plain), worse)
    blocks = torch.arange(len(worse), device=worse.device) // size
    chosen = torch.isin(blocks, blocks[worse])
    return solved.with_rows(worse, solve(plain.rows(chosen)), worse[chosen])


def _changes(plain: Problem, solved: Solved) -> Tensor:
    """E[(W_q x + b_q - W x - b)^2] of each row as it is stored, float64 [rows]."""
    objective = plain.objective
    assert isinstance(objective, GramObjective)
    stored = ops.dequantize(solved.codes, solved.scale, solved.zero_point)
    stored = stored.to(plain.dtype).float()
    losses = objective.row_losses(stored)
    if solved.bias is None:
        return losses
    bias = solved.bias.to(plain.dtype).double()
    return losses + (bias - plain.new_bias(stored)).square()


def _nearest_changes(plain: Problem, config: AdaRoundConfig) -> Tensor:
    """The same of rounding to nearest on the grid that the weights alone give."""
    if config.searches_scales:
        config = dataclasses.replace(config, scale="mse")
    grids = [make_grid(part, config) for part in plain.weight.split(plain.sizes)]
    grid = QuantGrid.join(grids, plain.sizes)
    return plain.stored_losses(nearest_codes(plain.weight, grid), grid)
