"""Cholesky factors, and what is solved with them, in float64.

A library's factorisation has other bits for other numbers of threads, and on one thread it takes
long for a large layer. On the CPU it is made of matrix products here, whose bits do not depend on
threads (products.py): only blocks on the diagonal are the library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from adaround_ext.linalg.products import BLOCK, fixed_bmm
from adaround_ext.process.one_thread import on_one_thread

_JITTER = 1e-6  # of the mean diagonal: where a matrix is singular in float64
# Columns of a block on the diagonal, and of one behind it: multiples of BLOCK, so that each product
# is of whole blocks. More of them took as long, or longer.
_DIAGONAL, _BEHIND = 128, 512


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
        out = right.new_zeros(len(right), rows + -rows % BLOCK, lower.shape[1])
        out[:, :rows, :n] = right
        diagonals = [lower[:, own, own] for own in _blocks(lower)]
        inverses = on_one_thread(lambda: [_inverse(own) for own in diagonals], lower.device)
        # y L^T = right from the first column on, then x L = y from the last one back.
        for own, inverse in zip(_blocks(lower), inverses, strict=True):
            part = out[:, :, own]
            if own.start > 0:
                part = part - fixed_bmm(out[:, :, : own.start], lower[:, own, : own.start].mT)
            out[:, :, own] = fixed_bmm(part, inverse.mT)
        for own, inverse in reversed(list(zip(_blocks(lower), inverses, strict=True))):
            part = out[:, :, own]
            if own.stop < out.shape[2]:
                part = part - fixed_bmm(out[:, :, own.stop :], lower[:, own.stop :, own])
            out[:, :, own] = fixed_bmm(part, inverse)
        return out[:, :rows, :n]


def _factored(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """(L, which of the matrices have none)."""
    if matrices.is_cuda:
        lower, info = torch.linalg.cholesky_ex(matrices)
        return lower, info > 0
    n = matrices.shape[1]
    a = _whole(matrices)
    failed = torch.zeros(len(a), dtype=torch.bool, device=a.device)
    for own in _blocks(a):
        block = partial(_factored_block, a[:, own, own])
        diagonal, inverse, info = on_one_thread(block, a.device)
        failed |= info > 0
        a[:, own, own] = diagonal
        behind = slice(own.stop, None)
        if own.stop < a.shape[1]:
            below = fixed_bmm(a[:, behind, own], inverse.mT)
            a[:, behind, own] = below
            for begin in range(0, below.shape[1], _BEHIND):  # on the diagonal, and below it
                part = below[:, begin : begin + _BEHIND]
                target = a[:, own.stop + begin :, own.stop + begin : own.stop + begin + _BEHIND]
                target.baddbmm_(below[:, begin:], part.mT, alpha=-1)
    return a.tril_()[:, :n, :n], failed


def _factored_block(matrices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(L, its inverse, above 0 where there is none), as the library has it on one thread."""
    diagonal, info = torch.linalg.cholesky_ex(matrices)
    return diagonal, _inverse(diagonal), info


def _whole(matrices: Tensor) -> Tensor:
    """A copy filled up to whole blocks, with ones on the diagonal."""
    n = matrices.shape[1]
    whole = n + _missing(n)
    filled = matrices.new_zeros(len(matrices), whole, whole)
    filled[:, :n, :n] = matrices
    filled.diagonal(dim1=1, dim2=2)[:, n:] = 1.0
    return filled


def _missing(n: int) -> int:
    """Columns to the next whole block; a lone one is not cut."""
    return -n % BLOCK if n > _DIAGONAL else 0


def _blocks(matrices: Tensor) -> Iterator[slice]:
    n = matrices.shape[1]
    return (slice(begin, min(begin + _DIAGONAL, n)) for begin in range(0, n, _DIAGONAL))


def _inverse(lower: Tensor) -> Tensor:
    one = torch.eye(lower.shape[1], dtype=lower.dtype, device=lower.device).expand_as(lower)
    inverse: Tensor = torch.linalg.solve_triangular(lower, one, upper=False)
    return inverse
