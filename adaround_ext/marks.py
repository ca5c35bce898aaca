"""Whether a model whose finished blocks are replaced by recordings still does what it did."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_EXACT = 1e-3  # kernels that add in any order, a little amplified
_ROUNDED = 1e-1  # recordings in 16 bits


class Marks:
    """Sums over the full-precision model's inputs of each layer, from a run with nothing replaced.

    What a model keeps in Python (counters, lists that its blocks append to), random numbers, views
    that it writes through, or a way through the model that only some batches take are in no
    recording; where they matter, a layer behind gets something else.
    """

    def __init__(self, rounded: bool) -> None:
        self._tolerance = _ROUNDED if rounded else _EXACT
        self._sums: dict[tuple[int, nn.Module, int], tuple[int, float, float]] = {}

    def note(self, batch: int, layer: nn.Module, call: int, x: Tensor) -> None:
        """What this call of a layer is to get again."""
        self._sums[batch, layer, call] = _sums(x)

    def same(self, batch: int, layer: nn.Module, call: int, x: Tensor) -> bool:
        """Whether it did; NaN counts as the same."""
        noted = self._sums.get((batch, layer, call))
        if noted is None or noted[0] != x.numel():
            return False
        _, total, size = _sums(x)
        most = self._tolerance * noted[2]
        return not (abs(total - noted[1]) > most or abs(size - noted[2]) > most)


def _sums(x: Tensor) -> tuple[int, float, float]:
    """How many values, their sum, and that of their magnitudes."""
    x = x.detach()
    # In pieces in float32, since sums of everything are slow in float64 and poor in float32.
    dims = (-2, -1) if x.dim() > 3 else (-1,)
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.sum(dims, dtype=dtype).sum(dtype=torch.float64)
    size = torch.linalg.vector_norm(x, 1, dims, dtype=dtype).sum(dtype=torch.float64)
    return x.numel(), float(total), float(size)
