"""Streaming moments of a layer's inputs: all that the Gram objective needs of the data."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from adaround_ext.data import Batch, Rebatcher
from adaround_ext.layers import MatrixLayer
from adaround_ext.products import fixed_bmm

# Inputs are cut again into this many samples (tokens of a linear layer) before X X^T, so that the
# sums do not depend on how the caller cut the data.
_SAMPLES, TOKENS = 32, 8192
# X X^T is symmetric: only blocks on and below the diagonal are computed, this many columns each.
_BLOCK = 192
_SHIFT_POSITIONS = 256  # enough for the rough mean that inputs are shifted by
_OUTLIER = 1e4


class GramStatistics:
    """Moments of the inputs x and, with targets, of what they miss; float64 totals.

    For layers that share their inputs, with weights W_i stacked to [rows, cols]:
    mean [groups, cols] = E[x]; covariance [groups, cols, cols] = E[(x - mean) (x - mean)^T];
    and for e = target - (W x + b), all zero without targets, mismatch_mean [rows] = E[e],
    mismatch [rows, cols] = E[e (x - mean)^T] and mismatch_energy [rows] = E[e^2]. The mean is over
    samples and output positions. Nothing here grows with the number of samples. Products are
    float32, of inputs less the mean of the first few: of large numbers with small differences
    nothing would be left.
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

        self.covariance = zeros(first.groups, first.cols, first.cols)
        self.mean = zeros(first.groups, first.cols)
        self.mismatch = zeros(rows, first.cols)
        self.mismatch_mean = zeros(rows)
        self.mismatch_energy = zeros(rows)
        groups = torch.arange(first.groups, device=device)
        per_layer = [groups.repeat_interleave(item.rows // first.groups) for item in layers]
        self._group = torch.cat(per_layer)  # of each row
        self.count = 0
        self.has_targets = False
        self._shift: Tensor | None = None  # [groups, cols, 1]
        self._rebatcher = Rebatcher(
            TOKENS if isinstance(first.layer, torch.nn.Linear) else _SAMPLES
        )

    def gram(self) -> Tensor:
        """E[x x^T], float64 [groups, cols, cols]."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]

    def plain_mismatch(self) -> Tensor:
        """E[e x^T], float64 [rows, cols]."""
        return self.mismatch + self.mismatch_mean[:, None] * self.mean[self._group]

    def collect(self, batches: Iterator[Batch]) -> None:
        """Adds every batch; the moments are ready afterwards."""
        for inputs, targets in batches:
            self.add(inputs, targets)
        self.finish()

    def add(self, inputs: Tensor, targets: tuple[Tensor, ...] | None) -> None:
        """Adds a batch as :func:`adaround_ext.data.batches` gives it.

        Without targets, the layers' own outputs are what is wanted.
        """
        for batch in self._rebatcher.push(inputs, targets):
            self._consume(*batch)

    def finish(self) -> None:
        """Adds what is held back; the moments are ready afterwards."""
        for batch in self._rebatcher.flush():
            self._consume(*batch)
        if self.count:
            self._finish()

    def _consume(self, inputs: Tensor, targets: tuple[Tensor, ...] | None) -> None:
        x = inputs.float()
        if targets is None:
            for patches, _ in self._patches(self._layers[-1], x, None):
                self._add_inputs(self._shifted(patches))
            return
        self.has_targets = True
        row = 0
        for index, (layer, target) in enumerate(zip(self._layers, targets, strict=True)):
            # Not layer.forward: the bits of a library's convolution depend on the threads.
            weight = layer.weight_matrix().float().view(layer.groups, -1, layer.cols)
            for patches, y in self._patches(layer, x, target.float()):
                assert y is not None
                e = y - fixed_bmm(weight, patches)
                if layer.bias is not None:
                    e -= layer.bias.float().view(layer.groups, -1, 1)
                shifted = self._shifted(patches)
                if index == 0:
                    self._add_inputs(shifted)
                rows = slice(row, row + layer.rows)
                self.mismatch[rows] += fixed_bmm(e, shifted.mT).reshape(layer.rows, -1)
                self.mismatch_mean[rows] += e.sum(2, dtype=torch.float64).view(-1)
                self.mismatch_energy[rows] += e.square().sum(2, dtype=torch.float64).view(-1)
            row += layer.rows

    def _finish(self) -> None:
        assert self._shift is not None
        for total in (
            self.covariance, self.mean, self.mismatch, self.mismatch_mean, self.mismatch_energy
        ):  # fmt: skip
            total /= self.count
        # Until here everything is of x - shift.
        self.covariance -= self.mean[:, :, None] * self.mean[:, None, :]
        self.mismatch -= self.mismatch_mean[:, None] * self.mean[self._group]
        self.mean += self._shift[..., 0].double()
        if not all(t.isfinite().all() for t in (self.covariance, self.mismatch_energy)):
            names = ", ".join(str(layer.layer) for layer in self._layers)
            raise ValueError(
                f"{'inputs and targets' if self.has_targets else 'inputs'} of {names} must be so "
                "small that float32 holds their squares, got larger values"
            )

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
        if self._shift is None:
            first = patches[:, :, :_SHIFT_POSITIONS]
            self._shift = first.mean(2, keepdim=True, dtype=torch.float64).float()
        return patches - self._shift

    def _add_inputs(self, patches: Tensor) -> None:
        self.count += patches.shape[2]
        # As a product: sums in float64 took longer than everything else here.
        ones = patches.new_ones(len(patches), patches.shape[2], 1)
        self.mean += fixed_bmm(patches, ones)[..., 0]
        cols = patches.shape[1]
        if patches.shape[0] > 1 or cols <= 2 * _BLOCK:
            self.covariance += fixed_bmm(patches, patches.mT)
            return
        for begin in range(0, cols, _BLOCK):
            end = min(begin + _BLOCK, cols)
            product = fixed_bmm(patches[:, begin:end], patches[:, :end].mT)
            self.covariance[:, begin:end, :end] += product
            self.covariance[:, :begin, begin:end] += product[:, :, :begin].mT

    def notes(self) -> tuple[str, ...]:
        """What is unusual about these moments and matters to whoever reads the result."""
        found = []
        cols = self.mean.shape[1]
        if self.count <= cols:
            found.append(f"{self.count} positions for {cols} columns: the Gram matrix is singular")
        second = self.covariance.diagonal(dim1=1, dim2=2) + self.mean.square()
        dead = int((second == 0).sum())
        if dead:
            found.append(f"{dead} of {second.numel()} inputs are always 0: their weights are free")
        typical = second[second > 0].median() if dead < second.numel() else second.new_zeros(())
        loud = int((second > _OUTLIER * typical).sum())
        if typical > 0 and loud:
            found.append(
                f"{loud} inputs have more than {_OUTLIER:g} times the median's mean square"
            )
        return tuple(found)

    def rows(self, rows: Tensor) -> GramStatistics:
        """The same statistics for some of the stacked rows."""
        part = copy.copy(self)
        for name in ("mismatch", "mismatch_mean", "mismatch_energy", "_group"):
            setattr(part, name, getattr(self, name)[rows])
        return part
