"""Ranges of activations, observed in one pass over any amount of data."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from adaround_ext.activations.histogram import Histogram
from adaround_ext.activations.quantizer import ActivationConfig, affine
from adaround_ext.grid import quant_range

# Shares of the range that the search tries: all of them, then around the best so far.
_COARSE_SHARES = [2.0 ** (-k / 4) for k in range(41)]
_FINE_SHARES = [[2.0 ** (k / step) for k in range(-8, 9) if k] for step in (32, 256)]
_MAX_SWEEPS = 4  # over both ends, at each step of the shares


class RangeObserver:
    """Takes activations, a batch at a time, and gives their range for ``config``.

    Its memory does not grow, and the range depends on the values alone, not on how they were cut
    into batches. "percentile" and "mse" are as exact as a histogram of at least 4096 bins over the
    larger side of the range. ``name`` is for errors.
    """

    def __init__(self, config: ActivationConfig, name: str) -> None:
        self._config = config
        self._name = name
        self._low, self._high = math.inf, -math.inf
        self._histogram = None if config.ranges == "min_max" else Histogram()

    def observe(self, x: Tensor) -> None:
        """Adds every element of a floating point tensor; ValueError for NaN and infinity."""
        if x.numel() == 0:
            return
        x = x.detach().float()
        low, high = torch.stack(torch.aminmax(x)).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            bad = x.numel() - int(x.isfinite().sum())
            raise ValueError(
                f"activations at {self._name} must be finite in float32, got {bad} NaN or "
                f"infinite values of {x.numel()}"
            )
        if self._histogram is not None:
            self._histogram.add(x, low, high)
        self._low, self._high = min(self._low, low), max(self._high, high)

    def range(self) -> tuple[float, float]:
        """(low, high), as ActivationQuantizer.set_range takes them; ValueError without data."""
        if self._low > self._high:
            raise ValueError(f"activations at {self._name} must hold a value, got none")
        if self._histogram is None or self._low == self._high == 0:
            return self._low, self._high
        config = self._config
        if config.ranges == "percentile":
            return percentile_range(self._histogram, config.percentile / 100, config.symmetric)
        return least_error_range(self._histogram, *quant_range(config.bits, config.symmetric))


def percentile_range(histogram: Histogram, share: float, symmetric: bool) -> tuple[float, float]:
    """The range that holds ``share`` of the values; as many lie beyond either end.

    Where symmetric, the share of |x| instead, and low = -high.
    """
    edges, counts, heaps, heights = (t.numpy() for t in histogram.bins_and_heaps())
    begin, end = np.append(edges[:-1], heaps), np.append(edges[1:], heaps)
    counts = np.append(counts, heights)
    if symmetric:  # no bin has 0 inside
        begin, end = np.minimum(abs(begin), abs(end)), np.maximum(abs(begin), abs(end))
    order = np.lexsort((begin, end))
    order = order[counts[order] > 0]
    # The cumulative distribution: straight through a bin, a step at a heap.
    total = counts[order].cumsum()
    at = np.stack([total - counts[order], total], 1).ravel()
    values = np.stack([begin[order], end[order]], 1).ravel()
    shares = np.array([share if symmetric else (1 - share) / 2, (1 + share) / 2]) * total[-1]
    low, high = np.interp(shares, at, values).tolist()
    return (-low, low) if symmetric else (low, high)


def least_error_range(histogram: Histogram, qmin: int, qmax: int) -> tuple[float, float]:
    """The range of least expected squared error (x_q - x)^2 of the values in the histogram.

    Both ends are searched together and one by one for unsigned codes; of [low, high] itself and
    all that was tried, the best.
    """
    edges, counts, heaps, heights = histogram.bins_and_heaps()
    widths = edges.diff()
    density = torch.where(counts > 0, counts / widths, 0.0)
    # A bin's error is the difference of an antiderivative at its edges: one term an edge.
    steps = torch.nn.functional.pad(density, (1, 0)) - torch.nn.functional.pad(density, (0, 1))
    edges, steps = edges[steps != 0], steps[steps != 0]
    full = torch.tensor([histogram.low, histogram.high], dtype=torch.float64, device="cpu")

    def errors(shares: Tensor) -> Tensor:
        """Of ranges [candidates, 2], as shares of the full one."""
        low, high = (full * shares).unbind(1)
        scale, zero_point = (t.double()[:, None] for t in affine(low, high, qmin, qmax))
        first, last = qmin - zero_point, qmax - zero_point
        within = (_antiderivative(edges / scale, first, last) * steps).sum(1, keepdim=True)
        at = heaps / scale
        off = at - at.round().clamp(first, last)
        at_heaps = (off.square() * heights).sum(1, keepdim=True)
        return (within * scale**3 + at_heaps * scale**2).squeeze(1)

    best = torch.ones(2, dtype=torch.float64, device="cpu")
    least = errors(best[None])[0]
    ends = [(1.0, 1.0)] if qmin < 0 else [(1.0, 1.0), (0.0, 1.0), (1.0, 0.0)]
    directions = [torch.tensor(pair, dtype=torch.float64, device="cpu") for pair in ends]
    for factors in (_COARSE_SHARES, *_FINE_SHARES):
        ladder = torch.tensor(factors, dtype=torch.float64, device="cpu")[:, None]
        for _ in range(_MAX_SWEEPS):
            before = least
            for direction in directions:
                shares = (best * ladder**direction).clamp(max=1.0)
                tried = errors(shares)
                place = tried.argmin()
                if tried[place] < least:
                    best, least = shares[place], tried[place]
            if least == before:
                break
    low, high = (full * best).tolist()
    return low, high


def _antiderivative(t: Tensor, first: Tensor, last: Tensor) -> Tensor:
    """Of (clamp(round(t), first, last) - t)^2 for integers first <= 0 <= last.

    n / 12 + (t - n)^3 / 3 with n the code: a whole step adds 1 / 12.
    """
    code = t.round().clamp(first, last)
    return code / 12 + (t - code) ** 3 / 3
