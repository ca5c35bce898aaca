"""Streaming second moments of a layer's inputs: all that the Gram objective needs of the data."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from adaround_ext.data import Batch, fixed_batches
from adaround_ext.layers import MatrixLayer

# Inputs are cut again into this many samples (tokens of a linear layer) before X X^T, so that the
# sums do not depend on how the caller cut the data.
_SAMPLES, _TOKENS = 32, 8192
# X X^T is symmetric: only blocks on and below the diagonal are computed, this many columns each.
_BLOCK = 192
# Products of fewer rows are filled up: of 5 to 11 rows MKL's last bits depend on the threads.
LEAST_ROWS = 16


def with_enough_rows(matrices: Tensor) -> Tensor:
    """[groups, rows, n] for a product: a lone matrix of few rows filled up with rows of zeros.

    Of several groups each product has one thread.
    """
    missing = LEAST_ROWS - matrices.shape[1]
    return F.pad(matrices, (0, 0, 0, missing)) if len(matrices) == 1 and missing > 0 else matrices


class GramStatistics:
    """E[x x^T] of the inputs and, with targets, what they miss; float64 totals of float32 products.

    For layers that share their inputs, with weights W_i stacked to [rows, cols]:
    gram [groups, cols, cols] = E[x x^T]; mismatch [rows, cols] = E[e x^T] and mismatch_energy
    [rows] = E[e^2] for e = target - (W x + b), both zero without targets. The mean is over samples
    and output positions. Nothing here grows with the number of samples.
    """

    def __init__(self, layers: list[MatrixLayer], positions: int | None, seed: int) -> None:
        first = layers[0]
        device = first.weight.device
        self._layers = layers
        self._positions = positions
        self._generator = torch.Generator().manual_seed(seed)
        rows = sum(layer.rows for layer in layers)

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.float64, device=device)

        self.gram = zeros(first.groups, first.cols, first.cols)
        self.mismatch = zeros(rows, first.cols)
        self.mismatch_energy = zeros(rows)
        self.count = 0
        self.has_targets = False

    def collect(self, batches: Iterator[Batch]) -> None:
        """Adds every batch; the means are ready afterwards."""
        first = self._layers[0]
        size = _TOKENS if isinstance(first.layer, torch.nn.Linear) else _SAMPLES
        for inputs, targets in fixed_batches(batches, size):
            x = inputs.float()
            if targets is None:
                for patches, _ in self._patches(self._layers[-1], x, None):
                    self._add_gram(patches)
                continue
            self.has_targets = True
            row = 0
            for index, (layer, target) in enumerate(zip(self._layers, targets, strict=True)):
                missed = target.float() - layer.forward(x, layer.weight, layer.bias)
                for patches, e in self._patches(layer, x, missed):
                    assert e is not None
                    if index == 0:
                        self._add_gram(patches)
                    end = row + layer.rows
                    product = torch.bmm(with_enough_rows(e), patches.mT)[:, : e.shape[1]]
                    self.mismatch[row:end] += product.reshape(layer.rows, -1)
                    self.mismatch_energy[row:end] += e.square().sum(2, dtype=torch.float64).view(-1)
                row += layer.rows
        if self.count:
            for total in (self.gram, self.mismatch, self.mismatch_energy):
                total /= self.count

    def _patches(
        self, layer: MatrixLayer, x: Tensor, missed: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        if self._positions is None:
            return layer.patches(x, missed)
        # Layers that share inputs draw the same positions.
        generator = self._generator.clone_state()
        if layer is self._layers[-1]:
            generator = self._generator
        return layer.patches(x, missed, positions=self._positions, generator=generator)

    def _add_gram(self, patches: Tensor) -> None:
        self.count += patches.shape[2]
        cols = patches.shape[1]
        if patches.shape[0] > 1 or cols <= 2 * _BLOCK:
            self.gram += torch.bmm(patches, patches.mT)
            return
        matrix = patches[0]
        for begin in range(0, cols, _BLOCK):
            end = min(begin + _BLOCK, cols)
            product = matrix[begin:end] @ matrix[:end].mT
            self.gram[0, begin:end, :end] += product
            self.gram[0, :begin, begin:end] += product[:, :begin].mT

    def rows(self, rows: slice) -> GramStatistics:
        """The same statistics for some of the stacked rows."""
        part = copy.copy(self)
        part.mismatch = self.mismatch[rows]
        part.mismatch_energy = self.mismatch_energy[rows]
        return part
