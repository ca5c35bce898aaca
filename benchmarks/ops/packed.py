"""Packed weights: packing against a copy, packed_linear against PyTorch's own products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaround_ext import ops
from adaround_ext.ops import pack_bits, packed_linear, unpack_bits
from benchmarks import common
from benchmarks.common import Options, Target, Timing

_PACKED_SHAPE = (4096, 4096)
_PACKED_BITS = (2, 3, 4, 8)
_SHAPES = [(384, 384), (1536, 384), (4096, 4096), (11008, 4096)]
_POSITIONS = (1, 4, 16, 64, 256)
_CUDA_SHAPES, _CUDA_POSITIONS = _SHAPES[2:], (1, 16, 256)
_GROUP_SIZE, _ZERO_POINT = 128, 8
_FEW_POSITIONS = 16
_SLOW_POSITIONS = 4  # beyond, PyTorch's portable loops would take minutes
_COPY = "copy"
OURS, OURS_BFLOAT16 = "packed_linear", "packed_linear, bfloat16"
FLOAT, BFLOAT16 = "F.linear, float32 weight", "F.linear, bfloat16 weight"
IN_PARTS = "unpack, dequantize, F.linear"
INT4_FLOAT, INT4_BFLOAT16 = "torch int4, float32", "torch int4, bfloat16"
INT4_DYNAMIC = "torch int4, int8 activations"


@dataclass(frozen=True)
class Candidate:
    """A way to compute y, and how far it may be from the float32 product, in the 2-norm."""

    call: Callable[[], Tensor]
    tolerance: float


def run(options: Options) -> tuple[dict[str, list[dict[str, Any]]], list[Target]]:
    """Rows and targets; prints the tables."""
    packing = [_measure_packing(bits, options) for bits in _PACKED_BITS]
    linear = []
    cuda = options.device.type == "cuda"
    shapes, counts = (_CUDA_SHAPES, _CUDA_POSITIONS) if cuda else (_SHAPES, _POSITIONS)
    for shape in shapes[:2] if options.quick else shapes:
        for positions in counts[:3] if options.quick else counts:
            common.note(f"packed_linear {shape[0]}x{shape[1]}, {positions} positions")
            linear.append(_measure_linear(shape, positions, options))
    _print_packing(packing)
    _print_linear(linear)
    targets = _targets(linear) if options.device.type == "cpu" and not options.quick else []
    return {"packing": packing, "linear": linear}, targets


def _measure_packing(bits: int, options: Options) -> dict[str, Any]:
    rows, cols = _PACKED_SHAPE
    device = options.device
    codes = torch.randint(0, 2**bits, _PACKED_SHAPE, device=device).to(torch.uint8)
    packed = pack_bits(codes, bits, 0)
    if not torch.equal(unpack_bits(packed, bits, cols, 0), codes):
        raise AssertionError(f"{bits} bits do not come back")
    moved = codes.numel() + packed.numel()
    calls: dict[str, Callable[[], object]] = {
        "pack_bits": lambda: pack_bits(codes, bits, 0),
        "unpack_bits": lambda: unpack_bits(packed, bits, cols, 0),
        _COPY: common.copier(moved // 8, device),
    }
    timings = common.interleaved(calls, options)
    bandwidth = moved / timings[_COPY].median
    return {
        "shape": _PACKED_SHAPE,
        "bits": bits,
        "seconds": _seconds(timings),
        "bytes": moved,
        "copy_bandwidth": bandwidth,
        "codes_per_second": {
            name: rows * cols / timings[name].median for name in ("pack_bits", "unpack_bits")
        },
        "over_copy": {
            name: timings[name].median / timings[_COPY].median
            for name in ("pack_bits", "unpack_bits")
        },
    }


def _measure_linear(shape: tuple[int, int], positions: int, options: Options) -> dict[str, Any]:
    device = options.device
    candidates = _candidates(shape, positions, device)
    errors = _errors(candidates)
    calls: dict[str, Callable[[], object]] = {name: c.call for name, c in candidates.items()}
    packed_size = shape[0] * shape[1] // 2
    calls[_COPY] = common.copier(packed_size // 8, device)
    timings = common.interleaved(calls, options)
    bandwidth = packed_size / timings[_COPY].median
    moved = _bytes_moved(shape, positions)
    ours = timings[OURS].median
    return {
        "shape": shape,
        "positions": positions,
        "bits": 4,
        "group_size": _GROUP_SIZE,
        "float_weight_in_cache": 4 * shape[0] * shape[1] < common.cache_bytes(device),
        "seconds": _seconds(timings),
        "relative_error": errors,
        "ratio_to_ours": {name: timings[name].median / ours for name in candidates},
        "bytes": moved,
        "copy_bandwidth": bandwidth,
        "ours_over_floor": ours / (moved / bandwidth),
        "products_per_second": shape[0] * shape[1] * positions / ours,
    }


def _bytes_moved(shape: tuple[int, int], positions: int) -> int:
    """Codes, grids, x and y, each once."""
    rows, cols = shape
    return rows * cols // 2 + rows * cols // _GROUP_SIZE * 8 + 4 * positions * (rows + cols)


def _candidates(
    shape: tuple[int, int], positions: int, device: torch.device
) -> dict[str, Candidate]:
    generator = torch.Generator(device).manual_seed(0)
    rows, cols = shape
    codes = torch.randint(0, 16, shape, generator=generator, device=device).to(torch.uint8)
    scale = 1e-3 + 1e-2 * torch.rand(rows, cols // _GROUP_SIZE, generator=generator, device=device)
    zero_point = torch.full(scale.shape, _ZERO_POINT, dtype=torch.int32, device=device)
    x = torch.randn(positions, cols, generator=generator, device=device)
    grid = scale, zero_point
    weight, packed = ops.dequantize(codes, *grid), pack_bits(codes, 4, 0)
    weight_half, x_half = weight.bfloat16(), x.bfloat16()

    def in_parts() -> Tensor:
        return F.linear(x, ops.dequantize(unpack_bits(packed, 4, cols, 0), *grid))

    candidates = {
        FLOAT: Candidate(lambda: F.linear(x, weight), 0.0),
        OURS: Candidate(lambda: packed_linear(x, packed, *grid, None, 4, 0), 1e-5),
        IN_PARTS: Candidate(in_parts, 1e-5),
        OURS_BFLOAT16: Candidate(lambda: packed_linear(x_half, packed, *grid, None, 4, 0), 1e-2),
        BFLOAT16: Candidate(lambda: F.linear(x_half, weight_half), 1e-2),
    }
    if device.type == "cpu":
        candidates |= _torch_int4(codes, scale, x)
    return candidates


def _torch_int4(codes: Tensor, scale: Tensor, x: Tensor) -> dict[str, Candidate]:
    """PyTorch's int4 products on the CPU: w = (code - 8) scale + zero, here with zero = 0."""
    rows, cols = codes.shape
    aten = torch.ops.aten
    words = aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    grid = torch.stack([scale, torch.zeros_like(scale)], -1).transpose(0, 1).contiguous()
    grid_half, x_half = grid.bfloat16(), x.bfloat16()

    def product(x: Tensor, grid: Tensor) -> Tensor:
        return aten._weight_int4pack_mm_for_cpu(x, words, _GROUP_SIZE, grid)  # type: ignore[no-any-return]

    candidates = {INT4_BFLOAT16: Candidate(lambda: product(x_half, grid_half), 1e-2)}
    if len(x) > _SLOW_POSITIONS:
        return candidates
    pairs = (codes[:, ::2] | codes[:, 1::2] << 4).contiguous()
    dynamic = aten._dyn_quant_pack_4bit_weight(
        pairs, scale.bfloat16(), None, _GROUP_SIZE, cols, rows
    )
    candidates[INT4_FLOAT] = Candidate(lambda: product(x, grid), 1e-5)
    candidates[INT4_DYNAMIC] = Candidate(
        lambda: aten._dyn_quant_matmul_4bit(x, dynamic, _GROUP_SIZE, cols, rows), 2e-2
    )
    return candidates


