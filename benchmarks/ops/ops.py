"""The ops against plain PyTorch, eager and compiled, and against the memory's bandwidth."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Options, Target, Timing
from benchmarks.ops import candidates
from benchmarks.ops.candidates import COMPILED, EAGER, OURS, Candidate, Case
from benchmarks.workloads import shapes as workloads

_CHECKED_CALLS = 3
_WORKING_SET = 24  # bytes a weight of the step: weight, grad, v, two moments, weight_q
# On the CPU: least times eager and compiled PyTorch, most times the floor out of cache. On an H200
# from 2^24 weights on: least share of the copy's bandwidth, least times eager and compiled.
_CPU_EAGER, _CPU_COMPILED, _CPU_FLOOR = 10, 6, 1.8
_CUDA_SHARE, _CUDA_EAGER, _CUDA_COMPILED, _CUDA_WEIGHTS = 0.85, 8, 1.4, 1 << 24
_COPY, _MEMORY_COPY = "copy, same working set", "copy, out of cache"


@dataclass(frozen=True)
class Op:
    """What is timed. ``moved``: the bytes a weight that must be read and written in float32."""

    name: str
    moved: int
    candidates: Callable[[Case], dict[str, Candidate]]


_OPS = [
    Op("rounding_step_", 36, candidates.step_candidates),
    Op("soft_quantize", 12, candidates.forward_candidates),
    Op("soft_quantize forward + backward", 28, candidates.backward_candidates),
    Op("soft_quantize_with_grad", 20, candidates.with_grad_candidates),
]


def run(options: Options) -> tuple[list[dict[str, Any]], list[Target]]:
    """Rows and targets; prints the tables."""
    device = options.device
    shapes = workloads.CUDA_SHAPES if device.type == "cuda" else workloads.CPU_SHAPES
    shapes = [shape for shape in shapes if _fits(shape, device)]
    rows = []
    for op in _OPS:
        for shape in shapes[:2] if options.quick else shapes:
            common.note(f"{op.name} {shape[0]}x{shape[1]}")
            rows.append(_measure(op, shape, options))
    for op in _OPS:
        _print(op, [row for row in rows if row["op"] == op.name])
    return rows, _targets(rows) if device.type == "cpu" else _cuda_targets(rows)


def _fits(shape: tuple[int, int], device: torch.device) -> bool:
    needed = 256 * shape[0] * shape[1]  # all candidates keep their own state
    return device.type != "cuda" or needed < torch.cuda.mem_get_info(device)[0]


def _measure(op: Op, shape: tuple[int, int], options: Options) -> dict[str, Any]:
    numel, device = shape[0] * shape[1], options.device
    in_cache = _WORKING_SET * numel < common.cache_bytes(device)
    torch.compiler.reset()
    contenders = op.candidates(Case.make(*shape, device))
    _check(op, contenders)
    calls = {name: candidate.call for name, candidate in contenders.items()}
    calls[_COPY] = common.copier(_WORKING_SET * numel // 8, device)
    if in_cache:
        calls[_MEMORY_COPY] = common.copier(common.cache_bytes(device), device)
    timings = common.interleaved(calls, options)
    bandwidth = _WORKING_SET * numel / timings[_COPY].median
    memory_bandwidth = bandwidth
    if in_cache:
        memory_bandwidth = 8 * common.cache_bytes(device) / timings[_MEMORY_COPY].median
    fastest = _fastest(contenders, timings)
    ours = fastest[OURS]
    floor = 1e9 * op.moved / bandwidth
    return {
        "op": op.name,
        "shape": shape,
        "in_cache": in_cache,
        "seconds": {name: asdict(timing) for name, timing in timings.items()},
        "ns_per_weight": {family: 1e9 * t / numel for family, t in fastest.items()},
        "ratio_to_ours": {family: t / ours for family, t in fastest.items()},
        "bytes_per_weight": op.moved,
        "copy_bandwidth": bandwidth,
        "copy_bandwidth_out_of_cache": memory_bandwidth,
        "floor_ns_per_weight": floor,
        "floor_ns_per_weight_out_of_cache": 1e9 * op.moved / memory_bandwidth,
        "ours_over_floor": 1e9 * ours / numel / floor,
    }


def _check(op: Op, candidates: dict[str, Candidate]) -> None:
    """All candidates agree, after some calls where these change something."""
    for candidate in candidates.values():
        for _ in range(_CHECKED_CALLS):
            candidate.call()
    expected = next(c for c in candidates.values() if c.family == EAGER).results()
    for name, candidate in candidates.items():
        for got, want in zip(candidate.results(), expected, strict=True):
            tolerance = 1e-2 if got.dtype == torch.bfloat16 else 2e-5
            common.assert_agree(f"{op.name}: {name}", got.detach(), want.detach(), tolerance)


def _fastest(candidates: dict[str, Candidate], timings: dict[str, Timing]) -> dict[str, float]:
    best: dict[str, float] = {}
    for name, candidate in candidates.items():
        seconds = timings[name].median
        best[candidate.family] = min(seconds, best.get(candidate.family, seconds))
    return best


def _print(op: Op, rows: list[dict[str, Any]]) -> None:
    table: list[list[object]] = []
    for row in rows:
        shape = f"{row['shape'][0]}x{row['shape'][1]}"
        numel = row["shape"][0] * row["shape"][1]
        for name, seconds in row["seconds"].items():
            if name in (_COPY, _MEMORY_COPY):
                continue
            times = [1e9 * seconds[key] / numel for key in ("median", "p20", "p80")]
            ratio = times[0] / row["ns_per_weight"][OURS]
            table.append([f"{shape}  {name}", *times, ratio])
        where = "in cache" if row["in_cache"] else "out of cache"
        floor = row["floor_ns_per_weight"]
        copied = f"{row['copy_bandwidth'] / 1e9:.1f} GB/s"
        name = f"{shape}  floor {where}, {copied}"
        table.append([name, floor, None, None, 1 / row["ours_over_floor"]])
        if row["in_cache"]:
            floor = row["floor_ns_per_weight_out_of_cache"]
            copied = f"{row['copy_bandwidth_out_of_cache'] / 1e9:.1f} GB/s"
            name = f"{shape}  floor if out of cache, {copied}"
            table.append([name, floor, None, None, floor / row["ns_per_weight"][OURS]])
    title = f"{op.name}: ns a weight; floor: {op.moved} bytes a weight at a copy's bandwidth"
    common.print_table(title, ["", "median", "p20", "p80", "over ours"], table)


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    targets = []
    for row in rows:
        if row["op"] != "rounding_step_":
            continue
        name = f"step {row['shape'][0]}x{row['shape'][1]}"
        ratios = row["ratio_to_ours"]
        targets.append(Target(f"{name}, fastest eager over ours", ratios[EAGER], least=_CPU_EAGER))
        fused = f"{name}, fastest compiled with fused Adam over ours"
        targets.append(Target(fused, ratios[COMPILED], least=_CPU_COMPILED))
        if not row["in_cache"]:
            floor = row["ours_over_floor"]
            targets.append(Target(f"{name}, ours over floor", floor, most=_CPU_FLOOR))
    return targets


def _cuda_targets(rows: list[dict[str, Any]]) -> list[Target]:
    targets = []
    for row in rows:
        numel = row["shape"][0] * row["shape"][1]
        if row["op"] not in ("rounding_step_", "soft_quantize") or numel < _CUDA_WEIGHTS:
            continue
        name = f"{row['op']} {row['shape'][0]}x{row['shape'][1]}"
        share = 1 / row["ours_over_floor"]
        targets.append(Target(f"{name}, share of a copy's bandwidth", share, least=_CUDA_SHARE))
        if row["op"] == "rounding_step_":
            ratios = row["ratio_to_ours"]
            eager, compiled = ratios[EAGER], ratios[COMPILED]
            targets.append(Target(f"{name}, eager over ours", eager, least=_CUDA_EAGER))
            fused = f"{name}, compiled with fused Adam over ours"
            targets.append(Target(fused, compiled, least=_CUDA_COMPILED))
    return targets
