"""Input checksums: sums by which a layer's inputs in two runs of a model are compared.

They tell whether a model whose finished blocks are replaced by recordings still does what it did.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

EXACT = 1e-3  # kernels that add in any order, a little amplified
ROUNDED = 1e-1  # recordings in 16 bits
REPEATED = 1e-6  # the same kernels again; noise of this size cancels out of a sum
_Sums = tuple[int, float, float]


class InputChecksums:
    """Sums over the full-precision model's inputs of each layer, from a run with nothing replaced.

    What a model keeps in Python (counters, lists that its blocks append to), random numbers, views
    that it writes through, or a way through the model that only some batches take are in no
    recording; where they matter, a layer behind gets something else.
    """

    def __init__(self, tolerance: float) -> None:
        self._tolerance = tolerance
        self._sums: dict[tuple[int, nn.Module, int], _Sums] = {}

    def note(self, batch: int, layer: nn.Module, call: int, x: Tensor) -> None:
        """What this call of a layer is to get again."""
        self._sums[batch, layer, call] = _sums(x)

    def same(self, batch: int, layer: nn.Module, call: int, x: Tensor) -> bool:
        """Whether it did; NaN counts as the same."""
        return self._agree(self._sums.get((batch, layer, call)), _sums(x))

    def differing(self, other: InputChecksums, batch: int) -> set[nn.Module]:
        """The layers whose inputs in a batch differ between this and the other run."""
        first, second = self._sums, other._sums
        keys = {key for key in (*first, *second) if key[0] == batch}
        return {key[1] for key in keys if not self._agree(first.get(key), second.get(key))}

    def _agree(self, noted: _Sums | None, sums: _Sums | None) -> bool:
        if noted is None or sums is None or noted[0] != sums[0]:
            return False
        _, total, size = sums
        error = self._tolerance * noted[2]
        return not (abs(total - noted[1]) > error or abs(size - noted[2]) > error)


def _sums(x: Tensor) -> _Sums:
    """How many values, their sum, and that of their magnitudes.

    The sum is weighted by row, so that rows in another order have another one.
    """
    x = x.detach()
    # In pieces in float32, since sums of everything are slow in float64 and poor in float32.
    dims = (-2, -1) if x.dim() > 3 else (-1,)
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.sum(dims, dtype=dtype).flatten().double()
    weights = torch.arange(len(rows), dtype=torch.float64, device=x.device).cos_()
    size = torch.linalg.vector_norm(x, 1, dims, dtype=dtype).sum(dtype=torch.float64)
    return x.numel(), float(rows @ (1 + weights)), float(size)
