"""Sums of float32 in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_FLOAT32_TERMS = 64  # of a sum in float32: with so few it has about the digits of its terms


def double_sum(values: Tensor, dim: int) -> Tensor:
    """Over ``dim``, counted from 0, in float64.

    On CUDA torch would write all values in float64 first, so there pieces are summed in float32.
    """
    length = values.shape[dim]
    whole = length // _FLOAT32_TERMS * _FLOAT32_TERMS if values.is_cuda else 0
    if whole == 0:
        return values.sum(dim, dtype=torch.float64)
    pieces = values.narrow(dim, 0, whole).unflatten(dim, (-1, _FLOAT32_TERMS)).sum(dim + 1)
    total: Tensor = pieces.sum(dim, dtype=torch.float64)
    if whole < length:
        total += values.narrow(dim, whole, length - whole).sum(dim, dtype=torch.float64)
    return total
