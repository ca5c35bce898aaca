"""The paper's loop: its error on some rows of a layer, its time for the whole.

Rows of a layer do not depend on each other, so the codes of these rows are those that the loop over
the whole layer would give, and all methods are compared on them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from adaround_ext import reference
from adaround_ext.grid import QuantGrid
from adaround_ext.ops import dequantize
from benchmarks import common
from benchmarks.quality.layers import Subject
from benchmarks.quality.methods import mse_grid

LAYERS = ("3.query", "3.attn.output", "3.intermediate", "3.output")
_LEARNING_RATES = (1e-3, 1e-2)
_TIMED_STEPS = 30


@dataclass(frozen=True)
class Run:
    """Errors on the rows; None where not all of the loop's steps were run."""

    learning_rate: float
    held_out: float | None
    calibration: float | None


def runs(subject: Subject, bits: int, rows: int, steps: int) -> list[Run]:
    """At both learning rates, on the grid of the other methods; the lowest held-out error first."""
    whole = mse_grid(subject, bits, "channel")
    grid = QuantGrid(whole.scale[:rows], whole.zero_point[:rows], whole.qmin, whole.qmax)
    outcomes = []
    for learning_rate in _LEARNING_RATES:
        codes = _optimized(subject, subject.matrix[:rows], grid, learning_rate, steps)
        weight = subject.matrix.clone()
        weight[:rows] = dequantize(codes, grid.scale, grid.zero_point)
        errors = subject.relative_errors(weight, None, slice(rows))
        ran = steps >= common.REFERENCE_STEPS
        outcomes.append(Run(learning_rate, *(errors if ran else (None, None))))
    return sorted(outcomes, key=lambda run: run.held_out or 0.0)


def seconds(subject: Subject, bits: int) -> float:
    """Of 10,000 steps on the whole layer, extrapolated from some."""
    grid, device = mse_grid(subject, bits, "channel"), subject.inputs.device
    _optimized(subject, subject.matrix, grid, _LEARNING_RATES[0], 3)  # warms up
    common.synchronize(device)
    begin = time.perf_counter()
    _optimized(subject, subject.matrix, grid, _LEARNING_RATES[0], _TIMED_STEPS)
    common.synchronize(device)
    return (time.perf_counter() - begin) * common.REFERENCE_STEPS / _TIMED_STEPS


def _optimized(
    subject: Subject, matrix: Tensor, grid: QuantGrid, learning_rate: float, steps: int
) -> Tensor:
    with torch.no_grad():
        targets = F.linear(subject.inputs, matrix)
    config = reference.ReferenceConfig(steps=steps, learning_rate=learning_rate)
    return reference.optimize(
        matrix, grid.scale, grid.zero_point, grid.qmin, grid.qmax, subject.inputs, targets,
        F.linear, config,
    )  # fmt: skip
