"""Cholesky factors, and what is solved with them, in float64.

A library's factorisation has other bits for other numbers of threads, and on one thread it takes
long for a large layer. On the CPU it is made of matrix products here, whose bits do not depend on
threads (products.py): only tiles on the diagonal are the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adaround_ext.linalg.products import TILE, fixed_bmm
from adaround_ext.process.one_thread import on_one_thread

_JITTER = 1e-6  # of the mean diagonal: where a matrix is singular in float64
# Columns of a tile on the diagonal, and of one below it: multiples of the products' tiles, so that
# each is of whole ones. More of them took as long, or longer.
_DIAGONAL_COLS, _BELOW_COLS = 128, 512


@dataclass(frozen=True)
class Cholesky:
    """L L^T of some matrices; ``lower`` L float64 [groups, n, n]."""

    lower: Tensor

    @staticmethod
    def of(matrices: Tensor) -> Cholesky:
        """Of float64 [groups, n, n], each shifted as little as it needs.

        Raises ValueError for NaN or infinity.
        """
        if not bool(matrices.isfinite().all()):  # no shift would help
            raise ValueError("gram must be finite, got NaN or infinite values")
        mean = matrices.diagonal(dim1=1, dim2=2).mean(1)
        unit = torch.where(mean > 0, mean, torch.ones_like(mean))[:, None]
        shift = torch.zeros_like(unit)
        lower, failed = _factored(matrices)
        jitter = _JITTER
        while bool(failed.any()):
            shift += torch.where(failed[:, None], jitter * unit, 0.0)
            shifted = matrices.clone()
            shifted.diagonal(dim1=1, dim2=2).add_(shift)
            lower, failed = _factored(shifted)
            jitter *= 10
        return Cholesky(lower)

    def solve(self, right: Tensor) -> Tensor:
        """``right`` (L L^T)^-1 for float64 [groups, rows, n]."""
        if right.is_cuda:
            return torch.cholesky_solve(right.mT.contiguous(), self.lower).mT
        rows, n = right.shape[1], right.shape[2]
        lower = _whole(self.lower) if _missing(n) else self.lower
        out = right.new_zeros(len(right), rows + -rows % TILE, lower.shape[1])
        out[:, :rows, :n] = right
        diagonals = [lower[:, tile, tile] for tile in _tiles(lower)]
        inverses = on_one_thread(lambda: [_inverse(tile) for tile in diagonals], lower.device)
        # y L^T = right from the first column on, then x L = y from the last one back.
        for tile, inverse in zip(_tiles(lower), inverses, strict=True):
            cols = out[:, :, tile]
            if tile.start > 0:
                cols = cols - fixed_bmm(out[:, :, : tile.start], lower[:, tile, : tile.start].mT)
            out[:, :, tile] = fixed_bmm(cols, inverse.mT)
        for tile, inverse in reversed(list(zip(_tiles(lower), inverses, strict=True))):
            cols = out[:, :, tile]
            if tile.stop < out.shape[2]:
                cols = cols - fixed_bmm(out[:, :, tile.stop :], lower[:, tile.stop :, tile])
            out[:, :, tile] = fixed_bmm(cols, inverse)
        return out[:, :rows, :n]


def _factored(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(L, which of the matrices have none)."""
    if matrices.is_cuda:
        lower, info = torch.linalg.cholesky_ex(matrices)
        return lower, info > 0
    n = matrices.shape[1]
    a = _whole(matrices)
    failed = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for tile in _tiles(a):
        factored = partial(_factored_tile, a[:, tile, tile])
        diagonal, inverse, info = on_one_thread(factored, a.device)
        failed |= info > 0
        a[:, tile, tile] = diagonal
        behind = slice(tile.stop, None)
        if tile.stop < a.shape[1]:
            below = fixed_bmm(a[:, behind, tile], inverse.mT)
            a[:, behind, tile] = below
            for begin in range(0, below.shape[1], _BELOW_COLS):  # on the diagonal and below it
                rows = below[:, begin : begin + _BELOW_COLS]
                first = tile.stop + begin
                target = a[:, first:, first : first + _BELOW_COLS]
                target.baddbmm_(below[:, begin:], rows.mT, alpha=-1)
    return a.tril_()[:, :n, :n], failed


def _factored_tile(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L, its inverse, above 0 where there is none), as the library has it on one thread."""
    diagonal, info = torch.linalg.cholesky_ex(matrices)
    return diagonal, _inverse(diagonal), info


def _whole(matrices: Tensor) -> Tensor:
    """A copy filled up to whole tiles, with ones on the diagonal."""
    n = matrices.shape[1]
    whole = n + _missing(n)
    filled = matrices.new_zeros(len(matrices), whole, whole)
    filled[:, :n, :n] = matrices
    filled.diagonal(dim1=1, dim2=2)[:, n:] = 1.0
    return filled


def _missing(n: int) -> int:
    """Columns to the next whole tile; a lone one is not cut."""
    return -n % TILE if n > _DIAGONAL_COLS else 0


def _tiles(matrices: Tensor) -> Iterator[slice]:
    n = matrices.shape[1]
    return (slice(begin, min(begin + _DIAGONAL_COLS, n)) for begin in range(0, n, _DIAGONAL_COLS))


def _inverse(lower: Tensor) -> Tensor:
    one = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse: Tensor = torch.linalg.solve_triangular(lower, one, upper=False)
    return inverse
