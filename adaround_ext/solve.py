"""One problem: rows that share an objective, from the grid to the results."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext import ops, reference
from adaround_ext.anneal import anneal
from adaround_ext.choice import settings
from adaround_ext.config import AdaRoundConfig
from adaround_ext.grid import QuantGrid, baseline_codes, make_grid, nearest_codes, position
from adaround_ext.layers import MatrixLayer
from adaround_ext.objective import GramObjective, SampledObjective
from adaround_ext.refine import refine
from adaround_ext.report import LayerReport
from adaround_ext.result import LayerResult

_UNDECIDED = (0.05, 0.95)


@dataclass(frozen=True)
class Problem:
    """Layers whose rows, stacked to weight [rows, cols], are solved under one objective."""

    layers: list[MatrixLayer]
    weight: Tensor
    objective: GramObjective | SampledObjective
    kind: str
    reason: str
    samples: int
    collecting_seconds: float

    @property
    def name(self) -> str:
        return ", ".join(str(layer.layer) for layer in self.layers)


class _Stopwatch:
    def __init__(self, seconds: dict[str, float]) -> None:
        self.seconds = seconds
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


def solve(problem: Problem, config: AdaRoundConfig) -> list[LayerResult]:
    """Grid, annealing, hard decision, refinement, report: a result a layer."""
    weight, objective = problem.weight, problem.objective
    watch = _Stopwatch({"statistics": problem.collecting_seconds})
    sizes = [layer.rows for layer in problem.layers]
    grids = [make_grid(part, config) for part in weight.split(sizes)]
    grid = QuantGrid.join(grids, sizes)
    watch.lap("grid")
    chosen = settings(config, problem.kind)
    v = anneal(weight, grid, objective, chosen, config, problem.name)
    watch.lap("annealing")
    codes, losses = _decide(problem, grid, v, config)
    watch.lap("refinement")
    soft, _ = ops.soft_quantize(weight, v, grid.scale, grid.zero_point, grid.qmin, grid.qmax, 2.0)
    losses["soft"] = objective.row_losses(soft)
    for name, rule in baseline_codes(weight, grid, config.seed).items():
        losses[name] = _stored_losses(problem, grid, rule)
    h = reference.rectified_sigmoid(v)
    at = position(weight, grid)
    marks = {
        "flipped": codes != nearest_codes(weight, grid),
        "clipped": (at < grid.qmin) | (at > grid.qmax),
        "undecided": (h > _UNDECIDED[0]) & (h < _UNDECIDED[1]),
    }
    watch.lap("evaluation")
    watch.seconds["total"] = sum(watch.seconds.values())

    results = []
    begin = 0
    for layer, own in zip(problem.layers, grids, strict=True):
        rows = slice(begin, begin + layer.rows)
        begin = rows.stop
        own_codes = codes[rows].contiguous()
        weight_q = ops.dequantize(own_codes, own.scale, own.zero_point)
        report = LayerReport(
            objective=problem.kind,
            reason=problem.reason,
            bits=config.bits,
            steps=chosen.steps,
            learning_rate=chosen.learning_rate,
            reg_weight=chosen.reg_weight,
            samples=problem.samples,
            losses={name: float(values[rows].sum()) for name, values in losses.items()},
            energy=float(objective.row_energies[rows].sum()),
            fallback_rows=int((losses["hard"] > losses["nearest"])[rows].sum()),
            seconds=watch.seconds,
            **{name: float(mark[rows].double().mean()) for name, mark in marks.items()},
        )
        dtype = layer.weight.dtype
        weight_q = layer.weight_from_matrix(weight_q).to(dtype).contiguous()
        results.append(
            LayerResult(weight_q, own_codes, own.scale, own.zero_point, bias=None, report=report)
        )
    return results


def _decide(
    problem: Problem, grid: QuantGrid, v: Tensor, config: AdaRoundConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The codes, and the row losses of nearest, hard and final: in no row worse than nearest."""
    weight, objective = problem.weight, problem.objective
    nearest = nearest_codes(weight, grid)
    hard = ops.hard_quantize(weight, v, grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    losses = {
        "nearest": _stored_losses(problem, grid, nearest),
        "hard": _stored_losses(problem, grid, hard),
    }
    codes, final = nearest, losses["nearest"]
    codes, final = _better_rows(hard, losses["hard"], codes, final)
    if config.refine and isinstance(objective, GramObjective):
        refined = refine(codes, weight, grid, objective)
        codes, final = _better_rows(refined, _stored_losses(problem, grid, refined), codes, final)
    return codes, losses | {"final": final}


def _better_rows(
    codes: Tensor, losses: Tensor, old_codes: Tensor, old_losses: Tensor
) -> tuple[Tensor, Tensor]:
    better = losses < old_losses
    return torch.where(better[:, None], codes, old_codes), torch.where(better, losses, old_losses)


def _stored_losses(problem: Problem, grid: QuantGrid, codes: Tensor) -> Tensor:
    """Row losses of the weights as they will be stored, in the layer's dtype."""
    dtype = problem.layers[0].weight.dtype
    stored = ops.dequantize(codes, grid.scale, grid.zero_point).to(dtype).float()
    return problem.objective.row_losses(stored)
