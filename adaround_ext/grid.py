"""Quantization grids: integer range, granularity and the search for scales."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext import ops
from adaround_ext.config import AdaRoundConfig
from adaround_ext.linalg.tiles import TileSize

# The search runs over tiles of about so many weights: it looks at each one for every share.
WEIGHTS_PER_TILE = TileSize(cpu=1 << 16, cuda=1 << 24)
# Shares of the min-max scale.
_COARSE = torch.linspace(0.2, 1.0, 41, dtype=torch.float32, device="cpu").tolist()
_FINE = [offset * 0.0025 for offset in range(-7, 8) if offset]


@dataclass(frozen=True)
class QuantGrid:
    """w_q = scale (clamp(code, qmin, qmax) - zero_point), eq. (22).

    scale float32 and zero_point int32, both [rows or 1, n_groups]: the columns of a row are cut
    into n_groups equal runs.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    def dequantize(self, codes: Tensor) -> Tensor:
        """The weights of codes [rows, cols], float32."""
        return ops.dequantize(codes, self.scale, self.zero_point)

    def stored(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """The same as a layer of ``dtype`` stores them."""
        return self.dequantize(codes).to(dtype)

    @staticmethod
    def join(grids: list[QuantGrid], rows: list[int]) -> QuantGrid:
        """One grid for matrices of ``rows[i]`` rows stacked, a row of scales a row of weights."""
        if len(grids) == 1:
            return grids[0]
        scale, zero_point = (
            torch.cat([getattr(g, name).expand(n, -1) for g, n in zip(grids, rows, strict=True)])
            for name in ("scale", "zero_point")
        )
        return QuantGrid(scale, zero_point, grids[0].qmin, grids[0].qmax)


def expand(values: Tensor, rows: int, cols: int) -> Tensor:
    """A scale or zero point [rows or 1, n_groups] for every weight, [rows, cols]."""
    of_columns = values[:, :, None].expand(-1, -1, cols // values.shape[1])
    return of_columns.reshape(len(values), cols).expand(rows, cols)


def quant_range(bits: int, symmetric: bool, narrow: bool = False) -> tuple[int, int]:
    """(qmin, qmax): [-2^(b-1), 2^(b-1) - 1] where symmetric, else [0, 2^b - 1].

    narrow: without the lowest code, so that a symmetric range has as many below 0 as above.
    """
    low, high = (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if symmetric else (0, (1 << bits) - 1)
    return low + narrow, high


def make_grid(weight: Tensor, config: AdaRoundConfig) -> QuantGrid:
    """The grid that ``config`` asks for, for float32 ``weight`` [rows, cols].

    "min_max": s = max|w| / qmax, or (max - min) / (qmax - qmin) with z = round(qmin - min / s).
    "mse": of 55 shares of that range the one with the least sum (w_q - w)^2 under rounding to
    nearest. "gram" starts from the best of 21 (scales.py). Scales are rounded to ``scale_dtype``
    first, and the one above the whole range is tried too where that has fewer digits than float32.
    A run of zeros gets scale 1. Raises ValueError where group_size does not divide the
    columns or a given scale does not fit.
    """
    rows, cols = weight.shape
    qmin, qmax = quant_range(config.bits, config.symmetric, config.narrow_range)
    runs = _runs(weight, config)
    if isinstance(config.scale, Tensor):
        scale = _given_scale(config.scale, rows, cols, config).to(weight.device)
        if scale.shape != (1, 1):
            scale = scale.expand(rows, -1)
        runs = weight.reshape(scale.numel(), -1)
        shape = scale.shape
        scale = scale.reshape(-1, 1).clone()  # never the caller's own
        low = runs.amin(1, keepdim=True).clamp(max=0)
        zero_point = _zero_point(low, scale, qmin, qmax, config.symmetric)
    else:
        shape = torch.Size((1, 1) if len(runs) == 1 else (rows, len(runs) // max(rows, 1)))
        tiles = runs.split(max(1, WEIGHTS_PER_TILE.on(weight.device) // max(runs.shape[1], 1)))
        grids = [_search(tile, qmin, qmax, config) for tile in tiles]
        scale = torch.cat([scale for scale, _ in grids])
        zero_point = torch.cat([zero_point for _, zero_point in grids])
    return QuantGrid(scale.view(shape), zero_point.to(torch.int32).view(shape), qmin, qmax)


def nearest_codes(weight: Tensor, grid: QuantGrid) -> Tensor:
    """Codes [rows, cols] of rounding w / s to nearest, ties to even."""
    # The zero point comes after: adding an odd one would turn ties to odd multiples of the scale.
    scale, zero_point = (expand(t, *weight.shape) for t in (grid.scale, grid.zero_point))
    return _codes((weight / scale).round() + zero_point, grid)


def baseline_codes(
    weight: Tensor, grid: QuantGrid, seed: int, first_row: int = 0
) -> dict[str, Tensor]:
    """Codes of the simple rules: "floor", "ceil" and "stochastic".

    stochastic is one draw in which a weight goes up with the probability of its fraction.
    first_row: of ``weight`` in the matrix for which numbers are drawn.
    """
    at = position(weight, grid)
    generator = torch.Generator(weight.device).manual_seed(seed)
    torch.rand(first_row, at.shape[1], generator=generator, dtype=torch.float32, device=at.device)
    drawn = torch.rand(at.shape, generator=generator, dtype=torch.float32, device=at.device)
    return {
        "floor": _codes(at.floor(), grid),
        "ceil": _codes(at.ceil(), grid),
        "stochastic": _codes((at + drawn).floor(), grid),
    }


def position(weight: Tensor, grid: QuantGrid) -> Tensor:
    """w / s + z: where each weight [rows, cols] lies on its grid."""
    scale, zero_point = (expand(t, *weight.shape) for t in (grid.scale, grid.zero_point))
    return weight / scale + zero_point


def _codes(values: Tensor, grid: QuantGrid) -> Tensor:
    return values.clamp(grid.qmin, grid.qmax).to(torch.int8 if grid.qmin < 0 else torch.uint8)


def _runs(weight: Tensor, config: AdaRoundConfig) -> Tensor:
    """The weights [runs, weights a run] that share a scale."""
    cols = weight.shape[1]
    if config.granularity == "per_tensor":
        return weight.reshape(1, -1)
    if config.group_size is None:
        return weight
    if cols % config.group_size:
        raise ValueError(
            f"group_size must divide the layer's {cols} columns, got {config.group_size}"
        )
    return weight.reshape(-1, config.group_size)


def _given_scale(scale: Tensor, rows: int, cols: int, config: AdaRoundConfig) -> Tensor:
    groups = cols // config.group_size if config.group_size else 1
    allowed = [(1, 1)] if config.granularity == "per_tensor" else [(rows, groups), (1, groups)]
    shape = tuple(scale.shape)
    if shape == (rows,) and groups == 1:
        shape = (rows, 1)
    if shape not in allowed:
        raise ValueError(
            f"scale must have shape {' or '.join(str(list(s)) for s in allowed)} for "
            f"granularity {config.granularity}, got {list(scale.shape)}"
        )
    rounded = scale.detach().reshape(shape).to(config.scale_dtype).float()
    bad = int((~((rounded > 0) & rounded.isfinite())).sum())
    if bad:
        raise ValueError(
            f"scale must be positive and finite in {config.scale_dtype}, got {bad} other values"
        )
    return rounded


def _zero_point(low: Tensor, scale: Tensor, qmin: int, qmax: int, symmetric: bool) -> Tensor:
    if symmetric:
        return torch.zeros_like(scale)
    return (qmin - low / scale).round().clamp(qmin, qmax)


def stored_scale(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """As the dtype that is exported has it; kept above 0 and finite there.

    Below a dtype's smallest normal number scales have fewer digits, but are no worse than others of
    that size. float32's own limit holds for all, since arithmetic is in float32.
    """
    limits = torch.finfo(dtype)
    least = max(limits.smallest_normal * limits.eps, torch.finfo(torch.float32).smallest_normal)
    return scale.clamp(least, limits.max).to(dtype).float()


def next_scale(scale: Tensor, dtype: torch.dtype, up: bool) -> Tensor:
    """The dtype's next number above or below each of its own, the same one at its ends."""
    bits = torch.int16 if dtype.itemsize == 2 else torch.int32
    neighbour = (scale.to(dtype).view(bits) + (1 if up else -1)).view(dtype)
    return stored_scale(neighbour.float(), dtype)


def scale_notes(scale: Tensor, dtype: torch.dtype) -> tuple[str, ...]:
    """What the dtype costs that scales are stored in."""
    limits, name = torch.finfo(dtype), str(dtype).removeprefix("torch.")
    small, large = int((scale < limits.smallest_normal).sum()), int((scale == limits.max).sum())
    notes = []
    if small:
        notes.append(
            f"{small} of {scale.numel()} scales are below {name}'s smallest normal number, where "
            "it has fewer digits"
        )
    if large:
        notes.append(
            f"{large} of {scale.numel()} scales are {name}'s largest number: larger weights than "
            "their grids hold are clipped"
        )
    return tuple(notes)


def _search(runs: Tensor, qmin: int, qmax: int, config: AdaRoundConfig) -> tuple[Tensor, Tensor]:
    """(scale, zero_point), both [runs, 1], for weights [runs, weights a run]."""
    low = runs.amin(1, keepdim=True).clamp(max=0)
    high = runs.amax(1, keepdim=True).clamp(min=0)
    if config.symmetric:
        full = torch.maximum(high, -low) / qmax
    else:
        full = (high - low) / (qmax - qmin)
    zeros = full == 0

    def at(share: Tensor) -> tuple[Tensor, Tensor]:
        """For shares [runs, n]."""
        scale = torch.where(zeros, 1.0, stored_scale(full * share, config.scale_dtype))
        return scale, _zero_point(low * share, scale, qmin, qmax, config.symmetric)

    def best_of(shares: Tensor) -> Tensor:
        """The first of least error, [runs, 1]; 1 where no error is finite."""
        errors = []
        for scale, zero_point in zip(*(t.split(1, 1) for t in at(shares)), strict=True):
            error = (runs / scale).round_()
            if config.symmetric:
                error.clamp_(qmin, qmax)
            else:
                error.add_(zero_point).clamp_(qmin, qmax).sub_(zero_point)
            errors.append(error.mul_(scale).sub_(runs).square_().sum(1, keepdim=True))
        of_shares = torch.cat(errors, 1).nan_to_num_(torch.inf, torch.inf)
        best, index = of_shares.min(1, keepdim=True)
        return torch.where(best < torch.inf, shares.gather(1, index), 1.0)

    if config.scale == "min_max":
        return at(torch.ones_like(full))
    only_start = config.scale == "gram"  # which looks around it by itself
    coarse = full.new_tensor(_COARSE[::2] if only_start else _COARSE).expand(len(full), -1)
    if config.scale_dtype != torch.float32:  # which may have rounded the whole range down
        above = next_scale(at(torch.ones_like(full))[0], config.scale_dtype, up=True)
        coarse = torch.cat([coarse, torch.where(zeros, 1.0, above / full)], 1)
    best = best_of(coarse)
    if not only_start:
        best = best_of(best + full.new_tensor([0.0, *_FINE]))
    return at(best)
