"""optimize_layer against the paper's loop in plain PyTorch: time and held-out error of a layer.

Both take 4 bits, symmetric, a scale a channel, and the same calibration data; the reference and
rounding to nearest use the grid of least squared weight error, ours searches its own. The reference
takes 10,000 steps on minibatches of 32 sequences or images, at both learning rates, of which the
one with the lower held-out error counts (of the largest layer at 1e-2 alone, the better one of all
others). Where only some of its steps are run ("extrapolated"), its
time is scaled to 10,000 and its error unknown.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from adaround_ext import optimize_layer, reference
from adaround_ext.grid import QuantGrid, nearest_codes
from benchmarks import common
from benchmarks.common import Options, Target
from benchmarks.workloads import shapes
from benchmarks.workloads.shapes import Workload

_LEARNING_RATES = (1e-3, 1e-2)


@dataclass(frozen=True)
class _Run:
    """One run of the reference; seconds of 10,000 steps."""

    learning_rate: float
    seconds: float
    held_out: float | None


def run(options: Options) -> tuple[list[dict[str, Any]], list[Target]]:
    """Rows and targets; prints the table."""
    rows, targets = [], []
    for workload in shapes.layer_workloads(options.shapes, options.device):
        row = _measure(workload, options)
        rows.append(row)
        targets += _layer_targets(workload, row)
        common.note(
            f"{workload.name}: ours {row['seconds']:.2f} s, reference "
            f"{row['reference_seconds']:.0f} s{' (extrapolated)' * row['extrapolated']}"
        )
    _print(rows)
    transformer = [r for r in rows if r["kind"] == "Linear" and r["name"] != shapes.DECODER]
    return rows, targets + _mean_targets(transformer)


def _measure(workload: Workload, options: Options) -> dict[str, Any]:
    steps = options.reference_steps
    if workload.is_conv:
        steps = min(steps, common.QUICK_REFERENCE_STEPS)
    extrapolated = steps < common.REFERENCE_STEPS
    repeats = 1 if options.quick else 2
    result = optimize_layer(workload.layer, workload.inputs)  # also warms up
    grid = workload.grid()
    nearest = _dequantized(nearest_codes(workload.matrix, grid), grid)
    _check(workload, nearest)
    seconds, runs = [], []
    for learning_rate in _LEARNING_RATES[workload.name == shapes.DECODER :]:
        seconds += [_ours(workload, options) for _ in range(repeats)]
        runs.append(_reference(workload, grid, learning_rate, steps, options))
    seconds += [_ours(workload, options) for _ in range(repeats)]
    best = min(runs, key=lambda run: run.seconds if run.held_out is None else run.held_out)
    held_out = workload.result_error(result)
    nearest_held_out = workload.relative_error(nearest, workload.held_out)
    median = statistics.median(seconds)
    return {
        "name": workload.name,
        "kind": type(workload.layer).__name__,
        "layer": str(workload.layer),
        "data": workload.data,
        "objective": result.report.objective,
        "reason": result.report.reason,
        "seconds": median,
        "seconds_all": seconds,
        "seconds_of_parts": result.report.seconds,
        "held_out": held_out,
        "held_out_nearest": nearest_held_out,
        "held_out_reference": best.held_out,
        "over_nearest": held_out / nearest_held_out,
        "over_reference": None if best.held_out is None else held_out / best.held_out,
        "reference_seconds": best.seconds,
        "reference_learning_rate": None if extrapolated else best.learning_rate,
        "reference_steps_run": steps,
        "extrapolated": extrapolated,
        "reference_runs": [vars(run) for run in runs],
        "speedup": best.seconds / median,
    }


def _dequantized(codes: Tensor, grid: QuantGrid) -> Tensor:
    return reference.dequantize(codes, grid.scale, grid.zero_point, torch.float32)


def _check(workload: Workload, nearest: Tensor) -> None:
    """The same weights and the same loss on both sides, for rounding to nearest."""
    result = optimize_layer(
        workload.layer, workload.inputs, starts=("nearest",), scale="mse", bias="keep",
        damping=0.0, refine=False,
    )  # fmt: skip
    common.assert_agree(
        f"{workload.name}: weight_q", result.weight_q.flatten(1), nearest.to(result.weight_q), 0.0
    )
    loss = torch.tensor(result.report.relative["final"])
    expected = torch.tensor(workload.relative_error(nearest, workload.inputs))
    common.assert_agree(f"{workload.name}: loss", loss / expected, torch.ones(()), 1e-3)


def _ours(workload: Workload, options: Options) -> float:
    common.synchronize(options.device)
    begin = time.perf_counter()
    optimize_layer(workload.layer, workload.inputs)
    common.synchronize(options.device)
    return time.perf_counter() - begin


def _reference(
    workload: Workload, grid: QuantGrid, learning_rate: float, steps: int, options: Options
) -> _Run:
    with torch.no_grad():
        targets = workload.forward(workload.inputs, workload.matrix)

    def optimized(steps: int) -> Tensor:
        return reference.optimize(
            workload.matrix,
            grid.scale,
            grid.zero_point,
            grid.qmin,
            grid.qmax,
            workload.inputs,
            targets,
            workload.forward,
            reference.ReferenceConfig(steps=steps, learning_rate=learning_rate),
            channel_dim=workload.channel_dim,
        )

    optimized(3)  # warms up
    common.synchronize(options.device)
    begin = time.perf_counter()
    codes = optimized(steps)
    common.synchronize(options.device)
    seconds = (time.perf_counter() - begin) * common.REFERENCE_STEPS / steps
    if steps < common.REFERENCE_STEPS:
        return _Run(learning_rate, seconds, None)
    error = workload.relative_error(_dequantized(codes, grid), workload.held_out)
    common.note(f"{workload.name}: reference at {learning_rate:g} {seconds:.0f} s, {error:.5f}")
    return _Run(learning_rate, seconds, error)


def _print(rows: list[dict[str, Any]]) -> None:
    header = ["layer", "nearest", "reference", "ours", "ours/nearest", "ours/reference"]
    header += ["reference s", "ours s", "speed-up", "objective"]
    keys = ["held_out_nearest", "held_out_reference", "held_out", "over_nearest", "over_reference"]
    table = [
        [
            row["name"],
            *(row[key] for key in keys),
            f"{'~' * row['extrapolated']}{row['reference_seconds']:.0f}",
            row["seconds"],
            f"{row['speedup']:.0f}",
            row["objective"],
        ]
        for row in rows
    ]
    title = "Held-out relative output error, and seconds a layer (~: extrapolated to 10,000 steps)"
    common.print_table(title, header, table)


def _layer_targets(workload: Workload, row: dict[str, Any]) -> list[Target]:
    targets = []
    if workload.most_of_nearest is not None:
        name = f"{workload.name}, held-out error over nearest's"
        targets.append(Target(name, row["over_nearest"], most=workload.most_of_nearest))
    if workload.least_speedup is not None:
        name = f"{workload.name}, times faster than the reference"
        targets.append(Target(name, row["speedup"], least=workload.least_speedup))
    if workload.most_of_reference is not None and row["over_reference"] is not None:
        name = f"{workload.name}, held-out error over the reference's"
        targets.append(Target(name, row["over_reference"], most=workload.most_of_reference))
    return targets


def _mean_targets(rows: list[dict[str, Any]]) -> list[Target]:
    """Over the transformer's layers, where all were measured."""
    if len(rows) < 4:
        return []
    speedup = common.geometric_mean([row["speedup"] for row in rows])
    targets = [Target("times faster than the reference, geometric mean", speedup, least=40)]
    errors = [row["over_reference"] for row in rows]
    if None not in errors:
        name = "held-out error over the reference's, geometric mean"
        targets.append(Target(name, common.geometric_mean(errors), most=1.0))
    return targets
