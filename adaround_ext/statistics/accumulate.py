"""Sums of matrices whose order is fixed, within a process and over all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from adaround_ext.distributed import Ranks

_VALUES_IN_FLIGHT = 1 << 23  # float64, at a time: 64 MiB


class ProductSum:
    """A sum of float32 matrices in the order in which they come.

    ``value`` is float64, but a lone matrix stays float32: many segments have one only.
    """

    def __init__(self) -> None:
        self.value: Tensor | None = None

    def add(self, product: Tensor) -> None:
        """``product`` is the sum's from now on."""
        if self.value is None:
            self.value = product
        elif self.value.dtype == torch.float64:
            self.value += product
        else:
            self.value = self.value.double().add_(product)


class MatrixSum:
    """A float64 sum of matrices, added in the order of ranks and, in each, as they came."""

    def __init__(self, ranks: Ranks, shape: tuple[int, ...]) -> None:
        self._ranks, self._shape = ranks, shape
        self._sums: list[ProductSum] = []  # one, unless their order counts beyond this rank

    def __len__(self) -> int:
        """How many matrices this rank has to give."""
        return len(self._sums)

    def add(self, value: Tensor | None) -> None:
        """``value`` is the sum's from now on; None counts for nothing."""
        if value is None:
            return
        if not self._sums or (self._ranks.size > 1 and self._ranks.ordered):
            self._sums.append(ProductSum())
        self._sums[-1].add(value)

    def total(self, device: torch.device, counts: list[int]) -> Tensor:
        """The sum at all ranks, of which each has ``counts[rank]``; zeros where none has any."""
        ranks = self._ranks
        values = [one.value for one in self._sums if one.value is not None]
        self._sums.clear()
        if ranks.size == 1 and values:
            return values[0].double()
        total = torch.zeros(self._shape, dtype=torch.float64, device=device)
        flat = total.view(-1)
        size = max(1, min(_VALUES_IN_FLIGHT // max(1, sum(counts)), len(flat)))
        step = -(-size // ranks.size) * ranks.size  # a part for each rank
        for begin in range(0, len(flat), step) if any(counts) else ():
            pieces = [value.view(-1)[begin : begin + step] for value in values]
            added = (self._ordered if ranks.ordered else self._reduced)(pieces, counts, step)
            flat[begin : begin + step] = added[: len(flat) - begin]
        return total

    def _ordered(self, pieces: list[Tensor], counts: list[int], step: int) -> Tensor:
        """Each rank adds up a part of the piece and sends it to all."""
        size = step // self._ranks.size
        padded = self._padded(pieces, len(pieces), step)
        of_ranks = padded.view(len(pieces), self._ranks.size, size).transpose(0, 1)
        first, *others = self._ranks.all_to_all(of_ranks, counts, size)
        for other in others:
            first += other
        return self._ranks.concatenate(first.contiguous())

    def _reduced(self, pieces: list[Tensor], counts: list[int], step: int) -> Tensor:
        padded = self._padded(pieces, 1, step)[0]
        self._ranks.add_up(padded)
        return padded

    def _padded(self, pieces: list[Tensor], rows: int, step: int) -> Tensor:
        """float64 [rows, step], a piece a row."""
        padded = torch.zeros(rows, step, dtype=torch.float64, device=self._ranks.device)
        for row, piece in zip(padded, pieces, strict=False):
            row[: len(piece)] = piece
        return padded
