"""Discrete search after the annealing."""

from __future__ import annotations

from torch import Tensor

from adaround_ext import ops
from adaround_ext.grid import QuantGrid
from adaround_ext.objective import GramObjective

# Descent ends by itself, when a sweep changes nothing; this bounds what rounding errors of
# the float32 residual could do.
_MAX_SWEEPS = 100


def refine(codes: Tensor, weight: Tensor, grid: QuantGrid, objective: GramObjective) -> Tensor:
    """Coordinate descent over the whole grid: codes after which no single change lowers the loss.

    AdaRound may only choose between floor and ceil; this may take any code. codes [rows, cols] are
    not changed. The source of the descent is :func:`adaround_ext.ops.refine_`.
    """
    refined = codes.clone()
    error = ops.dequantize(codes, grid.scale, grid.zero_point) - weight
    residual = objective.residual(error)
    ops.refine_(refined, residual, objective.gram, grid.scale, grid.qmin, grid.qmax, _MAX_SWEEPS)
    return refined
