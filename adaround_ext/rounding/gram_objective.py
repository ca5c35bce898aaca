"""Where d loss / d weight_q comes from: the Gram matrix, or minibatches through the layer.

Both give the loss of eq. (25) without its regularizer, a row (output channel) at a time, since rows
are independent: the activation function, where there is one, is elementwise.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from adaround_ext.linalg.products import fixed_bmm
from adaround_ext.linalg.sums import double_sum
from adaround_ext.rounding.gptq import GptqFactor, OrderedCholesky
from adaround_ext.rounding.solution import Quadratic
from adaround_ext.statistics.moments import GramStatistics

# What a Gram objective has a value or a row of for each row, beside _mismatch, which may be None.
_OF_ROWS = ("target", "unit", "row_energies", "_weight", "_missed", "_constant")


class GramObjective(Quadratic):
    """tr(D G D^T) - 2 <D, M> + E[e^2], D = w_q - w, M = E[e x^T]: exact without an activation.

    One matrix product a gradient, whatever the number of samples (the paper's eq. (19) with
    E[x x^T] precomputed, appendix B for convolutions). With targets, e is what the full-precision
    layer on these inputs misses of them (asymmetric reconstruction), else 0.

    ``centred``: the bias will take up the mean error, so moments are taken about their means.

    What the search minimises is tr(D* (G + d I) D*^T) for D* = w_q - ``target``: d is ``damping``
    times the median of G's diagonal, which keeps it from fitting the noise of few samples, and
    target = w + M (G + d I)^-1 is where the damped loss has its minimum. ``gram`` is G + d I,
    divided by that median where ``normalize``, so that one learning rate and reg_weight fit all
    layers; every group of a convolution has its own. :meth:`row_losses` is undamped and in the
    data's units.
    """

    as_error = True
    generator: torch.Generator | None = None

    def __init__(
        self,
        weight: Tensor,
        statistics: GramStatistics,
        *,
        centred: bool = False,
        damping: float = 0.0,
        normalize: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.centred = centred
        self.damping = damping
        self.dtype = dtype
        self._weight = weight
        self._mean = statistics.mean
        self._missed = statistics.mismatch_mean
        moments = statistics.covariance if centred else statistics.gram()
        typical = _typical(moments.diagonal(dim1=1, dim2=2))
        divisor = typical if normalize else torch.ones_like(typical)
        moments = moments / divisor[:, None, None]
        self._undamped = moments.float()
        if damping > 0:
            moments.diagonal(dim1=1, dim2=2).add_((damping * typical / divisor)[:, None])
        unit = divisor.repeat_interleave(len(weight) // len(divisor))
        super().__init__(moments.float(), weight, unit)
        self._mismatch: Tensor | None = None
        self._constant = torch.zeros_like(self.unit)
        if statistics.has_targets:
            self._add_targets(moments, statistics)
        self.row_energies = self._energies()
        if not bool(self.row_energies.isfinite().all()):
            raise ValueError(
                "weights, inputs and targets must be so small that float32 holds the squares of "
                "outputs, got larger values"
            )

    def _energies(self) -> Tensor:
        """E[(w x + e)^2]: the loss of weights of 0 with nothing of it put into the bias."""
        nothing = torch.zeros_like(self._weight)
        energies = self.row_losses(nothing)
        return energies + self.bias_change(nothing).square() if self.centred else energies

    def _add_targets(self, moments: Tensor, s: GramStatistics) -> None:
        mismatch = (s.mismatch if self.centred else s.plain_mismatch()) / self.unit[:, None]
        self._mismatch = mismatch.float()
        self._constant = s.mismatch_energy - (s.mismatch_mean.square() if self.centred else 0.0)
        factor = OrderedCholesky.of(moments)
        moved = factor.solve(mismatch.view(len(moments), -1, moments.shape[1]))
        self.target = (self._weight.double() + moved.reshape(mismatch.shape)).float()
        self.gptq_factor = factor.gptq_factor()

    def without_targets(self) -> GramObjective:
        """The same inputs, with the layers' outputs on them as targets."""
        plain = copy.copy(self)
        plain.__dict__.pop("target_product", None)
        plain.target, plain._mismatch = self._weight, None
        plain._missed, plain._constant = map(torch.zeros_like, (self._missed, self._constant))
        plain.row_energies = plain._energies()
        return plain

    def rows(self, part: slice | Tensor) -> GramObjective:
        """The objective of some of the rows, where all have one Gram matrix."""
        own = copy.copy(self)
        for name in ("_buffer", "target_product"):  # cached, and of all rows
            own.__dict__.pop(name, None)
        for name in _OF_ROWS:
            setattr(own, name, getattr(self, name)[part])
        own._mismatch = None if self._mismatch is None else self._mismatch[part]
        return own

    @staticmethod
    def join(objectives: Sequence[GramObjective]) -> GramObjective:
        """The objective of all their rows; they have Gram matrices of one shape, and settings."""
        joined = copy.copy(objectives[0])
        for name in ("_twice_gram", "_buffer", "target_product", "gptq_factor"):
            joined.__dict__.pop(name, None)
        for name in ("gram", "_undamped", "_mean", *_OF_ROWS):
            setattr(joined, name, torch.cat([getattr(own, name) for own in objectives]))
        missed = [own._mismatch for own in objectives]
        if any(mismatch is not None for mismatch in missed):
            none = torch.zeros_like(objectives[0]._weight)
            joined._mismatch = torch.cat([none if own is None else own for own in missed])
        return joined

    @cached_property
    def gptq_factor(self) -> GptqFactor:
        """Of ``gram``."""
        return GptqFactor.make(self.gram)

    @cached_property
    def _twice_gram(self) -> Tensor:
        return (2 * self.gram).to(self.dtype)

    @cached_property
    def _buffer(self) -> Tensor:
        return torch.empty_like(self._weight, dtype=self.dtype)

    def gradient(self, weight_q: Tensor) -> Tensor:
        """2 D* (G + d I) in ``dtype``, for errors D* [rows, cols] from ``target``."""
        grouped = self.grouped(weight_q)
        product = fixed_bmm(grouped, self._twice_gram, self._buffer.view(grouped.shape))
        return product.reshape(weight_q.shape)

    def row_losses(self, weight_q: Tensor) -> Tensor:
        """The undamped loss of each row in the data's units, float64 [rows]."""
        error = weight_q - self._weight
        product = fixed_bmm(self.grouped(error), self._undamped).reshape(error.shape)
        losses = self.unit * double_sum(product * error, 1)
        if self._mismatch is not None:
            cross = double_sum(error * self._mismatch, 1)
            losses = losses - self.unit * 2 * cross + self._constant
            # A mean square: below 0 is what rounding left of terms that are many times larger.
            losses = losses.clamp(min=0)
        return losses

    def bias_change(self, weight_q: Tensor) -> Tensor:
        """E[e - D x], float64 [rows]: what a bias takes up."""
        error = self.grouped((weight_q - self._weight).double())
        means = (error * self._mean[:, None, :]).sum(2).view(-1)
        return self._missed - means


def _typical(diagonal: Tensor) -> Tensor:
    """Medians [groups] of what is not 0: a few huge inputs must not set the measure. 1 for none."""
    live = diagonal.masked_fill(diagonal <= 0, torch.nan)
    return live.nanmedian(1).values.nan_to_num(1.0)
