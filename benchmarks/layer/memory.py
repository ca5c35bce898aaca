"""Peak memory of optimize_layer's Gram path: it does not grow with the number of samples.

Each point is a fresh process, fed by a generator that makes a batch at a time. On the CPU it is run
twice: where malloc returns what is freed at once, which shows what is held, and as malloc is by
default, where freed pieces stay with the process and the peak depends on how they are reused.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext import optimize_layer
from benchmarks import common
from benchmarks.common import Options, Target

_FACTORS = (1, 4, 16)
_RETURN_AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
_BATCHES = 32  # at 1x: some times what the statistics gather before they multiply
_STEPS = 20  # memory does not depend on them
_MOST_GROWTH = 1.1


def run(options: Options) -> tuple[list[dict[str, Any]], list[Target]]:
    """Rows and targets; prints the table."""
    factors = _FACTORS[:2] if options.quick else _FACTORS
    rows = []
    for kind in ("linear", "conv"):
        for factor in factors:
            common.note(f"memory {kind} {factor}x")
            row = _point_in_process(kind, factor, options, _RETURN_AT_ONCE)
            if options.device.type == "cpu":
                default = _point_in_process(kind, factor, options, {})
                row["peak_mb_default_malloc"] = default["peak_mb"]
            rows.append(row)
    common.print_table(
        "Peak memory above the start, by number of calibration samples",
        ["layer", "samples", "data MB", "peak MB", "with default malloc MB"],
        [
            [
                f"{row['layer']} {row['factor']}x",
                row["samples"],
                row["data_mb"],
                row["peak_mb"],
                row.get("peak_mb_default_malloc"),
            ]
            for row in rows
        ],
    )
    targets = []
    for kind in ("linear", "conv"):
        peaks = [row["peak_mb"] for row in rows if row["layer"] == kind]
        name = f"{kind}, peak memory at {factors[-1]}x over that at 1x"
        targets.append(Target(name, peaks[-1] / peaks[0], most=_MOST_GROWTH))
    return rows, targets


def _point_in_process(
    kind: str, factor: int, options: Options, environment: dict[str, str]
) -> dict[str, Any]:
    command = [sys.executable, "-m", "benchmarks.layer.memory", kind, str(factor)]
    done = subprocess.run(
        [*command, options.device.type],
        cwd=common.FOLDER.parent,
        env=os.environ | environment,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _point(kind: str, factor: int, device: torch.device) -> dict[str, Any]:
    torch.manual_seed(0)
    layer: nn.Module = nn.Linear(768, 768, device=device)
    shape: tuple[int, ...] = (1024, 768)
    if kind == "conv":
        layer, shape = nn.Conv2d(64, 64, 3, padding=1, device=device), (4, 64, 28, 28)

    def batches(count: int) -> Iterator[Tensor]:
        for _ in range(count):
            yield torch.randn(shape, device=device)

    optimize_layer(layer, batches(1), objective="gram", steps=1)  # libraries, thread pools
    before = _start_of_peak(device)
    result = optimize_layer(layer, batches(_BATCHES * factor), objective="gram", steps=_STEPS)
    return {
        "layer": kind,
        "factor": factor,
        "samples": result.report.samples,
        "data_mb": 4 * _BATCHES * factor * torch.Size(shape).numel() / 1e6,
        "before_mb": before / 1e6,
        "peak_mb": (_peak(device) - before) / 1e6,
    }


def _start_of_peak(device: torch.device) -> int:
    """Forgets the peak so far; bytes in use now."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.memory_allocated(device)
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM to VmRSS
    return common.status_bytes("VmRSS")


def _peak(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return common.status_bytes("VmHWM")


if __name__ == "__main__":
    print(json.dumps(_point(sys.argv[1], int(sys.argv[2]), torch.device(sys.argv[3]))))
