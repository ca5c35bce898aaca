"""The solver of the Gram objective: scales, starts, search, and the comparison with nearest."""

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
from adaround_ext.rounding.outcome import Outcome, Stopwatch
from adaround_ext.rounding.problem import Problem
from adaround_ext.rounding.scales import refit_scales, search_group_scales, search_scales
from adaround_ext.rounding.search import descend, improvable, search_all
from adaround_ext.rounding.solution import Solution

_SEEDS = 1 << 63  # of the tabu search


class GramSolver:
    """One problem under its Gram objective; :meth:`solve` is the whole way."""

    def __init__(
        self,
        problem: Problem,
        objective: GramObjective,
        base: QuantGrid,
        owners: list[int] | None,
        config: AdaRoundConfig,
        chosen: Settings,
    ) -> None:
        """base: the grid to start from, a row of scales a row or one for all; ``owners`` of the
        scales, see :func:`adaround_ext.rounding.solution.per_owner`."""
        self.problem, self.objective = problem, objective
        rows = len(problem.weight)
        scale, zero_point = base.scale.expand(rows, -1), base.zero_point.expand(rows, -1)
        self.base = QuantGrid(scale, zero_point, base.qmin, base.qmax)
        self.owners, self.config, self.chosen = owners, config, chosen
        self.losses: dict[str, Tensor] = {}
        self.undecided: Tensor | None = None

    def solve(self, watch: Stopwatch) -> Outcome:
        grid, found = self.base, None
        if self.config.searches_scales:
            found = self._searched_scales()
            grid = found.grid
        watch.lap("scales")
        solutions = []
        for name in self.chosen.starts:
            solutions.append(self._start(name, grid, found))
            watch.lap("annealing" if name == "adaround" else "search")
        solutions = self._searched(solutions, 0)
        best = solutions[0]
        winner = torch.zeros(len(self.problem.weight), dtype=torch.int64, device=grid.scale.device)
        for index, solution in enumerate(solutions[1:], 1):
            winner[solution.losses < best.losses] = index
            best = best.better(solution, self.owners)
        if self.chosen.diagnostics:
            with self._rough_products():
                for name, solution in zip(self.chosen.starts, solutions, strict=True):
                    self.losses[name] = self.problem.stored_losses(solution.codes, grid)
        best = self._rounds(best)
        watch.lap("search")
        final, fallback = self._never_worse_than_nearest(best)
        self.losses["final"] = final.losses
        return Outcome(
            final.codes,
            final.grid,
            self.losses,
            fallback,
            {name: winner == index for index, name in enumerate(self.chosen.starts)},
            self.undecided,
            improvable(final, self.objective),
        )

    def _searched_scales(self) -> Solution:
        candidates = self.chosen.scale_candidates
        with self._rough_products():
            found = search_scales(
                self.objective, self.base, self.objective.gptq_factor, self.owners, candidates,
                self.config,
            )  # fmt: skip
            if self.base.scale.shape[1] > 1:
                found = search_group_scales(found, self.objective, candidates, self.config)
        if self.base.scale.is_cuda:  # where the residual was rounded, and descents were cut short
            found = Solution.of(found.codes, found.grid, self.objective)
            found = descend(found, self.objective) if self.config.refine else found
        return found

    def _rough_products(self) -> AbstractContextManager[None]:
        """For candidates, which are told apart well enough with fewer digits (docs/design.md), and
        for losses that are only shown."""
        return tf32_products(self.base.scale.device, self.config.products != "float32")

    def _start(self, name: Start, grid: QuantGrid, found: Solution | None) -> Solution:
        """At a minimum already, where ``config.refine``."""
        if name == "gptq" and found is not None:
            return found  # the search for scales was by GPTQ
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
            self.objective.target, grid, self.objective, self.chosen, self.config, self.problem.name
        )
        self.undecided = annealed.undecided
        with self._rough_products():
            self.losses["soft"] = self.objective.row_losses(annealed.weight_q)
            self.losses["hard"] = self.problem.stored_losses(annealed.codes, grid)
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
            refitted = refit_scales(best, self.objective, self.owners, self.config)
            (searched,) = self._searched([refitted], turn)
            best = best.better(searched, self.owners)
        return best

    def _stored(self, solution: Solution) -> Solution:
        """The solution with the losses that are promised: undamped, as the layer stores it."""
        losses = self.problem.stored_losses(solution.codes, solution.grid)
        return dataclasses.replace(solution, losses=losses)

    def _never_worse_than_nearest(self, best: Solution) -> tuple[Solution, Tensor]:
        """The better of ``best`` and rounding to nearest, and the rows in which that was nearest.

        On its own grid row by row; on the starting grid where rows own their scales, else by owner.
        """
        best = self._stored(best)
        final = best.better(self._nearest(best.grid), self.owners)
        nearest = self._nearest(self.base)
        final = final.better(nearest, self.owners)
        self.losses["nearest"] = nearest.losses
        fallback = (final.codes != best.codes).any(1)
        for name in ("scale", "zero_point"):
            fallback |= (getattr(final.grid, name) != getattr(best.grid, name)).any(1)
        return final, fallback

    def _nearest(self, grid: QuantGrid) -> Solution:
        codes = nearest_codes(self.problem.weight, grid)
        losses = self.problem.stored_losses(codes, grid)
        return Solution(codes, grid, torch.zeros_like(self.problem.weight), losses)  # not searched
