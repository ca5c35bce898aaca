"""Leaks: what stays behind after 1,000 calls of optimize_layer, and quantize_ with files.

The calls differ in layers, sizes and settings, and some raise. Each kind runs in a process of its
own, with its own folder for temporary files. What stays is the mean over the last third of all
readings less that over the first third, after calls that load libraries and see every size once:
safetensors keeps a type of ctypes for each size that it writes.

oneDNN keeps what it compiled, and weights it reordered, by their shapes: up to 1,024 of each, so
memory goes on growing for hundreds of calls with new shapes. Both caches are off here; memory with
them, as it is by default, is given beside it.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, optimize_layer, quantize_
from benchmarks import common
from benchmarks.common import Options, Target
from benchmarks.model.census import NAMES, census

# By kind: calls before the first reading, calls in all, and calls between readings.
_PLAN = {"optimize_layer": (100, 1100, 10), "quantize_": (60, 96, 1)}
_QUICK = {"optimize_layer": (50, 100, 5), "quantize_": (30, 42, 1)}
# Of objects a few are our own: what holds the readings.
_MOST = dict.fromkeys(NAMES, 0) | {"memory": 1 << 19, "objects": 2}
_WITHOUT_CACHES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "0", "LRU_CACHE_CAPACITY": "1"}
_FEW: dict[str, Any] = {"steps": 20, "search_steps": 20, "scale_candidates": 3}


def run(options: Options) -> tuple[dict[str, Any], list[Target]]:
    """Readings and targets; prints the table."""
    results: dict[str, Any] = {}
    targets: list[Target] = []
    rows = []
    for kind, plan in (_QUICK if options.quick else _PLAN).items():
        common.note(f"leaks {kind}, {plan[1]} calls")
        measured = _in_process(kind, plan, options, _WITHOUT_CACHES)
        stays = {name: _stays(measured["readings"][name]) for name in NAMES}
        common.note(f"leaks {kind}, with oneDNN's caches")
        default = _in_process(kind, plan, options, {})["readings"]["memory"]
        results[kind] = measured | {"stays": stays, "memory_with_caches": default}
        for name in NAMES:
            what = "bytes of memory" if name == "memory" else name
            targets.append(Target(f"{kind}, {what} that stay", stays[name], most=_MOST[name]))
            values = measured["readings"][name]
            rows.append([f"{kind}, {name}", str(values[0]), str(values[-1]), stays[name]])
        rows.append([f"{kind}, memory with caches", str(default[0]), str(default[-1]),
                     _stays(default)])  # fmt: skip
    header = ["", "first reading", "last reading", "last third less first third"]
    common.print_table("What stays behind", header, rows)
    return results, targets


def _stays(values: list[int]) -> float:
    third = max(1, len(values) // 3)
    return mean(values[-third:]) - mean(values[:third])


def _in_process(
    kind: str, plan: tuple[int, int, int], options: Options, environment: dict[str, str]
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "benchmarks.model.leaks", kind, *map(str, plan)]
        done = subprocess.run(
            [*command, options.device.type],
            cwd=common.FOLDER.parent,
            env=os.environ | environment | {"TMPDIR": folder},
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def _measured(kind: str, start: int, calls: int, every: int, device: str) -> dict[str, Any]:
    one = {"optimize_layer": layer_call, "quantize_": model_call}[kind]
    draw = random.Random(0)
    torch.manual_seed(0)
    readings: list[tuple[int, ...]] = []  # of plain numbers, which are no objects to count
    raised = 0
    for number in range(calls):
        raised += not one(number, draw, torch.device(device))
        if number >= start and (number - start) % every == 0:
            readings.append(census())
    by_name = dict(zip(NAMES, map(list, zip(*readings, strict=True)), strict=True))
    return {"calls": calls, "raised": raised, "every": every, "readings": by_name}


def succeeds(call: Callable[[], object]) -> bool:
    """Whether a call returns; what it raises is dropped, as a caller's handler would."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError):
        return False
    return True


