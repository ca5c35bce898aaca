"""Positions of a layer's output: which are looked at, and in which tiles."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def draw_positions(samples: int, count: int, drawn: int, generator: torch.Generator) -> Tensor:
    """Indices [samples, drawn] below count, distinct and ascending in each row."""
    indices = torch.empty(samples, drawn, dtype=torch.int64, device=generator.device)
    for row in indices:
        row.copy_(torch.randperm(count, generator=generator, device=generator.device)[:drawn])
    return indices.sort().values


def tiles_of(lengths: Sequence[int], most: int) -> list[list[slice]]:
    """Slices of each dimension, whose tiles have at most `most` elements, or one.

    Earlier dimensions are cut first, so in row-major order each tile is one run.
    """
    cuts: list[list[slice]] = []
    for length in reversed(lengths):
        step = max(1, min(length, most))
        most //= step
        cuts.insert(0, [slice(start, start + step) for start in range(0, length, step)])
    return cuts
