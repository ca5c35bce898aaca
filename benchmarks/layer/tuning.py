"""Held-out error of the neighbours of the presets' numbers, which were chosen by it."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import LayerResult, optimize_layer
from adaround_ext.config import AdaRoundConfig
from adaround_ext.grid import nearest_codes
from adaround_ext.layers.inputs import batches
from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.ops import dequantize
from adaround_ext.presets import settings
from adaround_ext.rounding.anneal import anneal
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.statistics.moments import GramStatistics
from benchmarks.common import Options, Target, geometric_mean, note, print_table
from benchmarks.workloads.shapes import Workload, layer_workloads

_SMALL = ("query", "attn.output")
_ALL = (*_SMALL, "intermediate", "output")
_ANNEALED = {"starts": ("adaround",)}
_GRAM_SWEEP: list[dict[str, Any]] = [
    {},
    *({"preset": name} for name in ("fast", "best")),
    *({"starts": (name,)} for name in ("nearest", "gptq", "adaround")),
    {"scale": "mse"},
    *({"scale_candidates": value} for value in (3, 5, 9, 15)),
    {"bias": "keep"},
    {"refine": False},
    *({"search_steps": value} for value in (0, 500, 8000)),
    *({"rounds": value} for value in (0, 3)),
    {"products": "float32"},
]
_ANNEALING_SWEEP: list[dict[str, Any]] = [
    _ANNEALED,
    *(_ANNEALED | {"steps": value} for value in (100, 1000)),
    *(_ANNEALED | {"learning_rate": value} for value in (0.02, 0.1)),
    *(_ANNEALED | {"reg_weight": value} for value in (0.1, 0.3, 3.0, 10.0)),
    # The paper's loss has no scale: its lambda means something else for every layer.
    *(_ANNEALED | {"scale_free": False, "reg_weight": value} for value in (1e-4, 1e-3, 1e-2, 1e-1)),
]
_DAMPING_SWEEP: list[dict[str, Any]] = [
    {"preset": "fast", "damping": value} for value in (None, 0.0, 0.01, 0.03, 0.1, 0.3)
]
_SAMPLED_SWEEP: list[dict[str, Any]] = [
    {},
    *({"reg_weight": value} for value in (0.1, 0.3, 3.0)),
    *({"learning_rate": value} for value in (3e-3, 3e-2)),
    *({"steps": value} for value in (500, 5000)),
]
_SHORT = (9, 27, 64, 128)  # columns: of a depthwise convolution, of a network's first one
_SHORT_SWEEP: list[dict[str, Any]] = [{}, *({"search_steps": n} for n in (0, 50, 2000, 8000))]
_SAMPLED_ROWS = 192  # of the intermediate layer, to keep the sweep short
_FEW = 80  # sequences: a quarter of the calibration data


def run(options: Options) -> tuple[list[dict[str, Any]], list[Target]]:
    """Errors are held out and divided by those of rounding to nearest on the MSE grid."""
    layers = {w.name: w for w in layer_workloads(_ALL, options.device)}
    small, every = [layers[name] for name in _SMALL], list(layers.values())
    rows: list[dict[str, Any]] = []
    for bits in (4, 2):
        rows += _sweep("gram", _GRAM_SWEEP, small, bits, options)
        rows += _sweep("annealing alone", _ANNEALING_SWEEP, small, bits, options)
        short = [_columns(layers["query"], count) for count in _SHORT]
        rows += _sweep("short rows", _SHORT_SWEEP, short, bits, options)
    rows += _sweep("damping", _DAMPING_SWEEP, every, 4, options)
    few = [_with_inputs(workload, workload.inputs[:_FEW]) for workload in every]
    rows += _sweep("damping, a quarter of the data", _DAMPING_SWEEP, few, 4, options)
    rows += _sweep(
        "gram or sampled, no activation",
        [_ANNEALED, *({"objective": "sampled", "steps": steps} for steps in (500, 2000, 5000))],
        small[:1], 4, options,
    )  # fmt: skip
    rows += _sweep("sampled, GELU", _SAMPLED_SWEEP, [_part(layers["intermediate"])], 4, options)
    rows += [_settling(workload, steps) for workload in small for steps in (300, 1000)]
    return rows, []


def _sweep(
    title: str,
    sweep: list[dict[str, Any]],
    workloads: list[Workload],
    bits: int,
    options: Options,
) -> list[dict[str, Any]]:
    activation = "gelu" if "GELU" in title else None
    rows = []
    for values in sweep[:2] if options.quick else sweep:
        note(f"{title}, {bits} bits: {values or 'defaults'}")
        ratios, undecided, seconds = [], [], []
        for workload in workloads:
            begin = time.perf_counter()
            result = optimize_layer(
                workload.layer, workload.inputs, bits=bits, activation=activation, **values
            )
            seconds.append(time.perf_counter() - begin)
            grid = workload.grid(bits)
            codes = nearest_codes(workload.matrix, grid)
            nearest = dequantize(codes, grid.scale, grid.zero_point)
            ratios.append(
                _error(workload, result, activation) / _error(workload, nearest, activation)
            )
            undecided.append(result.report.undecided)
        rows.append(
            {
                "sweep": title,
                "bits": bits,
                "settings": values,
                "layers": [workload.name for workload in workloads],
                "of_nearest": ratios,
                "geometric_mean": geometric_mean(ratios),
                "undecided": max(undecided),
                "seconds": seconds,
            }
        )
    print_table(
        f"{title}, {bits} bits: held-out error / nearest's",
        ["settings", *(w.name for w in workloads), "mean", "undecided", "s"],
        [
            [str(row["settings"] or "defaults"), *row["of_nearest"], row["geometric_mean"],
             row["undecided"], sum(row["seconds"])]
            for row in rows
        ],
    )  # fmt: skip
    return rows


@torch.no_grad()
def _error(workload: Workload, rounded: LayerResult | Tensor, activation: str | None) -> float:
    if activation is None:
        if isinstance(rounded, LayerResult):
            return workload.result_error(rounded)
        return workload.relative_error(rounded, workload.held_out)
    matrix_q = rounded.weight_q if isinstance(rounded, LayerResult) else rounded
    x, bias = workload.held_out.flatten(0, -2), workload.layer.bias
    exact, got = (F.gelu(F.linear(x, matrix, bias)) for matrix in (workload.matrix, matrix_q))
    return float((got - exact).square().sum() / exact.square().sum())


class _Recorder:
    """An objective that keeps the soft errors it is asked about at one step."""

    as_error = True
    generator = None

    def __init__(self, objective: GramObjective, step: int) -> None:
        self._objective, self._left = objective, step
        self.dtype = objective.dtype

    def gradient(self, error: Tensor) -> Tensor:
        if self._left == 0:
            self.kept = error.clone()
        self._left -= 1
        return self._objective.gradient(error)


@torch.no_grad()
def _settling(workload: Workload, steps: int) -> dict[str, Any]:
    """How many weights change sides in the last tenth of the annealing: would an early end pay?"""
    layer = matrix_layer(workload.layer)
    moments = GramStatistics([layer], positions=None, seed=0)
    moments.collect(batches([layer], workload.name, workload.inputs, None))
    weight, grid = workload.matrix, workload.grid()
    recorder = _Recorder(
        GramObjective(weight, moments, centred=True, damping=0.05), steps * 9 // 10
    )
    config = AdaRoundConfig(steps=steps)
    v = anneal(weight, grid, recorder, settings(config, "gram", weight.shape[1]), config).v
    h = (recorder.kept + weight) / grid.scale - (weight / grid.scale).floor()
    changed = float(((h >= 0.5) != (v >= 0)).float().mean())
    note(f"{workload.name}: {changed:.2%} change sides in the last tenth of {steps} steps")
    return {"sweep": "settling", "layer": workload.name, "steps": steps, "changed": changed}


def _with_inputs(workload: Workload, inputs: Tensor) -> Workload:
    return Workload(workload.name, workload.layer, inputs, workload.held_out, workload.data)


def _columns(workload: Workload, count: int) -> Workload:
    """The first inputs alone."""
    layer = nn.Linear(count, workload.matrix.shape[0], device=workload.inputs.device)
    with torch.no_grad():
        layer.weight.copy_(workload.matrix[:, :count])
        layer.bias.copy_(workload.layer.bias)
    x, held_out = (t[..., :count].contiguous() for t in (workload.inputs, workload.held_out))
    return Workload(f"{count} columns", layer, x, held_out, workload.data)


def _part(workload: Workload) -> Workload:
    layer = nn.Linear(workload.matrix.shape[1], _SAMPLED_ROWS, device=workload.inputs.device)
    layer.load_state_dict({k: v[:_SAMPLED_ROWS] for k, v in workload.layer.state_dict().items()})
    # A quarter of each sequence: 256 tokens a step.
    x = workload.inputs[:, : workload.inputs.shape[1] // 4].contiguous()
    name = f"{workload.name}[:{_SAMPLED_ROWS}]"
    return Workload(name, layer, x, workload.held_out, workload.data)
