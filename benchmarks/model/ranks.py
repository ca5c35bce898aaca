"""quantize_ on several ranks: are the codes those of one process, and how much faster is it?

The MiniLM encoder, every run in processes of its own under gloo, each rank on one core with one
thread. One process on one core and the ranks take turns, and the medians are compared; seconds are
those of the call, without starting processes and loading the model.

    python -m benchmarks ranks [--preset balanced] [--rounds 3] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from adaround_ext import quantize_
from benchmarks import common
from benchmarks.common import Target
from benchmarks.workloads import minilm

_WORLDS = (1, 2, 4)
_LEAST_SPEEDUP = 1.7  # of two ranks on two cores


def child(rank: int, world: int, store: str, preset: str, reduction: Any) -> None:
    """One rank; prints seconds and a digest of all codes and parameters."""
    cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, {cores[rank % len(cores)]})
    torch.set_num_threads(1)
    model, tokenizer = minilm.load_encoder()
    batches = minilm.text_batches(tokenizer)
    group = None
    if world > 1:
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
        group = dist.group.WORLD
        dist.barrier()
    started = time.perf_counter()
    report = quantize_(
        model, batches, preset=preset, process_group=group, reduction=reduction, progress=False
    )
    seconds = time.perf_counter() - started
    digest = hashlib.sha256()
    for tensor in minilm.quantized_state(model).values():
        digest.update(tensor.numpy().tobytes())
    parts = {name: report.seconds[name] for name in ("forward", "statistics", "solving")}
    print(json.dumps({"seconds": seconds, "digest": digest.hexdigest(), "parts": parts}))
    if world > 1:
        dist.destroy_process_group()


def run(world: int, preset: str, reduction: str) -> dict[str, Any]:
    """All ranks of one run; the first one's seconds, and the digests of all."""
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        processes = [
            subprocess.Popen(
                [sys.executable, "-m", "benchmarks.model.ranks",
                 *map(str, (rank, world, store, preset, reduction))],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE,
                text=True,
            )
            for rank in range(world)
        ]  # fmt: skip
        texts = [process.communicate()[0] for process in processes]
    if any(process.returncode for process in processes):
        raise RuntimeError(f"a rank of {world} failed")
    outcomes = [json.loads(text.strip().splitlines()[-1]) for text in texts]
    return outcomes[0] | {"digests": sorted({one["digest"] for one in outcomes})}


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks ranks")
    parser.add_argument("--preset", default="balanced")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    facts = common.machine_facts(torch.device("cpu"))
    rows = []
    for index in range(options.rounds):
        for world in _WORLDS:
            row = {"ranks": world, **run(world, options.preset, "ordered")}
            common.note(f"round {index}, {world} ranks: {row['seconds']:.1f} s, {row['parts']}")
            rows.append(row)
    medians = {
        world: statistics.median(row["seconds"] for row in rows if row["ranks"] == world)
        for world in _WORLDS
    }
    common.print_table(
        f"MiniLM, preset {options.preset}, a core and a thread a rank",
        ["ranks", "seconds", "times faster"],
        [[str(world), seconds, medians[1] / seconds] for world, seconds in medians.items()],
    )
    digests = {digest for row in rows for digest in row["digests"]}
    targets = [
        Target("different results over all runs and ranks", len(digests), most=1),
        Target("2 ranks on 2 cores, times faster", medians[1] / medians[2], least=_LEAST_SPEEDUP),
    ]
    common.conclude(
        options.output, "ranks", facts, rows, targets, preset=options.preset, medians=medians
    )


if __name__ == "__main__":
    child(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
