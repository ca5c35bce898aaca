"""Gram problems: layers that are solved under one Gram objective, whole or some rows at a time."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from adaround_ext.config import AdaRoundConfig
from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.linalg.products import TILE, annealing_dtype
from adaround_ext.presets import settings
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.gram_solver import GramSolver, rough_products
from adaround_ext.rounding.problem import Outcome, Problem, Stopwatch
from adaround_ext.statistics.moments import GramStatistics

# What is elementwise is done in chunks of this many weights, whose vectors have up to this many: a
# cut between two changes no bits.
_CHUNK, _VECTOR = 1024, 16
# At once, of rows that can be solved apart: a solver keeps about twenty matrices of this size.
MAX_WEIGHTS = 1 << 27
# Damping of the Gram matrix against overfitting: docs/tuning.md.
_DAMPING, _MAX_DAMPING = 5.0, 0.3


@dataclass(frozen=True, kw_only=True)
class GramProblem(Problem):
    """Layers under one Gram objective.

    sizes: rows of each layer. rows_chosen: whether the model's data decided which rows the layers
    got, so that targets are those of some only. first_row: of ``weight`` in the problem that this
    one is some rows of.
    """

    objective: GramObjective
    sizes: list[int]
    rows_chosen: bool = False
    first_row: int = 0
    kind = "gram"

    def rows(self, rows: slice | Tensor) -> GramProblem:
        """The same for some rows, which own their scales and share one Gram matrix."""
        objective = self.objective.rows(rows)
        first_row = self.first_row + (rows.start if isinstance(rows, slice) else 0)
        sizes = [len(objective.weight)]
        return dataclasses.replace(self, sizes=sizes, objective=objective, first_row=first_row)

    def join(self, others: Sequence[Problem]) -> GramProblem:
        """One problem of the rows of all, which have weights and Gram matrices of one shape."""
        if not others:
            return self
        problems = [self, *cast(Sequence[GramProblem], others)]
        return dataclasses.replace(
            self,
            layers=[layer for problem in problems for layer in problem.layers],
            sizes=[rows for problem in problems for rows in problem.sizes],
            objective=GramObjective.join([problem.objective for problem in problems]),
            collecting_seconds=sum(problem.collecting_seconds for problem in problems),
        )

    def solve(self, config: AdaRoundConfig, ranks: Ranks = ALONE) -> Outcome:
        """Grid, search, and what is reported of each row.

        ranks: those that all have this one problem, each of which solves some of the rows. Where
        all rows would take too much memory, some are solved after the others.
        """
        if ranks.size > 1:
            return self._solve_with(ranks, config)
        rows, cols = self.weight.shape
        tile = self._rows_per_tile(config)
        most = max(MAX_WEIGHTS // max(cols, 1) // tile, 1) * tile
        apart = all(shareable(layer, config, self.kind) for layer in self.layers)
        if not apart or len(self.objective.gram) > 1 or rows <= most:
            return self._solve_rows(config)
        outcomes = []
        problem = self
        for begin in range(0, rows, most):
            outcomes.append(problem.rows(slice(begin, min(begin + most, rows)))._solve_rows(config))
            problem = dataclasses.replace(problem, collecting_seconds=0.0)  # counted already
        return Outcome.join(outcomes, self.weight.device, sum)

    def _solve_with(self, ranks: Ranks, config: AdaRoundConfig) -> Outcome:
        rows, tile = len(self.weight), self._rows_per_tile(config)
        tiles = [min(tile, rows - begin) for begin in range(0, rows, tile)]
        share = ranks.share(tiles)[ranks.rank]

        def solve_share() -> Outcome | None:
            rows_of_share = slice(share.start * tile, min(share.stop * tile, rows))
            return self.rows(rows_of_share).solve(config) if share else None

        outcomes = ranks.exchange(f"the rounding of {self.name}", solve_share)
        return Outcome.join([one for one in outcomes if one is not None], self.weight.device)

    def _rows_per_tile(self, config: AdaRoundConfig) -> int:
        """How many rows have the same bits alone and among others (on a GPU none need to)."""
        cols = self.weight.shape[1]
        whole_vectors = self.weight.is_cuda or (config.group_size or cols) % _VECTOR == 0
        return TILE if whole_vectors else math.lcm(TILE, _CHUNK // math.gcd(cols, _CHUNK))

    def _solve_rows(self, config: AdaRoundConfig) -> Outcome:
        outcome = self._solve_whole(config)
        return self._no_worse_on_inputs(outcome, config) if self.rows_chosen else outcome

    def _solve_whole(self, config: AdaRoundConfig) -> Outcome:
        chosen = settings(config, self.kind, self.weight.shape[1])
        watch = Stopwatch({"statistics": self.collecting_seconds}, self.weight.device)
        grids = [make_grid(weight, config) for weight in self.objective.target.split(self.sizes)]
        scales = zip(grids, self.sizes, strict=True)
        one_each = all(len(grid.scale) == rows for grid, rows in scales)
        base = QuantGrid.join(grids, self.sizes)
        watch.lap("grid")
        rows_per_scale = None if one_each else self.sizes
        solver = GramSolver(self.objective, base, rows_per_scale, config, chosen, self.name)
        outcome = solver.solve(watch)
        if chosen.diagnostics:
            with rough_products(config, self.weight.device):
                outcome.add_rules(self, base, config.seed, self.first_row)
        watch.stop()
        return outcome

    def _no_worse_on_inputs(self, outcome: Outcome, config: AdaRoundConfig) -> Outcome:
        """``outcome``, but rows that change their outputs more than rounding to nearest does are
        solved with the layer's outputs on its inputs as targets.

        Targets of the full-precision stream make up for errors of the layers before, which is worth
        some error of the layer itself. Where only some rows have a partner there, it may cost more
        than that: so the inputs that a layer gets have the last word. Where rows share a scale all
        of them are solved again, if together they change more.
        """
        plain = dataclasses.replace(self, objective=self.objective.without_targets())
        changes, nearest = plain._changes(outcome), plain._nearest_changes(config)
        if len(outcome.grid.scale) < len(changes):
            worse_together = float(changes.sum()) > float(nearest.sum())
            return plain._solve_whole(config) if worse_together else outcome
        worse = changes > nearest
        if not bool(worse.any()):
            return outcome
        if len(self.objective.gram) > 1:
            return outcome.with_rows(worse, plain._solve_whole(config), worse)
        tiles = torch.arange(len(worse), device=worse.device) // self._rows_per_tile(config)
        again = torch.isin(tiles, tiles[worse])
        return outcome.with_rows(worse, plain.rows(again)._solve_whole(config), worse[again])

    def _changes(self, outcome: Outcome) -> Tensor:
        """E[(W_q x + b_q - W x - b)^2] of each row as it is stored, float64 [rows]."""
        weight_q = outcome.grid.stored(outcome.codes, self.dtype).float()
        losses = self.objective.row_losses(weight_q)
        if outcome.bias is None:
            return losses
        bias = outcome.bias.to(self.dtype).double()
        return losses + (bias - self.objective.new_bias(weight_q)).square()

    def _nearest_changes(self, config: AdaRoundConfig) -> Tensor:
        """The same of rounding to nearest on the grid that the weights alone give."""
        if config.searches_scales:
            config = dataclasses.replace(config, scale="mse")
        grids = [make_grid(weight, config) for weight in self.weight.split(self.sizes)]
        grid = QuantGrid.join(grids, self.sizes)
        return self.row_losses(nearest_codes(self.weight, grid), grid)


def shareable(layer: MatrixLayer, config: AdaRoundConfig, kind: str) -> bool:
    """Whether rows can be solved apart: each owns its scales, and all have one Gram matrix."""
    own_scales = config.granularity != "per_tensor" and not isinstance(config.scale, Tensor)
    return kind == "gram" and own_scales and layer.groups == 1


def gram_problems(
    layers: list[MatrixLayer],
    statistics: GramStatistics,
    config: AdaRoundConfig,
    reason: str,
    seconds: float,
    rows_chosen: bool = False,
) -> Iterator[GramProblem]:
    """A problem for all layers together, since rows are independent and the statistics are shared.

    Layers whose bias takes up the mean error have another objective than those whose does not, and
    with groups each layer is its own: their rows would have to be interleaved group by group.
    ``statistics`` are of exactly these layers; ``seconds`` is what they took.
    """
    started = time.perf_counter()
    damping = config.damping
    if damping is None:
        damping = min(_MAX_DAMPING, _DAMPING / max(statistics.count, 1) ** 0.5)
    rows, notes = list(_row_indices(layers)), statistics.notes()
    for indices in _solved_together(layers, config):
        stacked = [layers[i] for i in indices]
        weight = torch.cat([layer.weight_matrix().float() for layer in stacked])
        objective = GramObjective(
            weight,
            statistics.rows(torch.cat([rows[i] for i in indices])),
            centred=_centred(stacked[0], config),
            damping=damping,
            normalize=config.scale_free,
            dtype=annealing_dtype(config.products, weight.device),
            bias=_biases(stacked),
            stored_dtype=stacked[0].weight.dtype,
        )
        seconds += time.perf_counter() - started
        yield GramProblem(
            layers=stacked,
            objective=objective,
            reason=reason,
            samples=statistics.count,
            collecting_seconds=seconds,
            notes=notes,
            sizes=[layer.rows for layer in stacked],
            rows_chosen=rows_chosen,
        )
        started, seconds = time.perf_counter(), 0.0


def _biases(layers: list[MatrixLayer]) -> Tensor:
    """float64 [rows] of all layers, 0 where there is none."""
    biases = []
    for layer in layers:
        zeros = layer.weight.new_zeros(layer.rows, dtype=torch.float64)
        biases.append(zeros if layer.bias is None else layer.bias.double())
    return torch.cat(biases)


def _centred(layer: MatrixLayer, config: AdaRoundConfig) -> bool:
    """Whether the layer will have a bias that may change."""
    return config.bias == "create" or (config.bias == "refit" and layer.bias is not None)


def _solved_together(layers: list[MatrixLayer], config: AdaRoundConfig) -> list[list[int]]:
    """Indices of the layers that are one problem."""
    if layers[0].groups > 1:
        return [[i] for i in range(len(layers))]
    by_bias: dict[bool, list[int]] = {}
    for i, layer in enumerate(layers):
        by_bias.setdefault(_centred(layer, config), []).append(i)
    return list(by_bias.values())


def _row_indices(layers: list[MatrixLayer]) -> Iterator[Tensor]:
    """The indices of each layer's rows among all."""
    begin = 0
    for layer in layers:
        yield torch.arange(begin, begin + layer.rows, device=layer.weight.device)
        begin += layer.rows
