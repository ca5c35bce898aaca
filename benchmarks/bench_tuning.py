"""Where the defaults of choice.py come from: held-out error over their neighbours."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import optimize_layer
from adaround_ext.grid import QuantGrid, nearest_codes, quant_range
from adaround_ext.ops import dequantize
from benchmarks.common import Options, Target, geometric_mean, note, print_table
from benchmarks.workloads import Workload, layer_workloads

_SMALL = ("query", "attn.output")
_ALL = (*_SMALL, "intermediate", "output")
_GRAM_SWEEP: list[dict[str, Any]] = [
    {},
    *({"reg_weight": value} for value in (0.1, 0.3, 3.0, 10.0)),
    *({"learning_rate": value} for value in (0.01, 0.02, 0.1, 0.2)),
    *({"steps": value} for value in (100, 200, 1000, 2000)),
    {"refine": False},
]
# The paper's loss has no scale: its lambda of 0.01 means something else for every layer.
_SCALE_SWEEP: list[dict[str, Any]] = [
    {},
    *({"scale_free": False, "reg_weight": value} for value in (1e-4, 1e-3, 1e-2, 1e-1)),
]
_SAMPLED_SWEEP: list[dict[str, Any]] = [
    {},
    *({"reg_weight": value} for value in (0.1, 0.3, 3.0)),
    *({"learning_rate": value} for value in (3e-3, 3e-2)),
    *({"steps": value} for value in (500, 5000)),
]
_SAMPLED_ROWS = 192  # of the intermediate layer, to keep the sweep short


def run(options: Options) -> tuple[list[dict[str, Any]], list[Target]]:
    """Errors are held out and divided by rounding to nearest's on the same grid."""
    layers = {w.name: w for w in layer_workloads(_ALL, options.device)}
    small = [layers[name] for name in _SMALL]
    rows: list[dict[str, Any]] = []
    for bits in (4, 2):
        rows += _sweep("gram", _GRAM_SWEEP, small, bits, options)
    every = list(layers.values())
    rows += _sweep("gram, loss with and without scale", _SCALE_SWEEP, every, 4, options)
    rows += _sweep(
        "gram or sampled, no activation",
        [{}, *({"objective": "sampled", "steps": steps} for steps in (500, 2000, 5000))],
        small[:1], 4, options,
    )  # fmt: skip
    rows += _sweep("sampled, GELU", _SAMPLED_SWEEP, [_part(layers["intermediate"])], 4, options)
    return rows, []


def _sweep(
    title: str,
    settings: list[dict[str, Any]],
    workloads: list[Workload],
    bits: int,
    options: Options,
) -> list[dict[str, Any]]:
    activation = "gelu" if "GELU" in title else None
    rows = []
    for values in settings[:2] if options.quick else settings:
        note(f"{title}, {bits} bits: {values or 'defaults'}")
        ratios, undecided, seconds = [], [], 0.0
        for workload in workloads:
            result = optimize_layer(
                workload.layer, workload.inputs, bits=bits, activation=activation, **values
            )
            qmin, qmax = quant_range(bits, symmetric=True)
            grid = QuantGrid(result.scale, result.zero_point, qmin, qmax)
            nearest = dequantize(nearest_codes(workload.matrix, grid), grid.scale, grid.zero_point)
            found = _error(workload, result.weight_q, activation)
            ratios.append(found / _error(workload, nearest, activation))
            undecided.append(result.report.undecided)
            seconds += result.report.seconds["total"]
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
             row["undecided"], row["seconds"]]
            for row in rows
        ],
    )  # fmt: skip
    return rows


@torch.no_grad()
def _error(workload: Workload, matrix_q: Tensor, activation: str | None) -> float:
    if activation is None:
        return workload.relative_error(matrix_q, workload.held_out)
    x, bias = workload.held_out.flatten(0, -2), workload.layer.bias
    exact, got = (F.gelu(F.linear(x, matrix, bias)) for matrix in (workload.matrix, matrix_q))
    return float((got - exact).square().sum() / exact.square().sum())


def _part(workload: Workload) -> Workload:
    layer = nn.Linear(workload.matrix.shape[1], _SAMPLED_ROWS, device=workload.inputs.device)
    layer.load_state_dict({k: v[:_SAMPLED_ROWS] for k, v in workload.layer.state_dict().items()})
    # A quarter of each sequence: 256 tokens a step.
    x = workload.inputs[:, : workload.inputs.shape[1] // 4].contiguous()
    name = f"{workload.name}[:{_SAMPLED_ROWS}]"
    return Workload(name, layer, x, workload.held_out, workload.data)
