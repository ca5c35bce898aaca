"""From problems to the results: grid, solver, report."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from adaround_ext import ops
from adaround_ext.config import AdaRoundConfig
from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.grid import (
    QuantGrid,
    baseline_codes,
    make_grid,
    nearest_codes,
    position,
    scale_notes,
)
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.linalg.precision import tf32_products
from adaround_ext.presets import Settings, settings
from adaround_ext.report.layer import LayerReport
from adaround_ext.result import LayerResult
from adaround_ext.rounding.anneal import anneal
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.gram_solver import GramSolver
from adaround_ext.rounding.outcome import Outcome, Solved, Stopwatch
from adaround_ext.rounding.problem import Problem
from adaround_ext.rounding.row_guard import no_worse_on_inputs

# Products are made in blocks of this many rows, see products.py, and what is elementwise in chunks
# of this many weights, whose vectors have up to this many: a cut between two changes no bits.
_ROWS, _CHUNK, _VECTOR = 16, 1024, 16
# At once, of rows that can be solved apart: a solver keeps about twenty matrices of this size.
_WEIGHTS = 1 << 27


def solve(
    problems: Sequence[Problem], config: AdaRoundConfig, ranks: Ranks = ALONE
) -> list[LayerResult]:
    """Grid, search, report: a result a layer of all the problems, in their order.

    Several problems are solved as one, see :meth:`Problem.join`. ranks: those that all have this
    one problem, and share its rows.
    """
    joined = Problem.join(problems)
    if ranks.size > 1:
        return _results(problems, _share_rows(joined, config, ranks), config)
    return _results(problems, _in_parts(joined, config), config)


def shareable(layer: MatrixLayer, config: AdaRoundConfig, kind: str) -> bool:
    """Whether rows can be solved apart: each owns its scales, and all have one Gram matrix."""
    own = config.granularity != "per_tensor" and not isinstance(config.scale, Tensor)
    return kind == "gram" and own and layer.groups == 1


def _share_rows(problem: Problem, config: AdaRoundConfig, ranks: Ranks) -> Solved:
    """Each rank solves some of the rows."""
    rows = len(problem.weight)
    size = _block_rows(problem, config)
    blocks = [min(size, rows - begin) for begin in range(0, rows, size)]
    own = ranks.share(blocks)[ranks.rank]

    def solve_own() -> Solved | None:
        part = slice(own.start * size, min(own.stop * size, rows))
        return _in_parts(problem.rows(part), config) if own else None

    parts = ranks.exchange(f"the rounding of {problem.name}", solve_own)
    return Solved.join([part for part in parts if part is not None], problem.weight.device)


def _block_rows(problem: Problem, config: AdaRoundConfig) -> int:
    """How many rows at a time have the same bits alone and among others (on a GPU none need to)."""
    cols = problem.weight.shape[1]
    whole_vectors = problem.weight.is_cuda or (config.group_size or cols) % _VECTOR == 0
    return _ROWS if whole_vectors else math.lcm(_ROWS, _CHUNK // math.gcd(cols, _CHUNK))


def _in_parts(problem: Problem, config: AdaRoundConfig) -> Solved:
    """Some rows after the other, where all of them would take too much memory."""
    rows, cols = problem.weight.shape
    size = _block_rows(problem, config)
    most = max(_WEIGHTS // max(cols, 1) // size, 1) * size
    apart = all(shareable(layer, config, problem.kind) for layer in problem.layers)
    if not apart or problem.grams > 1 or rows <= most:
        return _solve_rows(problem, config)
    parts = []
    for begin in range(0, rows, most):
        parts.append(_solve_rows(problem.rows(slice(begin, min(begin + most, rows))), config))
        problem = dataclasses.replace(problem, collecting_seconds=0.0)  # counted already
    return Solved.join(parts, problem.weight.device, sum)


def _solve_rows(problem: Problem, config: AdaRoundConfig) -> Solved:
    """The problem as it is posed, or for some rows without its targets."""
    solved = _solve_posed(problem, config)
    if not problem.rows_chosen:
        return solved
    size = _block_rows(problem, config)
    return no_worse_on_inputs(problem, solved, config, lambda p: _solve_posed(p, config), size)


def _solve_posed(problem: Problem, config: AdaRoundConfig) -> Solved:
    """Grid, search, and what is to be said of each row."""
    chosen = settings(config, problem.kind, problem.weight.shape[1])
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
    return _described(problem, base, outcome, config, chosen, watch)


def _owners(grids: list[QuantGrid], sizes: list[int]) -> list[int] | None:
    """Which rows share their scales, as :func:`adaround_ext.rounding.solution.per_owner` has it."""
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


def _described(
    problem: Problem,
    base: QuantGrid,
    outcome: Outcome,
    config: AdaRoundConfig,
    chosen: Settings,
    watch: Stopwatch,
) -> Solved:
    """The outcome with all that is reported of it."""
    weight, grid, objective = problem.weight, outcome.grid, problem.objective
    losses = dict(outcome.losses)
    rules = (
        baseline_codes(weight, base, config.seed, problem.first_row) if chosen.diagnostics else {}
    )
    # Losses that are only shown, so fewer digits do: see GramSolver.
    with tf32_products(weight.device, problem.kind == "gram" and config.products != "float32"):
        for name, rule in rules.items():
            losses[name] = problem.stored_losses(rule, base)
    at = position(weight, grid)
    weights = {
        "flipped": outcome.codes != nearest_codes(weight, grid),
        "clipped": (at < grid.qmin) | (at > grid.qmax),
        "undecided": outcome.undecided,
    }
    rows = {"fallback": outcome.fallback, "improvable": outcome.improvable}
    bias = None
    if objective.centred:
        stored = ops.dequantize(outcome.codes, grid.scale, grid.zero_point).to(problem.dtype)
        bias = problem.new_bias(stored.float())
    watch.lap("evaluation")
    watch.seconds["total"] = sum(watch.seconds.values())
    return Solved(
        outcome.codes,
        grid.scale,
        grid.zero_point,
        bias,
        objective.row_energies,
        losses,
        {name: mark.count_nonzero(1) for name, mark in weights.items() if mark is not None},
        {name: mark for name, mark in rows.items() if mark is not None},
        outcome.starts,
        watch.seconds,
    )


def _results(
    problems: Sequence[Problem], solved: Solved, config: AdaRoundConfig
) -> list[LayerResult]:
    """Of each layer of the problems, which were solved as one."""
    first = problems[0]
    dtype, cols = first.dtype, first.weight.shape[1]
    chosen = settings(config, first.kind, cols)
    stored = ops.dequantize(solved.codes, solved.scale, solved.zero_point).to(dtype)
    results = []
    begin = 0
    for problem, layer in ((own, layer) for own in problems for layer in own.layers):
        rows = slice(begin, begin + layer.rows)
        begin = rows.stop
        kept = slice(rows.start, rows.start + 1) if _one_scale(config) else rows
        improvable = solved.marks.get("improvable")
        counts = {name: int(n[rows].sum()) for name, n in solved.counts.items()}
        weights = max(layer.rows * cols, 1)
        report = LayerReport(
            objective=problem.kind,
            reason=problem.reason,
            preset=config.preset,
            bits=config.bits,
            starts={name: _fraction(won[rows]) for name, won in solved.starts.items()},
            scale_candidates=chosen.scale_candidates,
            search_steps=chosen.search_steps,
            rounds=chosen.rounds,
            steps=chosen.steps,
            learning_rate=chosen.learning_rate,
            reg_weight=chosen.reg_weight,
            damping=problem.objective.damping,
            samples=problem.samples,
            losses={name: float(values[rows].sum()) for name, values in solved.losses.items()},
            energy=float(solved.energy[rows].sum()),
            fallback_rows=int(solved.marks["fallback"][rows].sum()),
            improvable_rows=None if improvable is None else int(improvable[rows].sum()),
            notes=problem.notes + scale_notes(solved.scale[kept], config.scale_dtype),
            seconds=dict(solved.seconds),
            **{mark: counts.get(mark, 0) / weights for mark in ("undecided", "flipped", "clipped")},
        )
        results.append(
            LayerResult(
                layer.weight_from_matrix(stored[rows]).contiguous(),
                solved.codes[rows].contiguous(),
                solved.scale[kept].clone(),
                solved.zero_point[kept].clone(),
                bias=None if solved.bias is None else solved.bias[rows].to(dtype),
                report=report,
            )
        )
    return results


def _one_scale(config: AdaRoundConfig) -> bool:
    """Whether a layer has one scale."""
    given = config.scale
    return config.granularity == "per_tensor" or (isinstance(given, Tensor) and given.numel() == 1)


def _fraction(mask: Tensor) -> float:
    return int(mask.count_nonzero()) / max(mask.numel(), 1)
