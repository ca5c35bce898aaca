"""Problems: layers whose rows are solved under one objective, and the outcomes of that."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from adaround_ext.config import AdaRoundConfig
from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.grid import QuantGrid, baseline_codes, nearest_codes, position
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.sampled_objective import SampledObjective


@dataclass(frozen=True, kw_only=True)
class Problem(ABC):
    """Layers whose rows, stacked to weight [rows, cols], are solved under one objective.

    reason: why it is this objective. samples: that were given. collecting_seconds: that data took.
    """

    layers: list[MatrixLayer]
    objective: GramObjective | SampledObjective
    reason: str
    samples: int
    collecting_seconds: float
    notes: tuple[str, ...] = ()
    kind: ClassVar[str]

    @property
    def name(self) -> str:
        return ", ".join(str(layer.layer) for layer in self.layers)

    @property
    def weight(self) -> Tensor:
        """float32 [rows, cols]."""
        return self.objective.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and biases as the layers store them."""
        return self.layers[0].weight.dtype

    def row_losses(self, codes: Tensor, grid: QuantGrid) -> Tensor:
        """Losses, float64 [rows], of weights and biases as the layers store them."""
        return self.objective.stored_losses(codes, grid)

    def join(self, others: Sequence[Problem]) -> Problem:
        """One problem of these rows and those of others, which agree in all but the numbers."""
        assert not others, "problems of this kind are solved alone"
        return self

    @abstractmethod
    def solve(self, config: AdaRoundConfig, ranks: Ranks = ALONE) -> Outcome:
        """Grid, search, and what is reported of each row. ranks: those that share the rows."""


@dataclass
class Outcome:
    """What was reached for the rows of a problem, a value a row.

    codes [rows, cols]; grid with a row of scales a row, or one for all; all else [rows]. bias,
    energies and losses are float64, bias None where it stays; counts: of weights with a property;
    row_flags: rows that have one; starts: rows that each start won.
    """

    codes: Tensor
    grid: QuantGrid
    bias: Tensor | None
    energies: Tensor
    losses: dict[str, Tensor]
    counts: dict[str, Tensor]
    row_flags: dict[str, Tensor]
    starts: dict[str, Tensor]
    seconds: dict[str, float]

    def add_rules(self, problem: Problem, grid: QuantGrid, seed: int, first_row: int = 0) -> None:
        """Adds the losses of the simple rules on ``grid``, see :func:`baseline_codes`."""
        for name, codes in baseline_codes(problem.weight, grid, seed, first_row).items():
            self.losses[name] = problem.row_losses(codes, grid)

    @staticmethod
    def join(
        outcomes: Sequence[Outcome],
        device: torch.device,
        seconds: Callable[[Iterable[float]], float] = max,
    ) -> Outcome:
        """The rows of all, in their order. ``seconds``: of all from those of each."""
        first = outcomes[0]

        def cat(tensors: Iterable[Tensor]) -> Tensor:
            return torch.cat([tensor.to(device) for tensor in tensors])

        def by_name(field: str) -> dict[str, Tensor]:
            dicts = [getattr(outcome, field) for outcome in outcomes]
            return {name: cat([values[name] for values in dicts]) for name in dicts[0]}

        biases = [outcome.bias for outcome in outcomes if outcome.bias is not None]
        return Outcome(
            codes=cat([outcome.codes for outcome in outcomes]),
            grid=QuantGrid(
                cat([outcome.grid.scale for outcome in outcomes]),
                cat([outcome.grid.zero_point for outcome in outcomes]),
                first.grid.qmin,
                first.grid.qmax,
            ),
            bias=cat(biases) if biases else None,
            energies=cat([outcome.energies for outcome in outcomes]),
            losses=by_name("losses"),
            counts=by_name("counts"),
            row_flags=by_name("row_flags"),
            starts=by_name("starts"),
            seconds={
                name: seconds(outcome.seconds[name] for outcome in outcomes)
                for name in first.seconds
            },
        )

    def with_rows(self, rows: Tensor, other: Outcome, others: Tensor) -> Outcome:
        """This with ``other``'s rows in the place of some; both as flags, bool [rows].

        Rows have their scales. Seconds are of both.
        """

        def merge(here: Tensor, there: Tensor) -> Tensor:
            merged = here.clone()
            merged[rows] = there[others].to(here.dtype)
            return merged

        def by_name(field: str) -> dict[str, Tensor]:
            here, there = getattr(self, field), getattr(other, field)
            return {name: merge(values, there[name]) for name, values in here.items()}

        bias = None
        if self.bias is not None and other.bias is not None:
            bias = merge(self.bias, other.bias)
        return Outcome(
            codes=merge(self.codes, other.codes),
            grid=QuantGrid(
                merge(self.grid.scale, other.grid.scale),
                merge(self.grid.zero_point, other.grid.zero_point),
                self.grid.qmin,
                self.grid.qmax,
            ),
            bias=bias,
            energies=merge(self.energies, other.energies),
            losses=by_name("losses"),
            counts=by_name("counts"),
            row_flags=by_name("row_flags"),
            starts=by_name("starts"),
            seconds={name: value + other.seconds[name] for name, value in self.seconds.items()},
        )


def weight_counts(
    weight: Tensor, codes: Tensor, grid: QuantGrid, undecided: Tensor | None
) -> dict[str, Tensor]:
    """Weights of each row that are not at their nearest code, beyond the grid, or undecided."""
    steps = position(weight, grid)
    flags = {
        "flipped": codes != nearest_codes(weight, grid),
        "clipped": (steps < grid.qmin) | (steps > grid.qmax),
    }
    if undecided is not None:
        flags["undecided"] = undecided
    return {name: flag.count_nonzero(1) for name, flag in flags.items()}


class Stopwatch:
    """Seconds of the parts of a solution, in the order they came."""

    def __init__(self, seconds: dict[str, float], device: torch.device) -> None:
        self.seconds = seconds
        self._device = device
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if self._device.type == "cuda":  # else what is queued would count as the next part's
            torch.cuda.synchronize(self._device)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now

    def stop(self) -> dict[str, float]:
        """Everything since the last lap is evaluation; the seconds, with their total."""
        self.lap("evaluation")
        self.seconds["total"] = sum(self.seconds.values())
        return self.seconds
