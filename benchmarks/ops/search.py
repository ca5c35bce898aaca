"""gptq, refine_ and tabu_search_: seconds, and what they read of their matrices.

A row is solved by itself and reads the factor, or a row of the Gram matrix for each change, from a
cache or from memory. So bytes are counted that are read, not those that must be moved, and held
against a copy out of cache: more than 1 means that caches gave them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from adaround_ext import AdaRoundConfig, ops
from adaround_ext.grid import QuantGrid, make_grid
from adaround_ext.linalg.precision import full_precision
from adaround_ext.linalg.products import fixed_bmm
from adaround_ext.rounding.gptq import GptqFactor
from benchmarks import common
from benchmarks.common import Options, Target

_SHAPES = [(512, 512), (1024, 1024)]
_CUDA_SHAPES = [(512, 4608), (4096, 4096), (4096, 14336)]
_TABU_STEPS, _SWEEPS = 2000, 100
_FACTOR_ROWS = {"cpu": 1, "cuda": 8}  # that share the reading of the factor
_COPY = "copy"


@dataclass(frozen=True)
class _Problem:
    """Codes from GPTQ on a grid that is too coarse, which leaves much to change."""

    weight: Tensor
    gram: Tensor
    grid: QuantGrid
    factor: GptqFactor

    @staticmethod
    def make(rows: int, cols: int, device: torch.device) -> _Problem:
        generator = torch.Generator(device).manual_seed(0)
        mixing = torch.randn(cols, cols, generator=generator, device=device)
        gram = mixing @ mixing.T / cols + 0.05 * torch.eye(cols, device=device)
        weight = torch.randn(rows, cols, generator=generator, device=device)
        grid = make_grid(weight, AdaRoundConfig(scale="min_max"))
        return _Problem(weight, gram[None], grid, GptqFactor.make(gram[None]))

    def residual(self, codes: Tensor) -> Tensor:
        error = ops.dequantize(codes, self.grid.scale, self.grid.zero_point) - self.weight
        return fixed_bmm(error[None], self.gram)[0].contiguous()

    def refined(self, codes: Tensor, sweeps: int) -> Tensor:
        residual, codes = self.residual(codes), codes.clone()
        limits = self.grid.qmin, self.grid.qmax
        ops.refine_(codes, residual, self.gram, self.grid.scale, *limits, sweeps)
        return codes


def run(options: Options) -> tuple[list[dict[str, Any]], list[Target]]:
    """Rows and no targets; prints the table."""
    shapes = _CUDA_SHAPES if options.device.type == "cuda" else _SHAPES
    rows = []
    with torch.no_grad(), full_precision(options.device):
        for shape in shapes[:1] if options.quick else shapes:
            common.note(f"search {shape[0]}x{shape[1]}")
            rows += _measure(shape, options)
    names = ("shape", "op", "ms", "changes a row", "GB read", "of a copy")
    common.print_table("The discrete solvers", names, [[row[n] for n in names] for row in rows])
    return rows, []


def _measure(shape: tuple[int, int], options: Options) -> list[dict[str, Any]]:
    rows, cols = shape
    device = options.device
    problem = _Problem.make(rows, cols, device)
    grid = problem.grid
    start = problem.factor.codes(problem.weight, grid)
    minimum = problem.refined(start, _SWEEPS)
    changes = _changes(problem, start)
    first, last = problem.residual(start), problem.residual(minimum)
    codes, residual = start.clone(), first.clone()

    def refine() -> None:
        codes.copy_(start)
        residual.copy_(first)
        ops.refine_(codes, residual, problem.gram, grid.scale, grid.qmin, grid.qmax, _SWEEPS)

    def tabu() -> None:
        codes.copy_(minimum)
        residual.copy_(last)
        limits = grid.qmin, grid.qmax
        ops.tabu_search_(codes, residual, problem.gram, grid.scale, *limits, _TABU_STEPS, 0)

    copied = max(common.cache_bytes(device), 1 << 26)  # values, several times the cache
    calls: dict[str, Callable[[], object]] = {
        "gptq": lambda: problem.factor.codes(problem.weight, grid),
        "refine_": refine,
        "tabu_search_": tabu,
        _COPY: common.copier(copied, device),
    }
    timings = common.interleaved(calls, options)
    bandwidth = 8 * copied / timings[_COPY].median
    per_row = {
        "gptq": cols / 2 / _FACTOR_ROWS[device.type],
        "refine_": changes,
        "tabu_search_": float(_TABU_STEPS),
    }
    measured = []
    for op, read in per_row.items():
        moved = 4 * rows * cols * read
        seconds = timings[op].median
        measured.append(
            {
                "shape": f"{rows}x{cols}",
                "op": op,
                "ms": 1e3 * seconds,
                "changes a row": None if op == "gptq" else read,
                "GB read": moved / 1e9,
                "of a copy": moved / seconds / bandwidth,
                "timing": asdict(timings[op]),
                "copy_bandwidth": bandwidth,
            }
        )
    return measured


def _changes(problem: _Problem, codes: Tensor) -> float:
    """Of codes in a descent, the mean of rows, counted sweep by sweep."""
    total = 0
    for _ in range(_SWEEPS):
        after = problem.refined(codes, 1)
        changed = int((after != codes).sum())
        total, codes = total + changed, after
        if changed == 0:
            break
    return total / len(codes)
