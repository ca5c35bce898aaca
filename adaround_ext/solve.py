"""From a problem to the results: grid, solver, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import torch
from torch import Tensor

from adaround_ext import ops
from adaround_ext.anneal import anneal
from adaround_ext.config import AdaRoundConfig
from adaround_ext.gram_solver import GramSolver
from adaround_ext.grid import QuantGrid, baseline_codes, make_grid, nearest_codes, position
from adaround_ext.layers import MatrixLayer
from adaround_ext.objective import GramObjective
from adaround_ext.presets import Settings, settings
from adaround_ext.problem import Outcome, Problem, Stopwatch
from adaround_ext.report import LayerReport
from adaround_ext.result import LayerResult


def solve_all(
    layers: list[MatrixLayer], problems: Iterable[Problem], config: AdaRoundConfig
) -> list[LayerResult]:
    """A result a layer, in the order of ``layers``: problems may hold them in another."""
    results: dict[int, LayerResult] = {}
    for problem in problems:
        solved = solve(problem, config)
        results.update(zip(map(id, problem.layers), solved, strict=True))
    return [results[id(layer)] for layer in layers]


def solve(problem: Problem, config: AdaRoundConfig) -> list[LayerResult]:
    """Grid, search, report: a result a layer."""
    chosen = settings(config, problem.kind)
    watch = Stopwatch({"statistics": problem.collecting_seconds}, problem.weight.device)
    objective = problem.objective
    target = objective.target if isinstance(objective, GramObjective) else problem.weight
    grid_config = config
    if config.searches_scales and not isinstance(objective, GramObjective):
        grid_config = dataclasses.replace(config, scale="mse")
    grids = [make_grid(part, grid_config) for part in target.split(problem.sizes)]
    base = QuantGrid.join(grids, problem.sizes)
    watch.lap("grid")
    if isinstance(objective, GramObjective):
        owners = _owners(grids, problem.sizes)
        outcome = GramSolver(problem, objective, base, owners, config, chosen).solve(watch)
    else:
        outcome = _solve_sampled(problem, base, config, chosen)
        watch.lap("annealing")
    return _results(problem, base, grids, outcome, config, chosen, watch)


def _owners(grids: list[QuantGrid], sizes: list[int]) -> list[int] | None:
    """Which rows share their scales, as :func:`adaround_ext.solution.per_owner` has it."""
    own = all(len(grid.scale) == rows for grid, rows in zip(grids, sizes, strict=True))
    return None if own else sizes


def _solve_sampled(
    problem: Problem, grid: QuantGrid, config: AdaRoundConfig, chosen: Settings
) -> Outcome:
    """The paper's way: anneal, decide, and keep nearest in the rows where it is better."""
    weight = problem.weight
    annealed = anneal(weight, grid, problem.objective, chosen, config, problem.name)
    nearest, hard = nearest_codes(weight, grid), annealed.codes
    losses = {
        "nearest": problem.stored_losses(nearest, grid),
        "soft": problem.objective.row_losses(annealed.weight_q),
        "hard": problem.stored_losses(hard, grid),
    }
    losses["adaround"] = losses["hard"]
    losses["final"] = torch.minimum(losses["hard"], losses["nearest"])
    better = losses["hard"] < losses["nearest"]
    return Outcome(
        torch.where(better[:, None], hard, nearest),
        grid,
        losses,
        losses["hard"] > losses["nearest"],
        {"adaround": torch.ones_like(better)},
        annealed.undecided,
    )


def _results(
    problem: Problem,
    base: QuantGrid,
    grids: list[QuantGrid],
    outcome: Outcome,
    config: AdaRoundConfig,
    chosen: Settings,
    watch: Stopwatch,
) -> list[LayerResult]:
    weight, grid, objective = problem.weight, outcome.grid, problem.objective
    losses = dict(outcome.losses)
    rules = baseline_codes(weight, base, config.seed) if chosen.diagnostics else {}
    for name, rule in rules.items():
        losses[name] = problem.stored_losses(rule, base)
    at = position(weight, grid)
    marks = {
        "flipped": outcome.codes != nearest_codes(weight, grid),
        "clipped": (at < grid.qmin) | (at > grid.qmax),
    }
    if outcome.undecided is not None:
        marks["undecided"] = outcome.undecided
    dtype = problem.layers[0].weight.dtype
    stored = ops.dequantize(outcome.codes, grid.scale, grid.zero_point).to(dtype)
    bias = problem.new_bias(stored.float()).to(dtype) if objective.centred else None
    watch.lap("evaluation")
    watch.seconds["total"] = sum(watch.seconds.values())

    results = []
    begin = 0
    for layer, own in zip(problem.layers, grids, strict=True):
        rows = slice(begin, begin + layer.rows)
        begin = rows.stop
        kept = slice(rows.start, rows.start + len(own.scale))  # one row where all share it
        report = LayerReport(
            objective=problem.kind,
            reason=problem.reason,
            preset=config.preset,
            bits=config.bits,
            starts={name: _share(won[rows]) for name, won in outcome.starts.items()},
            scale_candidates=chosen.scale_candidates,
            search_steps=chosen.search_steps,
            rounds=chosen.rounds,
            steps=chosen.steps,
            learning_rate=chosen.learning_rate,
            reg_weight=chosen.reg_weight,
            damping=objective.damping,
            samples=problem.samples,
            losses={name: float(values[rows].sum()) for name, values in losses.items()},
            energy=float(objective.row_energies[rows].sum()),
            fallback_rows=int(outcome.fallback[rows].sum()),
            improvable_rows=(
                None if outcome.improvable is None else int(outcome.improvable[rows].sum())
            ),
            notes=problem.notes,
            seconds=dict(watch.seconds),
            **({"undecided": 0.0} | {name: _share(mark[rows]) for name, mark in marks.items()}),
        )
        results.append(
            LayerResult(
                layer.weight_from_matrix(stored[rows]).contiguous(),
                outcome.codes[rows].contiguous(),
                grid.scale[kept].clone(),
                grid.zero_point[kept].clone(),
                bias=None if bias is None else bias[rows].clone(),
                report=report,
            )
        )
    return results


def _share(mask: Tensor) -> float:
    return int(mask.count_nonzero()) / max(mask.numel(), 1)
