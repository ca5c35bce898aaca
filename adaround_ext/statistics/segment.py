"""Sums over one segment of the data: several processes, or one after the other, can join them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext.layers.inputs import Rebatcher
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.linalg.precision import tf32_products
from adaround_ext.linalg.products import fixed_bmm
from adaround_ext.linalg.sums import double_sum
from adaround_ext.linalg.tiles import TileSize
from adaround_ext.statistics.accumulate import ProductSum

# Inputs are cut again into this many samples (tokens of a linear layer) before X X^T, so that the
# sums do not depend on how the caller cut the data.
_SAMPLES, TOKENS = 32, 8192
# X X^T is symmetric: only tiles on and below the diagonal are computed, so many columns each.
_COLS_PER_TILE = TileSize(cpu=192, cuda=1024)
_SHIFT_POSITIONS = 256  # enough for the rough mean that inputs are shifted by


@dataclass
class Vectors:
    """The small sums of a segment for x' = x - shift, float64 but for the shift itself.

    shift float32 [groups, cols]; first [groups, cols] = sum x'; missed [rows] = sum e and energy
    [rows] = sum e^2 of what the layers miss of their targets; of inputs as targets missed [cols] =
    sum d alone. count: positions.
    """

    count: int
    shift: Tensor
    first: Tensor
    missed: Tensor
    energy: Tensor


class SegmentSums:
    """Of consecutive batches of one unit's inputs, as GramStatistics joins them.

    covariance: sum x' x'^T [groups, cols, cols]; mismatch: sum e x'^T [rows, cols] where there are
    targets; ``vectors`` has the rest. ``from_inputs``, of linear layers: the targets are inputs y,
    whose outputs are wanted; d = y - x, mismatch sum d x'^T and squares sum d d^T, [cols, cols].
    Products are float32 (on CUDA TF32 for data of 16 bits), of inputs less the mean of the first
    few: of large numbers with small differences nothing would be left.
    """

    def __init__(
        self, layers: list[MatrixLayer], positions: int | None, seed: int, from_inputs: bool = False
    ) -> None:
        self._layers = layers
        self._from_inputs = from_inputs
        self._positions = positions
        self._generator = torch.Generator().manual_seed(seed)
        linear = isinstance(layers[0].layer, torch.nn.Linear)
        self._rebatcher = Rebatcher(TOKENS if linear else _SAMPLES)
        self.vectors: Vectors | None = None  # until the first position
        self.covariance = ProductSum()
        self.mismatch = ProductSum()
        self.squares = ProductSum()

    def add(self, inputs: Tensor, targets: tuple[Tensor, ...] | None) -> None:
        """Adds a batch as :func:`adaround_ext.layers.inputs.batches` gives it."""
        for batch in self._rebatcher.push(inputs, targets):
            self._consume(*batch)

    def finish(self) -> None:
        """Adds what is held back."""
        for batch in self._rebatcher.flush():
            self._consume(*batch)

    def _consume(self, inputs: Tensor, targets: tuple[Tensor, ...] | None) -> None:
        # TF32 has all digits of a number of 16 bits; what it rounds off of their differences is far
        # below the damping: docs/design.md.
        with tf32_products(inputs.device, allowed=inputs.element_size() == 2):
            self._add(inputs.float(), targets)

    def _add(self, x: Tensor, targets: tuple[Tensor, ...] | None) -> None:
        if targets is None:
            for patches, _ in self._patches(self._layers[-1], x, None):
                self._add_inputs(self._shifted(patches))
            return
        if self._from_inputs:
            (y,) = targets
            both = (self._patches(self._layers[0], inputs, None) for inputs in (x, y.float()))
            for (patches, _), (exact, _) in zip(*both, strict=True):
                self._add_differences(patches, exact)
            return
        streams = [
            self._patches(layer, x, y.float())
            for layer, y in zip(self._layers, targets, strict=True)
        ]
        for pieces in zip(*streams, strict=True):
            self._add_missed(pieces)

    def _add_missed(self, pieces: tuple[tuple[Tensor, Tensor | None], ...]) -> None:
        """One chunk of patches, the same for all layers, and each layer's targets there."""
        shifted = self._shifted(pieces[0][0])
        vectors = self.vectors
        assert vectors is not None
        self._add_inputs(shifted)
        products = []
        row = 0
        for layer, (patches, y) in zip(self._layers, pieces, strict=True):
            assert y is not None
            # Not layer.forward: the bits of a library's convolution depend on the threads.
            weight = layer.weight_matrix().float().view(layer.groups, -1, layer.cols)
            e = y - fixed_bmm(weight, patches)
            if layer.bias is not None:
                e -= layer.bias.float().view(layer.groups, -1, 1)
            rows = slice(row, row + layer.rows)
            row = rows.stop
            products.append(fixed_bmm(e, shifted.mT).reshape(layer.rows, -1))
            vectors.missed[rows] += double_sum(e, 2).view(-1)
            vectors.energy[rows] += double_sum(e.square(), 2).view(-1)
        self.mismatch.add(torch.cat(products))

    def _add_differences(self, patches: Tensor, exact: Tensor) -> None:
        """One chunk of inputs, and of those whose outputs are wanted."""
        shifted = self._shifted(patches)
        assert self.vectors is not None
        self._add_inputs(shifted)
        d = exact - patches
        self.mismatch.add(fixed_bmm(d, shifted.mT)[0].contiguous())
        self.squares.add(_gram(d)[0])
        self.vectors.missed += _sums(d)[0]

    def _patches(
        self, layer: MatrixLayer, x: Tensor, targets: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        if self._positions is None:
            return layer.patches(x, targets)
        # Layers that share inputs draw the same positions.
        generator = self._generator.clone_state()
        if layer is self._layers[-1]:
            generator = self._generator
        return layer.patches(x, targets, positions=self._positions, generator=generator)

    def _shifted(self, patches: Tensor) -> Tensor:
        if self.vectors is None:
            first = patches[:, :, :_SHIFT_POSITIONS]
            shift = first.mean(2, dtype=torch.float64).float()
            rows = sum(layer.rows for layer in self._layers)
            if self._from_inputs:
                rows = shift.shape[1]
            missed = shift.new_zeros(rows, dtype=torch.float64)
            zeros = torch.zeros_like(shift.double())
            self.vectors = Vectors(0, shift, zeros, missed, missed.clone())
        return patches - self.vectors.shift[:, :, None]

    def _add_inputs(self, patches: Tensor) -> None:
        assert self.vectors is not None
        self.vectors.count += patches.shape[2]
        self.vectors.first += _sums(patches)
        self.covariance.add(_gram(patches))


def _sums(patches: Tensor) -> Tensor:
    """Over positions, [groups, cols]."""
    if patches.is_cuda:  # where a product is one long float32 sum
        return double_sum(patches, 2)
    # As a product: sums in float64 took longer than everything else here.
    ones = patches.new_ones(len(patches), patches.shape[2], 1)
    return fixed_bmm(patches, ones)[..., 0]


def _gram(patches: Tensor) -> Tensor:
    """patches patches^T, float32 [groups, cols, cols]."""
    groups, cols, _ = patches.shape
    tile = _COLS_PER_TILE.on(patches.device)
    if groups > 1 or cols <= 2 * tile:
        return fixed_bmm(patches, patches.mT).contiguous()
    gram = patches.new_empty(1, cols, cols)
    for begin in range(0, cols, tile):
        end = min(begin + tile, cols)
        product = fixed_bmm(patches[:, begin:end], patches[:, :end].mT)
        gram[:, begin:end, :end] = product
        gram[:, :begin, begin:end] = product[:, :, :begin].mT
    return gram
