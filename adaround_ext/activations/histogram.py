"""Histogram of a stream, the same however the stream is cut into batches and ordered.

Bins are 2^e wide and begin at multiples of that, so that wider bins are pairs of narrower ones:
the counts depend on the values alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_SIDE_BINS = 1 << 13  # on either side of 0; more than half of one side's are in use
_MIN_EXPONENT = -90  # a side is at least 2^this wide, so that float32 can divide by a bin's width
_MAX_VALUES = 1 << 22  # values that are counted at a time, for their bins' numbers take memory too


class Histogram:
    """Counts of finite values, with their exact least and greatest.

    What activation functions produce in heaps, 0 and the two ends, is also counted by itself.
    """

    def __init__(self) -> None:
        self.low, self.high = math.inf, -math.inf
        self._at_low = self._at_zero = self._at_high = 0
        self._exponent = _MIN_EXPONENT  # a side is 2^exponent wide
        self._counts = torch.zeros(2 * _SIDE_BINS, dtype=torch.int64, device="cpu")

    def add(self, x: Tensor, low: float, high: float) -> None:
        """Counts every element of x, float32, whose least and greatest are given."""
        places = [(x == value).sum() for value in (low, 0.0, high)]
        at_low, at_zero, at_high = torch.stack(places).tolist()
        if low <= self.low:
            self._at_low = at_low + (self._at_low if low == self.low else 0)
            self.low = low
        if high >= self.high:
            self._at_high = at_high + (self._at_high if high == self.high else 0)
            self.high = high
        self._at_zero += at_zero
        self._widen(math.frexp(max(-low, high))[1])
        for chunk in x.reshape(-1).split(_MAX_VALUES):
            index = torch.floor(chunk / self._width).int() + _SIDE_BINS
            self._counts += torch.bincount(index, minlength=2 * _SIDE_BINS).cpu()

    def bins_and_heaps(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(edges [n + 1], counts [n], heaps [m], their counts [m]), all float64.

        counts are of what lies between neighbouring edges, evenly as far as is known, without the
        heaps: those are at most 3 single values.
        """
        counts = self._counts.double()
        bounds = torch.arange(-_SIDE_BINS, _SIDE_BINS + 1, dtype=torch.float64, device="cpu")
        edges = bounds * self._width
        heaps = {0.0: self._at_zero} | {self.low: self._at_low, self.high: self._at_high}
        for value, count in heaps.items():
            counts[math.floor(value / self._width) + _SIDE_BINS] -= count
        values = torch.tensor(list(heaps), dtype=torch.float64, device="cpu")
        heights = torch.tensor(list(heaps.values()), dtype=torch.float64, device="cpu")
        return edges.clamp(self.low, self.high), counts, values, heights

    @property
    def _width(self) -> float:
        return math.ldexp(1 / _SIDE_BINS, self._exponent)

    def _widen(self, exponent: int) -> None:
        """Makes room for what is less than 2^exponent."""
        if exponent > self._exponent:
            shift = min(exponent - self._exponent, 62)
            # Arithmetic shifts round down, as floor does.
            index = (torch.arange(-_SIDE_BINS, _SIDE_BINS, device="cpu") >> shift) + _SIDE_BINS
            self._counts = torch.zeros_like(self._counts).index_add_(0, index, self._counts)
            self._exponent = exponent
