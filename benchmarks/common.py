"""Common to all benchmarks: the machine, fair timing, agreement, targets, JSON and tables."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaround_ext import build_info

FOLDER = Path(__file__).parent
REFERENCE_STEPS = 10_000
QUICK_REFERENCE_STEPS = 50
_SAMPLE_SECONDS = 0.02  # a timed sample is at least this long, in as many calls as that takes


@dataclass(frozen=True)
class Options:
    """Options of the command line; empty where it leaves the choice to the benchmark.

    shapes: of the benchmark layer. bits and the following: of the benchmark quality.
    """

    device: torch.device
    quick: bool = False
    reference_steps: int = REFERENCE_STEPS
    shapes: tuple[str, ...] = ()
    bits: tuple[int, ...] = ()
    parts: tuple[str, ...] = ()
    blocks: tuple[int, ...] = ()
    methods: tuple[str, ...] = ()
    reference_rows: int = 48
    peers: Path | None = None


@dataclass(frozen=True)
class Timing:
    """Seconds a call: quantiles over ``samples``, each the mean of ``calls`` in a row."""

    p20: float
    median: float
    p80: float
    samples: int
    calls: int


@dataclass(frozen=True)
class Target:
    """A number that was promised, and the one that was measured."""

    name: str
    value: float
    least: float | None = None
    most: float | None = None

    @property
    def holds(self) -> bool:
        above = self.least is None or self.value >= self.least
        return above and (self.most is None or self.value <= self.most)

    def __str__(self) -> str:
        bound = f"at least {self.least:g}" if self.most is None else f"at most {self.most:g}"
        return f"{'holds ' if self.holds else 'MISSED'}  {self.name}: {self.value:.3g} ({bound})"


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(call: Callable[[], object], device: torch.device, calls: int = 1) -> float:
    """Mean seconds of ``calls`` calls in a row: by the wall clock, on CUDA by events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        for _ in range(calls):
            call()
        end.record()
        end.synchronize()
        return float(start.elapsed_time(end)) / 1e3 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        call()
    return (time.perf_counter() - begin) / calls


def interleaved(
    candidates: Mapping[str, Callable[[], object]], options: Options
) -> dict[str, Timing]:
    """Times candidates round-robin, so that all see the same machine.

    Before each sample comes an untimed call, so that a candidate finds its own data in the cache
    where that fits, as it does in a loop.
    """
    device = options.device
    calls = {}
    for name, call in candidates.items():
        seconds_of(call, device, 2)
        calls[name] = max(1, round(_SAMPLE_SECONDS / max(seconds_of(call, device), 1e-7)))
    samples: dict[str, list[float]] = {name: [] for name in candidates}
    least, most, budget = (3, 5, 2.0) if options.quick else (7, 25, 10.0)
    if device.type == "cuda":  # whose times hardly vary, and whose hours are dear
        budget = 1.0
    begin = time.perf_counter()
    for done in range(most):
        if done >= least and time.perf_counter() - begin > budget:
            break
        for name, call in candidates.items():
            call()
            samples[name].append(seconds_of(call, device, calls[name]))
    return {name: _timing(values, calls[name]) for name, values in samples.items()}


def _timing(values: list[float], calls: int) -> Timing:
    deciles = statistics.quantiles(values, n=10, method="inclusive")
    return Timing(deciles[1], statistics.median(values), deciles[7], len(values), calls)


def copier(numel: int, device: torch.device) -> Callable[[], object]:
    """Copies ``numel`` float32: 4 numel bytes read and as many written."""
    source = torch.ones(numel, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source)


def assert_agree(name: str, got: Tensor, expected: Tensor, tolerance: float) -> None:
    """Equal within ``tolerance`` (1 + |expected|) but for one value in 100,000.

    Those few: where a gradient nearly cancels, Adam's first steps turn its last bit into a step.
    """
    far = (got.float() - expected.float()).abs() > tolerance * (1 + expected.float().abs())
    share = float(far.float().mean())
    if not share <= 1e-5 or not bool(torch.isfinite(got).all()):
        raise AssertionError(f"{name} differs from the reference in {share:.2%} of the values")


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean and its standard error, which is 0 for one value."""
    if len(values) == 1:
        return values[0], 0.0
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def geometric_mean(values: Sequence[float]) -> float:
    return statistics.geometric_mean(values)


def cache_bytes(device: torch.device) -> int:
    """Size of the last cache before the memory; 0 where unknown."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = re.fullmatch(r"(\d+)([KM]?)", path.read_text().strip()).groups()  # type: ignore[union-attr]
        sizes.append(int(number) * {"": 1, "K": 1 << 10, "M": 1 << 20}[unit])
    return max(sizes)


def machine_name(device: torch.device) -> str:
    if device.type == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name(device).lower()).strip("-")
    return f"cpu-{_cores()}core"


def machine_facts(device: torch.device) -> dict[str, Any]:
    """Everything that a reader needs to judge the numbers."""
    info = build_info()
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "name": machine_name(device),
        "cpu": _cpu_model(),
        "cores": _cores(),
        "torch_threads": torch.get_num_threads(),
        "cache_bytes": cache_bytes(device),
        "gpu": gpu,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "adaround_ext": info["version"],
        "compiler": info["compiler"],
        "instruction_set": info["instruction_set"],
        "commit": _git("rev-parse", "HEAD"),
        "commit_is_clean": _git("status", "--porcelain", "--untracked-files=no") == "",
        "load_average_at_start": os.getloadavg()[0],
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def status_bytes(name: str) -> int:
    """A size that the system gives for this process."""
    match = re.search(rf"{name}:\s*(\d+) kB", Path("/proc/self/status").read_text())
    if match is None:
        raise RuntimeError(f"/proc/self/status has no {name}")
    return 1024 * int(match.group(1))


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _cpu_model() -> str:
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return match.group(1) if match else platform.processor()


def _git(*arguments: str) -> str | None:
    command = ["git", "-C", str(FOLDER), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def document(
    bench: str, options: Options, facts: dict[str, Any], results: object, targets: list[Target]
) -> dict[str, Any]:
    """One benchmark's results as plain values."""
    return {
        "bench": bench,
        "quick": options.quick,
        "machine": facts,
        "targets": [asdict(target) | {"holds": target.holds} for target in targets],
        "results": results,
    }


def conclude(
    path: Path | None,
    bench: str,
    facts: dict[str, Any],
    results: object,
    targets: list[Target],
    **more: object,
) -> None:
    """Prints targets; given a path, writes the document of a benchmark on the CPU, and ``more``."""
    print_targets(targets)
    if path is not None:
        options = Options(torch.device("cpu"))
        write_json(path, document(bench, options, facts, results, targets) | more)


def write_json(path: Path, values: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(values, indent=1) + "\n")
    note(f"wrote {path}")


def note(text: str) -> None:
    """What is going on, beside the results."""
    print(text, file=sys.stderr, flush=True)


def print_table(title: str, header: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Aligned columns; the first to the left, the others to the right."""
    cells = [list(header), *([_cell(value) for value in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    print(f"\n{title}")
    for row in cells:
        rest = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        print("  ".join([row[0].ljust(widths[0]), *rest]).rstrip())


def print_targets(targets: Sequence[Target]) -> None:
    for target in targets:
        print(target)


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:.0f}"
    return str(value)
