"""quantize_ with and without room for what it keeps within a block: how much sooner is it done?

The MiniLM encoder, every run in a process of its own. Without any memory_budget all is computed
again, and recordings of blocks go to files; runs with and without take turns, medians are compared.

    python -m benchmarks reuse [--presets fast] [--rounds 5] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import hashlib
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from adaround_ext import quantize_
from adaround_ext.replay.cache import MEMORY_BUDGET
from benchmarks import common
from benchmarks.common import Target
from benchmarks.model import measured
from benchmarks.workloads import minilm

_BUDGETS = {"without": 0, "with": MEMORY_BUDGET}


def quantized(meter: measured.Meter, *, preset: Any, budget: int) -> dict[str, Any]:
    """One run, with a digest of all codes and parameters. For a process of its own."""
    model, tokenizer = minilm.load_encoder()
    batches = minilm.text_batches(tokenizer)
    with torch.no_grad():
        model(**batches[0])
    with meter:
        report = quantize_(model, batches, preset=preset, memory_budget=budget, progress=False)
    digest = hashlib.sha256()
    for tensor in minilm.quantized_state(model).values():
        digest.update(tensor.numpy().tobytes())
    return {"digest": digest.hexdigest(), **measured.summary(report)}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks reuse")
    parser.add_argument("--presets", nargs="+", default=["fast"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    facts = common.machine_facts(torch.device("cpu"))
    rows: list[dict[str, Any]] = []
    for preset in options.presets:
        for index in range(options.rounds):
            for room, budget in _BUDGETS.items():
                run = measured.run("benchmarks.model.reuse:quantized", preset=preset, budget=budget)
                parts = run.result["seconds_by_part"]
                common.note(f"round {index}, {preset}, {room} room: {run.seconds:.1f} s, {parts}")
                row = {"preset": preset, "room": room, "seconds": run.seconds}
                rows.append(row | {"peak_mb": run.peak_mb} | run.result)
    table, targets = [], []
    for preset in options.presets:
        of_preset = [row for row in rows if row["preset"] == preset]
        different = len({row["digest"] for row in of_preset})
        targets.append(Target(f"{preset}, different results", different, most=1))
        for room in _BUDGETS:
            same = [row for row in of_preset if row["room"] == room]
            forward = statistics.median(row["seconds_by_part"]["forward"] for row in same)
            seconds = statistics.median(row["seconds"] for row in same)
            peak = statistics.median(row["peak_mb"] for row in same)
            table.append([f"{preset} {room}", same[0]["passes"], forward, seconds, peak])
    common.print_table(
        "MiniLM, with and without room for what is kept within a block (medians)",
        ["preset, room", "passes", "forward s", "all s", "peak MB"],
        table,
    )
    common.conclude(options.output, "reuse", facts, rows, targets)
