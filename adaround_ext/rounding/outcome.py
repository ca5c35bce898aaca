"""Outcomes of the solvers: what was reached for each row, and the time it took."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext.grid import QuantGrid


@dataclass
class Outcome:
    """What a solver found. grid has a row of scales a row of codes, or one for all."""

    codes: Tensor
    grid: QuantGrid
    losses: dict[str, Tensor]  # float64 [rows] each
    fallback: Tensor  # rows in which rounding to nearest was kept
    starts: dict[str, Tensor]  # rows that each start won
    undecided: Tensor | None = None  # [rows, cols], at the end of the annealing
    improvable: Tensor | None = None  # rows in which a change of one code would help


@dataclass
class Solved:
    """All that is reported of the rows of a problem, a value a row.

    codes [rows, cols]; scale and zero_point [rows or 1, n_groups]; all else [rows]. bias, energy
    and losses are float64, bias None where it stays; counts: of weights with a property; marks:
    rows that have one; starts: rows that each start won.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    energy: Tensor
    losses: dict[str, Tensor]
    counts: dict[str, Tensor]
    marks: dict[str, Tensor]
    starts: dict[str, Tensor]
    seconds: dict[str, float]

    @staticmethod
    def join(
        parts: Sequence[Solved],
        device: torch.device,
        seconds: Callable[[Iterable[float]], float] = max,
    ) -> Solved:
        """The rows of all parts, in their order. ``seconds``: of all from those of each."""
        first = parts[0]

        def rows(values: list[Tensor]) -> Tensor:
            return torch.cat([value.to(device) for value in values])

        def named(name: str) -> dict[str, Tensor]:
            found = [getattr(part, name) for part in parts]
            return {key: rows([own[key] for own in found]) for key in found[0]}

        return Solved(
            codes=rows([part.codes for part in parts]),
            scale=rows([part.scale for part in parts]),
            zero_point=rows([part.zero_point for part in parts]),
            bias=None
            if first.bias is None
            else rows([p.bias for p in parts if p.bias is not None]),
            energy=rows([part.energy for part in parts]),
            losses=named("losses"),
            counts=named("counts"),
            marks=named("marks"),
            starts=named("starts"),
            seconds={key: seconds(part.seconds[key] for part in parts) for key in first.seconds},
        )

    def with_rows(self, rows: Tensor, other: Solved, others: Tensor) -> Solved:
        """This with ``other``'s rows in the place of some; both as marks, bool [rows].

        Rows have their scales. Seconds are of both.
        """

        def put(here: Tensor, there: Tensor) -> Tensor:
            merged = here.clone()
            merged[rows] = there[others].to(here.dtype)
            return merged

        def named(name: str) -> dict[str, Tensor]:
            here, there = getattr(self, name), getattr(other, name)
            return {key: put(value, there[key]) for key, value in here.items()}

        bias = None
        if self.bias is not None and other.bias is not None:
            bias = put(self.bias, other.bias)
        return Solved(
            codes=put(self.codes, other.codes),
            scale=put(self.scale, other.scale),
            zero_point=put(self.zero_point, other.zero_point),
            bias=bias,
            energy=put(self.energy, other.energy),
            losses=named("losses"),
            counts=named("counts"),
            marks=named("marks"),
            starts=named("starts"),
            seconds={key: value + other.seconds[key] for key, value in self.seconds.items()},
        )


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
