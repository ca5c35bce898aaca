"""Streaming moments of a layer's inputs: all that the Gram objective needs of the data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.layers.inputs import Batch
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.linalg.products import fixed_bmm
from adaround_ext.statistics.accumulate import MatrixSum
from adaround_ext.statistics.segment import SegmentSums, Vectors
from adaround_ext.tensors import RowTerms

_OUTLIER = 1e4
ROWS_PER_TILE = 4096  # in float64 at a time


@dataclass(frozen=True)
class MissedTerms(RowTerms):
    """Moments of e, what the layers miss of their targets, for each row.

    mismatch [rows, cols] = E[e (x - mean)^T], mean [rows] = E[e], energy [rows] = E[e^2], float64;
    conv_group: whose inputs the row sees, int64 [rows].
    """

    mismatch: Tensor
    mean: Tensor
    energy: Tensor
    conv_group: Tensor


class GramStatistics:
    """Moments of the inputs x and, with targets, of what they miss; float64.

    For layers that share their inputs, with weights W_i stacked to [rows, cols]:
    mean [groups, cols] = E[x]; covariance [groups, cols, cols] = E[(x - mean) (x - mean)^T];
    and for e = target - (W x + b), all zero without targets, mismatch_mean [rows] = E[e],
    mismatch [rows, cols] = E[e (x - mean)^T] and mismatch_energy [rows] = E[e^2]. The mean is over
    samples and output positions. Nothing here grows with the number of samples.

    ``from_inputs``, for linear layers: targets are the inputs that give what is wanted, one tensor
    for all layers. Then e = W d for d = target - x, and E[d (x - mean)^T] and E[d d^T] are
    collected: less work where there are more rows than columns.

    The data come in segments, each with sums of its own. Those are added up in the order of the
    segments, whoever made them: so the bits do not depend on how many processes there are.
    """

    covariance: Tensor
    mean: Tensor
    missed: MissedTerms

    def __init__(
        self,
        layers: list[MatrixLayer],
        positions: int | None,
        seed: int,
        ranks: Ranks = ALONE,
        from_inputs: bool = False,
    ) -> None:
        """positions: drawn of each sample, None for all. ranks: who has the other segments."""
        first = layers[0]
        self._device = first.weight.device
        self._layers, self._positions, self._seed = layers, positions, seed
        self._ranks = ranks
        self._from_inputs = from_inputs
        groups = torch.arange(first.groups, device=self._device)
        per_layer = [groups.repeat_interleave(item.rows // first.groups) for item in layers]
        self._conv_group = torch.cat(per_layer)  # of each row
        self._segment = 0
        self._open: SegmentSums | None = None
        self._closed: list[Vectors] = []
        self._covariance = MatrixSum(ranks, (first.groups, first.cols, first.cols))
        rows = first.cols if from_inputs else len(self._conv_group)
        self._mismatch = MatrixSum(ranks, (rows, first.cols))
        self._squares = MatrixSum(ranks, (first.cols, first.cols))
        self.count = 0
        self.has_targets = False

    def gram(self) -> Tensor:
        """E[x x^T], float64 [groups, cols, cols]."""
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]

    @property
    def mismatch(self) -> Tensor:
        """E[e (x - mean)^T], float64 [rows, cols]."""
        return self.missed.mismatch

    @property
    def mismatch_mean(self) -> Tensor:
        """E[e], float64 [rows]."""
        return self.missed.mean

    @property
    def mismatch_energy(self) -> Tensor:
        """E[e^2], float64 [rows]."""
        return self.missed.energy

    def plain_mismatch(self) -> Tensor:
        """E[e x^T], float64 [rows, cols]."""
        missed = self.missed
        return missed.mismatch + missed.mean[:, None] * self.mean[missed.conv_group]

    def collect(self, batches: Iterator[Batch]) -> None:
        """Adds every batch; the moments are ready afterwards."""
        for inputs, targets in batches:
            self.add(inputs, targets)
        self.finish()

    def add(self, inputs: Tensor, targets: tuple[Tensor, ...] | None, segment: int = 0) -> None:
        """Adds a batch as :func:`adaround_ext.layers.inputs.batches` gives it; segments in order.

        Without targets, the layers' own outputs are what is wanted.
        """
        if segment != self._segment:
            self._close()
            self._segment = segment
        if self._open is None:  # each segment draws for itself, whoever has it
            seed = self._seed + segment
            self._open = SegmentSums(self._layers, self._positions, seed, self._from_inputs)
        self._open.add(inputs, targets)

    def _close(self) -> None:
        sums, self._open = self._open, None
        if sums is None:
            return
        sums.finish()
        if sums.vectors is not None:
            self._closed.append(sums.vectors)
            self._covariance.add(sums.covariance.value)
            self._mismatch.add(sums.mismatch.value)
            self._squares.add(sums.squares.value)

    def finish(self) -> None:
        """Joins what all segments have; the moments are ready afterwards."""
        self._close()
        of_rank = self._closed, len(self._covariance), len(self._mismatch)
        of_ranks = self._ranks.gather(of_rank, "statistics")
        segments, inputs, targets = zip(*of_ranks, strict=True)
        self.has_targets = any(targets)
        covariance = self._covariance.total(self._device, list(inputs))
        mismatch = self._mismatch.total(self._device, list(targets))
        self._closed = []
        names = ", ".join(str(layer.layer) for layer in self._layers)
        if not any(inputs):
            raise ValueError(f"inputs of {names} must hold at least one sample, got none")
        self._join([vectors for closed in segments for vectors in closed], covariance, mismatch)
        if self._from_inputs:
            squares = self._squares.total(self._device, list(targets)) / self.count
            self.missed = self._of_outputs(self.missed, squares)
        if not all(t.isfinite().all() for t in (self.covariance, self.mismatch_energy)):
            raise ValueError(
                f"{'inputs and targets' if self.has_targets else 'inputs'} of {names} must be so "
                "small that float32 holds their squares, got larger values"
            )

    def _join(self, segments: list[Vectors], covariance: Tensor, mismatch: Tensor) -> None:
        """From sums about each segment's shift to moments about the mean, in the same memory."""

        def stacked(name: str) -> Tensor:
            return torch.stack([getattr(vectors, name).to(self._device) for vectors in segments])

        shifts, firsts, missed, energies = map(stacked, ("shift", "first", "missed", "energy"))
        counts = [vectors.count for vectors in segments]
        self.count = sum(counts)
        n = torch.tensor(counts, dtype=torch.float64, device=self._device)[:, None, None]
        moved = shifts.double() - shifts[0].double()
        if len(counts) > 1:
            self._move(covariance, mismatch, moved, firsts + n * moved / 2, missed)
        covariance /= self.count
        mismatch /= self.count
        mean = (firsts + n * moved).sum(0) / self.count
        mismatch_mean = missed.sum(0) / self.count
        # Until here everything is of x - the first shift.
        covariance -= mean[:, :, None] * mean[:, None, :]
        mismatch -= mismatch_mean[:, None] * (mean if self._from_inputs else mean[self._conv_group])
        self.covariance = covariance
        self.mean = mean + shifts[0].double()
        energy = energies.sum(0) / self.count
        self.missed = MissedTerms(mismatch, mismatch_mean, energy, self._conv_group)

    def _of_outputs(self, d: MissedTerms, squares: Tensor) -> MissedTerms:
        """From the moments of d to those of e = W d, some rows at a time."""
        weight = torch.cat([layer.weight_matrix() for layer in self._layers]).to(self._device)
        mismatch = d.mismatch.new_zeros(weight.shape)
        mean = d.mean.new_zeros(len(weight))
        energy = d.mean.new_zeros(len(weight))
        for begin in range(0, len(weight), ROWS_PER_TILE) if self.has_targets else ():
            tile = slice(begin, begin + ROWS_PER_TILE)
            rows = weight[tile].double()
            mismatch[tile] = fixed_bmm(rows[None], d.mismatch[None])[0]
            mean[tile] = fixed_bmm(rows[None], d.mean[None, :, None])[0, :, 0]
            energy[tile] = (fixed_bmm(rows[None], squares[None])[0] * rows).sum(1)
        return MissedTerms(mismatch, mean, energy, d.conv_group)

    def _move(
        self, covariance: Tensor, mismatch: Tensor, moved: Tensor, centres: Tensor, missed: Tensor
    ) -> None:
        """The matrices from each segment's shift to the first one's, d = ``moved`` further on.

        sum (x' + d) (x' + d)^T = sum x' x'^T + a + a^T, a = d (sum x' + n d / 2)^T;
        sum e (x' + d)^T = sum e x'^T + (sum e) d^T.
        """
        half = fixed_bmm(moved.permute(1, 2, 0), centres.transpose(0, 1))
        covariance += half + half.mT
        if self.has_targets and len(covariance) == 1:
            mismatch += fixed_bmm(missed.t()[None], moved.transpose(0, 1))[0]
        elif self.has_targets:  # a product a row, since each has its group
            of_rows = moved[:, self._conv_group].transpose(0, 1)
            mismatch += torch.bmm(missed.t()[:, None], of_rows)[:, 0]

    def notes(self) -> tuple[str, ...]:
        """What is unusual about these moments and matters to whoever reads the result."""
        notes = []
        cols = self.mean.shape[1]
        if self.count <= cols:
            notes.append(f"{self.count} positions for {cols} columns: the Gram matrix is singular")
        second = self.covariance.diagonal(dim1=1, dim2=2) + self.mean.square()
        dead = int((second == 0).sum())
        if dead:
            notes.append(f"{dead} of {second.numel()} inputs are always 0: their weights are free")
        typical = second[second > 0].median() if dead < second.numel() else second.new_zeros(())
        loud = int((second > _OUTLIER * typical).sum())
        if typical > 0 and loud:
            notes.append(
                f"{loud} inputs have more than {_OUTLIER:g} times the median's mean square"
            )
        return tuple(notes)

    def rows(self, rows: Tensor) -> GramStatistics:
        """The same statistics for some of the stacked rows."""
        of_rows = copy.copy(self)
        of_rows.missed = self.missed[rows]
        return of_rows
