"""quantize_ on a decoder that does not fit into memory: its weights in shards, mapped.

A child process makes the model without data, maps the shards, and quantizes all layers with results
in files, inside a memory cgroup whose limit is a fraction of the weights (the limit counts pages of
mapped files too, but those can be dropped). Without the right to make a cgroup there is no limit,
and the memory that no file backs is what counts. The solver is the cheapest, rounding to nearest:
what is measured is memory.

    python -m benchmarks larger_than_memory [--layers 160] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from adaround_ext import map_weights_, quantize_
from benchmarks import common
from benchmarks.common import Target, status_bytes
from benchmarks.workloads.decoder import llama_shaped

_CGROUPS = Path("/sys/fs/cgroup/memory")
_SHAPE = {"hidden": 512, "intermediate": 1408, "heads": 8, "kv_heads": 4, "vocabulary": 8192}
_SHARE = 0.4  # of the weights, which the limit allows
_TOKENS = (2, 8, 32)  # batches, sequences, length


def write_shards(layers: int, folder: Path) -> int:
    """The model's weights in files, a few layers each; their bytes."""
    model = llama_shaped(layers=layers, **_SHAPE)
    tensors = dict(model.state_dict())
    names = list(tensors)
    count = -(-len(names) // 40)
    for shard in range(count):
        weights = {name: tensors[name] for name in names[shard * 40 : (shard + 1) * 40]}
        save_file(weights, folder / f"model-{shard + 1:05d}-of-{count:05d}.safetensors")
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def child(layers: int, shards: str, offload: str, cgroup: str) -> None:
    """Quantizes the mapped model; prints what was measured."""
    from accelerate import init_empty_weights

    if cgroup:
        Path(cgroup, "cgroup.procs").write_text(str(os.getpid()))
    with init_empty_weights():
        model = llama_shaped(layers=layers, **_SHAPE)
    map_weights_(model, shards)
    tokens = torch.randint(0, _SHAPE["vocabulary"], _TOKENS)
    before = status_bytes("RssAnon")
    peak = _Peak()
    started = time.perf_counter()
    report = quantize_(
        model, [{"input_ids": batch} for batch in tokens], preset="fast", starts=("nearest",),
        search_steps=0, refine=False, scale="min_max", bias="keep", offload_dir=offload,
        memory_budget=1 << 26, cache_dir=offload, progress=False,
    )  # fmt: skip
    seconds = time.perf_counter() - started
    measured: dict[str, Any] = {
        "seconds": seconds,
        "layers": len(report.layers),
        "anonymous_before": before,
        "anonymous_peak": peak.stop(),
    }
    if cgroup:
        for name in ("limit_in_bytes", "max_usage_in_bytes", "failcnt"):
            measured[name] = int(Path(cgroup, f"memory.{name}").read_text())
    print(json.dumps(measured))


class _Peak(threading.Thread):
    """Watches the memory that no file backs, ten times a second."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self._most = 0
        self._done = threading.Event()
        self.start()

    def run(self) -> None:
        while not self._done.wait(0.1):
            self._most = max(self._most, status_bytes("RssAnon"))

    def stop(self) -> int:
        self._done.set()
        self.join()
        return self._most


@contextmanager
def limited(size: int) -> Iterator[str]:
    """A memory cgroup with this limit; an empty name where none can be made."""
    folder = _CGROUPS / f"adaround_ext_{os.getpid()}"
    try:
        folder.mkdir()
        (folder / "memory.limit_in_bytes").write_text(str(size))
    except OSError as error:
        common.note(f"no limit of memory: {error}")
        yield ""
        return
    try:
        yield str(folder)
    finally:
        folder.rmdir()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks larger_than_memory")
    parser.add_argument("--layers", type=int, default=160)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    facts = common.machine_facts(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name:
        shards, offload = Path(name, "shards"), Path(name, "offload")
        shards.mkdir()
        offload.mkdir()
        size = write_shards(options.layers, shards)
        with limited(int(size * _SHARE)) as cgroup:
            command = [sys.executable, "-m", "benchmarks.model.larger_than_memory"]
            command += [str(options.layers), str(shards), str(offload), cgroup]
            # Freed memory goes back at once: what counts is what is held.
            environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": str(1 << 17)}
            done = subprocess.run(
                command, env=environment, stdout=subprocess.PIPE, text=True, check=True
            )
    row = json.loads(done.stdout.strip().splitlines()[-1]) | {"weights": size}
    share = row["anonymous_peak"] / size
    targets = [Target("memory that no file backs, of the weights", share, most=_SHARE)]
    if "limit_in_bytes" in row:
        limit = row["limit_in_bytes"] / size
        targets.append(Target("limit of all memory, of the weights", limit, most=_SHARE))
    for key, value in row.items():
        print(f"{key}: {value if isinstance(value, float) else format(value, ',')}")
    common.conclude(options.output, "larger_than_memory", facts, [row], targets)


if __name__ == "__main__":
    child(int(sys.argv[1]), *sys.argv[2:])