def layer_call(number: int, draw: random.Random, device: torch.device) -> bool:
    """One of many kinds of calls of optimize_layer; whether it returned."""
    rows, cols, samples = draw.randint(1, 24), 4 * draw.randint(1, 12), draw.randint(20, 80)
    layer = nn.Linear(cols, rows).to(device)
    conv = nn.Conv2d(4, rows, draw.randint(1, 3), padding=1).to(device)
    up = nn.ConvTranspose2d(4, 2 * rows, 3, groups=2).to(device)
    half, single = nn.Linear(cols, rows).to(device, torch.float16), nn.Linear(cols, 1).to(device)
    x = torch.randn(samples, cols, device=device)
    image = torch.randn(4, 4, draw.randint(5, 9), 7, device=device)
    y = (layer(x) + 0.1).detach()
    grouped = {"granularity": "per_group", "group_size": 4, "symmetric": False}

    def batches(fails: bool = False) -> Iterator[Tensor]:
        yield from x.split(16)
        if fails:
            raise RuntimeError("the disk is gone")

    kinds: list[Callable[[], object]] = [
        lambda: optimize_layer(layer, x, **_FEW),
        lambda: optimize_layer(layer, x, preset="fast", bits=2),
        lambda: optimize_layer(layer, batches(), preset="best", **_FEW),
        lambda: optimize_layer(layer, x, y, bias="refit", **_FEW),
        lambda: optimize_layer(layer, x, y, **grouped, **_FEW),
        lambda: optimize_layer(layer, x, granularity="per_tensor", **_FEW),
        lambda: optimize_layer(layer, x, activation="relu", batch_size=8, **_FEW),
        lambda: optimize_layer(layer, x, products="bfloat16", **_FEW),
        lambda: optimize_layer(half, x.half(), **_FEW),
        lambda: optimize_layer([layer, single], x, **_FEW),
        lambda: optimize_layer(conv, image, **_FEW),
        lambda: optimize_layer(up, image, **_FEW),
        # These raise: at once, in the middle of the data, or of the solver's own checks.
        lambda: optimize_layer(nn.LayerNorm(cols), x),
        lambda: optimize_layer(layer, x / 0, **_FEW),
        lambda: optimize_layer(layer, batches(fails=True), **_FEW),
        lambda: optimize_layer(layer, x, granularity="per_group", group_size=cols + 1),
        lambda: optimize_layer(layer, x, activation="relu", batch_size=8, targets=y[:-1], **_FEW),
        lambda: optimize_layer(layer, 1e25 * x, activation="relu", batch_size=8, **_FEW),
    ]
    return succeeds(kinds[number % len(kinds)])


def model_call(number: int, draw: random.Random, device: torch.device) -> bool:
    """One of several kinds of calls of quantize_, with activations in files."""
    width = draw.randint(4, 12)
    model = nn.Sequential(
        nn.Sequential(nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU()),
        nn.Sequential(nn.Conv2d(width, 8, 3), nn.ReLU(), nn.Flatten()),
        nn.Linear(128, 5),
    ).to(device)
    kinds: list[dict[str, Any]] = [
        {},
        {"mode": "parallel"},
        {"activations": ActivationConfig(), "equalize": True},
        {"activation_aware": True, "steps": 10, "batch_size": 4},
        {"fails": True},
        {"cache_dtype": torch.bfloat16},
    ]
    settings = dict(kinds[number % len(kinds)])
    fails = settings.pop("fails", False)

    def fail(*_: object) -> None:
        if fails:
            raise RuntimeError("the network is gone")

    def call() -> None:
        with tempfile.TemporaryDirectory() as folder:
            batches = (torch.randn(8, 3, 8, 8, device=device) for _ in range(3))
            arguments = {"memory_budget": 0, "cache_dir": folder, "progress": False}
            checkpoint = Path(folder) / "checkpoint"
            model[2].register_forward_hook(fail)
            quantize_(
                model, batches, preset="fast", checkpoint_dir=str(checkpoint), **arguments,
                **settings,
            )  # fmt: skip

    return succeeds(call)


if __name__ == "__main__":
    kind, start, calls, every, device = sys.argv[1:]
    print(json.dumps(_measured(kind, int(start), int(calls), int(every), device)))