def _errors(candidates: dict[str, Candidate]) -> dict[str, float]:
    """The distance of each from the float32 product, which must be within its tolerance."""
    expected = candidates[FLOAT].call()
    errors = {}
    for name, candidate in candidates.items():
        got = candidate.call().float()
        errors[name] = float((got - expected).norm() / expected.norm())
        if not errors[name] <= candidate.tolerance:
            raise AssertionError(f"{name} differs from the float32 product by {errors[name]:.1e}")
    return errors


def _seconds(timings: dict[str, Timing]) -> dict[str, dict[str, Any]]:
    return {name: asdict(timing) for name, timing in timings.items()}


def _print_packing(rows: list[dict[str, Any]]) -> None:
    table: list[list[object]] = []
    for row in rows:
        for name, rate in row["codes_per_second"].items():
            table.append([f"{name}, {row['bits']} bits", rate / 1e9, row["over_copy"][name]])
    title = f"packing {_PACKED_SHAPE[0]}x{_PACKED_SHAPE[1]} codes"
    common.print_table(title, ["", "10^9 codes/s", "over a copy of the bytes"], table)


def _print_linear(rows: list[dict[str, Any]]) -> None:
    table: list[list[object]] = []
    for row in rows:
        for name, ratio in row["ratio_to_ours"].items():
            where = f"{row['shape'][0]}x{row['shape'][1]}, {row['positions']}  {name}"
            seconds = row["seconds"][name]
            times = [1e3 * seconds[key] for key in ("median", "p20", "p80")]
            floor = row["ours_over_floor"] if name == OURS else None
            table.append([where, *times, ratio, floor])
    title = f"y = x W^T, W of 4 bits in groups of {_GROUP_SIZE}: rows x cols, positions; ms"
    header = ["", "median", "p20", "p80", "over ours", "over the bytes' copy"]
    common.print_table(title, header, table)


def _targets(rows: list[dict[str, Any]]) -> list[Target]:
    """For few positions, as when text is generated: many are no promise."""
    targets = []
    for row in rows:
        if row["positions"] > _FEW_POSITIONS:
            continue
        name = f"{row['shape'][0]}x{row['shape'][1]}, {row['positions']} positions"
        ratios = row["ratio_to_ours"]
        from_codes = min(ratios[c] for c in (IN_PARTS, INT4_FLOAT) if c in ratios)
        targets.append(Target(f"{name}, torch from packed codes over ours", from_codes, least=1))
        if not row["float_weight_in_cache"]:
            targets.append(Target(f"{name}, {FLOAT} over ours", ratios[FLOAT], least=1))
    return targets
