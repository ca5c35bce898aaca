"""Methods under test: simple rules, GPTQ, descent and this package's presets."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaround_ext import optimize_layer
from adaround_ext.config import AdaRoundConfig
from adaround_ext.grid import QuantGrid, baseline_codes, make_grid, nearest_codes
from adaround_ext.layers import inputs as data
from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.ops import dequantize
from adaround_ext.rounding.gptq import GptqFactor
from adaround_ext.statistics.moments import GramStatistics
from benchmarks import common
from benchmarks.quality.layers import Subject

GROUP_SIZE = 128
GRANULARITIES: dict[str, dict[str, Any]] = {
    "channel": {"granularity": "per_channel"},
    "group": {"granularity": "per_group", "group_size": GROUP_SIZE},
}
# On the MSE grid, without looking at the data (stochastic: but for its choice).
RULES = ("nearest", "floor", "ceil", "stochastic")
# What optimize_layer is given.
SETTINGS: dict[str, dict[str, Any]] = {
    "gptq-ours": {"starts": ("gptq",), "refine": False, "search_steps": 0},
    "descent": {
        "starts": ("nearest",),
        "scale": "mse",
        "bias": "keep",
        "damping": 0.0,
        "search_steps": 0,
        "rounds": 0,
    },
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best"},
}
METHODS = (*RULES, "gptq", *SETTINGS)
TITLES = {
    "nearest": "nearest",
    "floor": "floor",
    "ceil": "ceil",
    "stochastic": "best of 100 stochastic",
    "gptq": "GPTQ",
    "gptq-ours": "GPTQ, our scales and bias",
    "descent": "descent from nearest",
    "fast": "fast",
    "balanced": "balanced",
    "best": "best",
    "reference": "AdaRound, reference",
}
_DRAWS = 100
_GPTQ_DAMPING = 0.01
_ONCE = ("stochastic", "best")  # the slow ones: timed once
_REPEATS = 2


@dataclass(frozen=True)
class Rounding:
    """Weights as the layer has them, a new bias or None, and the median of the seconds it took."""

    weight: Tensor
    bias: Tensor | None
    seconds: float
    repeats_agree: bool = True


def fits(subject: Subject, granularity: str) -> bool:
    """Whether the layer's columns can be cut into groups of 128."""
    return granularity == "channel" or subject.matrix.shape[1] % GROUP_SIZE == 0


def mse_grid(subject: Subject, bits: int, granularity: str) -> QuantGrid:
    """The grid of rounding to nearest with the least squared weight error."""
    config = AdaRoundConfig(bits=bits, scale="mse", **GRANULARITIES[granularity])
    return make_grid(subject.matrix.float(), config)


def round_layer(
    subject: Subject, bits: int, granularity: str, methods: tuple[str, ...], quick: bool
) -> dict[str, Rounding]:
    """All methods on one layer; their repeats take turns, so that they see the same machine."""
    runs_of: dict[str, list[Rounding]] = {method: [] for method in methods}
    for repeat in range(1 if quick else _REPEATS):
        for method in methods:
            if repeat == 0 or method not in _ONCE:
                runs_of[method].append(_round(subject, bits, granularity, method))
    return {method: _median(runs) for method, runs in runs_of.items()}


def _round(subject: Subject, bits: int, granularity: str, method: str) -> Rounding:
    device = subject.inputs.device
    common.synchronize(device)
    begin = time.perf_counter()
    if method in RULES:
        weight, bias = _rule(subject, bits, granularity, method), None
    elif method == "gptq":
        weight, bias = _gptq(subject, bits, granularity), None
    else:
        settings = GRANULARITIES[granularity] | SETTINGS[method]
        result = optimize_layer(subject.layer, subject.inputs, bits=bits, **settings)
        weight, bias = result.weight_q, result.bias
    common.synchronize(device)
    return Rounding(weight, bias, time.perf_counter() - begin)


def _rule(subject: Subject, bits: int, granularity: str, method: str) -> Tensor:
    matrix, grid = subject.matrix, mse_grid(subject, bits, granularity)
    if method == "stochastic":
        codes = _best_draw(subject, grid)
    elif method == "nearest":
        codes = nearest_codes(matrix, grid)
    else:
        codes = baseline_codes(matrix, grid, seed=0)[method]
    return dequantize(codes, grid.scale, grid.zero_point).view_as(subject.layer.weight)


def _gptq(subject: Subject, bits: int, granularity: str) -> Tensor:
    """GPTQ as published: act-order, 1 % of the mean diagonal as damping; and nothing of ours."""
    layer = matrix_layer(subject.layer)
    moments = GramStatistics([layer], positions=None, seed=0)
    moments.collect(data.batches([layer], subject.name, subject.inputs, None))
    gram = moments.gram()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    diagonal += _GPTQ_DAMPING * diagonal.mean(1, keepdim=True)
    grid = mse_grid(subject, bits, granularity)
    codes = GptqFactor.make(gram).codes(subject.matrix, grid)
    return dequantize(codes, grid.scale, grid.zero_point).view_as(subject.layer.weight)


def _best_draw(subject: Subject, grid: QuantGrid) -> Tensor:
    """Codes of the draw with the least calibration loss; the Gram matrix is there already."""
    gram, matrix = subject.calibration.gram.float(), subject.matrix
    best, least = None, torch.inf
    for seed in range(_DRAWS):
        codes = baseline_codes(matrix, grid, seed)["stochastic"]
        error = dequantize(codes, grid.scale, grid.zero_point) - matrix
        parts = error.view(len(gram), -1, matrix.shape[1])
        loss = float((torch.bmm(parts, gram) * parts).sum(dtype=torch.float64))
        if loss < least:
            best, least = codes, loss
    assert best is not None
    return best


def _median(runs: list[Rounding]) -> Rounding:
    first = runs[0]
    agree = all(
        torch.equal(first.weight, run.weight)
        and (first.bias is None or torch.equal(first.bias, run.bias))
        for run in runs
    )
    seconds = statistics.median([run.seconds for run in runs])
    return Rounding(first.weight, first.bias, seconds, agree)
