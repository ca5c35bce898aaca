"""Solver of Gram objectives: scales, starts, search, and the comparison with nearest."""

from __future__ import annotations

import dataclasses
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from adaround_ext.config import AdaRoundConfig, Start
from adaround_ext.grid import QuantGrid, nearest_codes
from adaround_ext.linalg.precision import tf32_products
from adaround_ext.presets import Settings
from adaround_ext.rounding.anneal import anneal
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.problem import Outcome, Stopwatch, weight_counts
from adaround_ext.rounding.scales import refit_scales, search_group_scales, search_scales
from adaround_ext.rounding.search import descend, rows_not_minimal, search_all
from adaround_ext.rounding.solution import Solution

_SEEDS = 1 << 63  # of the tabu search


def rough_products(config: AdaRoundConfig, device: torch.device) -> AbstractContextManager[None]:
    """For candidates, which are told apart well enough with fewer digits (docs/design.md), and for
    losses that are only shown."""
    return tf32_products(device, config.products != "float32")


class GramSolver:
    """The whole way from a Gram objective to codes: :meth:`solve`."""

    def __init__(
        self,
        objective: GramObjective,
        base: QuantGrid,
        rows_per_scale: list[int] | None,
        config: AdaRoundConfig,
        chosen: Settings,
        name: str = "layer",
    ) -> None:
        """base: the grid to start from, a row of scales a row or one for all. rows_per_scale: see
        :func:`adaround_ext.rounding.solution.per_scale`. name: of the layers."""
        self.objective, self.name = objective, name
        rows = len(objective.weight)
        scale, zero_point = base.scale.expand(rows, -1), base.zero_point.expand(rows, -1)
        self.base = QuantGrid(scale, zero_point, base.qmin, base.qmax)
        self.rows_per_scale, self.config, self.chosen = rows_per_scale, config, chosen
        self.losses: dict[str, Tensor] = {}
        self.undecided: Tensor | None = None

    def solve(self, watch: Stopwatch) -> Outcome:
        grid, by_gptq = self.base, None
        if self.config.searches_scales:
            by_gptq = self._searched_scales()
            grid = by_gptq.grid
        watch.lap("scales")
        solutions = []
        for name in self.chosen.starts:
            solutions.append(self._start(name, grid, by_gptq))
            watch.lap("annealing" if name == "adaround" else "search")
        solutions = self._searched(solutions, 0)
        if self.chosen.diagnostics:
            with self._rough_products():
                for name, solution in zip(self.chosen.starts, solutions, strict=True):
                    self.losses[name] = self.objective.stored_losses(solution.codes, grid)
        best, winner = self._best_of(solutions)
        best = self._rounds(best)
        watch.lap("search")
        final, fallback = self._never_worse_than_nearest(best)
        self.losses["final"] = final.losses
        return self._outcome(final, fallback, winner, watch)

    def _best_of(self, solutions: list[Solution]) -> tuple[Solution, Tensor]:
        """The best in each row, and which it is."""
        best = solutions[0]
        winner = torch.zeros(len(best.codes), dtype=torch.int64, device=best.codes.device)
        for index, solution in enumerate(solutions[1:], 1):
            winner[solution.losses < best.losses] = index
            best = best.better(solution, self.rows_per_scale)
        return best, winner

    def _outcome(
        self, final: Solution, fallback: Tensor, winner: Tensor, watch: Stopwatch
    ) -> Outcome:
        objective = self.objective
        bias = None
        if objective.centred:
            stored = final.grid.stored(final.codes, objective.stored_dtype)
            bias = objective.new_bias(stored.float())
        return Outcome(
            codes=final.codes,
            grid=final.grid,
            bias=bias,
            energies=objective.row_energies,
            losses=self.losses,
            counts=weight_counts(objective.weight, final.codes, final.grid, self.undecided),
            row_flags={"fallback": fallback, "improvable": rows_not_minimal(final, objective)},
            starts={name: winner == index for index, name in enumerate(self.chosen.starts)},
            seconds=watch.seconds,
        )

    def _searched_scales(self) -> Solution:
        candidates = self.chosen.scale_candidates
        with self._rough_products():
            best = search_scales(
                self.objective,
                self.base,
                self.objective.gptq_factor,
                self.rows_per_scale,
                candidates,
                self.config,
            )
            if self.base.scale.shape[1] > 1:
                best = search_group_scales(best, self.objective, candidates, self.config)
        if self.base.scale.is_cuda:  # where the residual was rounded, and descents were cut short
            best = Solution.of(best.codes, best.grid, self.objective)
            best = descend(best, self.objective) if self.config.refine else best
        return best

    def _rough_products(self) -> AbstractContextManager[None]:
        return rough_products(self.config, self.base.scale.device)

    def _start(self, name: Start, grid: QuantGrid, by_gptq: Solution | None) -> Solution:
        """At a minimum already, where ``config.refine``."""
        if name == "gptq" and by_gptq is not None:
            return by_gptq  # the search for scales was by GPTQ
        if name == "gptq":
            codes = self.objective.gptq_factor.codes(self.objective.target, grid)
        elif name == "nearest":
            codes = nearest_codes(self.objective.target, grid)
        else:
            codes = self._annealed(grid)
        solution = Solution.of(codes, grid, self.objective)
        return descend(solution, self.objective) if self.config.refine else solution

    def _annealed(self, grid: QuantGrid) -> Tensor:
        """AdaRound's own codes, around the objective's target."""
        annealed = anneal(
            self.objective.target, grid, self.objective, self.chosen, self.config, self.name
        )
        self.undecided = annealed.undecided
        with self._rough_products():
            self.losses["soft"] = self.objective.row_losses(annealed.weight_q)
            self.losses["hard"] = self.objective.stored_losses(annealed.codes, grid)
        return annealed.codes

    def _searched(self, solutions: list[Solution], turn: int) -> list[Solution]:
        """Other walks in each turn: where a refit changed nothing, the same would end the same."""
        seed = (self.config.seed + turn) % _SEEDS
        return search_all(solutions, self.objective, self.chosen.search_steps, seed)

    def _rounds(self, best: Solution) -> Solution:
        """Scales refitted to the codes and codes searched on the new scales.

        As many times as was asked for, whatever it gained: rows that gain nothing in one round may
        in the next, and must not depend on the rows that they are solved with.
        """
        for turn in range(1, self.chosen.rounds + 1):
            refitted = refit_scales(best, self.objective, self.rows_per_scale, self.config)
            (searched,) = self._searched([refitted], turn)
            best = best.better(searched, self.rows_per_scale)
        return best

    def _stored(self, solution: Solution) -> Solution:
        """The solution with the losses that are promised: undamped, as the layer stores it."""
        losses = self.objective.stored_losses(solution.codes, solution.grid)
        return dataclasses.replace(solution, losses=losses)

    def _never_worse_than_nearest(self, best: Solution) -> tuple[Solution, Tensor]:
        """The better of ``best`` and rounding to nearest, and the rows in which that was nearest.

        On its own grid row by row; on the starting grid too, but rows that share a scale together.
        """
        best = self._stored(best)
        final = best.better(self._nearest(best.grid), self.rows_per_scale)
        nearest = self._nearest(self.base)
        final = final.better(nearest, self.rows_per_scale)
        self.losses["nearest"] = nearest.losses
        fallback = (final.codes != best.codes).any(1)
        for name in ("scale", "zero_point"):
            fallback |= (getattr(final.grid, name) != getattr(best.grid, name)).any(1)
        return final, fallback

    def _nearest(self, grid: QuantGrid) -> Solution:
        codes = nearest_codes(self.objective.weight, grid)
        losses = self.objective.stored_losses(codes, grid)
        return Solution(
            codes, grid, torch.zeros_like(self.objective.weight), losses
        )  # not searched
