"""Gram objective: the loss of a layer's outputs as a quadratic form of its weights.

Like the sampled objective it is the loss of eq. (25) without its regularizer, a row (output
channel) at a time, since rows are independent.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from adaround_ext.grid import QuantGrid
from adaround_ext.linalg.products import fixed_bmm
from adaround_ext.linalg.sums import double_sum
from adaround_ext.rounding.gptq import GptqFactor, OrderedCholesky
from adaround_ext.rounding.solution import Quadratic, comparable
from adaround_ext.statistics.moments import GramStatistics
from adaround_ext.tensors import RowTerms


@dataclass(frozen=True)
class ObjectiveTerms(RowTerms):
    """Terms of a Gram objective for each row.

    weight: the layer's, and target: where the damped loss is least, float32 [rows, cols]. unit:
    of the losses; bias: the layer's, 0 without one; missed: E[e]; constant: of the loss, E[e^2]
    less what the bias takes up; energies: E[(w x + e)^2]; float64 [rows]. mismatch: M in the
    unit, float32 [rows, cols], None without targets.
    """

    weight: Tensor
    target: Tensor
    unit: Tensor
    bias: Tensor
    missed: Tensor
    constant: Tensor
    energies: Tensor
    mismatch: Tensor | None


@dataclass(frozen=True, eq=False)
class GramMatrices:
    """Matrices that rows share, in the unit of their group.

    gram: G + d I, and undamped: G, float32 [groups, cols, cols]; mean: of the inputs, float64
    [groups, cols]. factor: of ``gram``, where it is known already. dtype: of the annealing.
    """

    gram: Tensor
    undamped: Tensor
    mean: Tensor
    dtype: torch.dtype
    factor: GptqFactor | None = None

    @staticmethod
    def cat(matrices: Sequence[GramMatrices]) -> GramMatrices:
        """The groups of all, in their order."""
        gram, undamped, mean = (
            torch.cat([getattr(group, name) for group in matrices])
            for name in ("gram", "undamped", "mean")
        )
        return GramMatrices(gram, undamped, mean, matrices[0].dtype)

    @cached_property
    def gptq_factor(self) -> GptqFactor:
        return GptqFactor.make(self.gram) if self.factor is None else self.factor

    @cached_property
    def twice_gram(self) -> Tensor:
        """2 (G + d I) in ``dtype``."""
        return (2 * self.gram).to(self.dtype)


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
        bias: Tensor | None = None,
        stored_dtype: torch.dtype | None = None,
    ) -> None:
        """Of float32 ``weight`` [rows, cols] and the statistics of its inputs.

        bias: the layer's, float64 [rows], None for 0. stored_dtype: of the layer's weight and
        bias, None for weight's. dtype: of gradients.
        """
        self.centred = centred
        self.damping = damping
        self.stored_dtype = weight.dtype if stored_dtype is None else stored_dtype
        moments = statistics.covariance if centred else statistics.gram()
        typical = _typical(moments.diagonal(dim1=1, dim2=2))
        divisor = typical if normalize else torch.ones_like(typical)
        moments = moments / divisor[:, None, None]
        undamped = moments.float()
        if damping > 0:
            moments.diagonal(dim1=1, dim2=2).add_((damping * typical / divisor)[:, None])
        unit = divisor.repeat_interleave(len(weight) // len(divisor))
        zeros = torch.zeros_like(unit)
        bias = zeros if bias is None else bias
        missed = statistics.mismatch_mean
        terms = ObjectiveTerms(weight, weight, unit, bias, missed, zeros, zeros, None)
        factor = None
        if statistics.has_targets:
            cholesky = OrderedCholesky.of(moments)
            terms = self._with_targets(terms, cholesky, statistics)
            factor = cholesky.gptq_factor()
        matrices = GramMatrices(moments.float(), undamped, statistics.mean, dtype, factor)
        self._assemble(matrices, terms)
        self._measure_energies()
        if not bool(self.row_energies.isfinite().all()):
            raise ValueError(
                "weights, inputs and targets must be so small that float32 holds the squares of "
                "outputs, got larger values"
            )

    def _with_targets(
        self, terms: ObjectiveTerms, cholesky: OrderedCholesky, s: GramStatistics
    ) -> ObjectiveTerms:
        mismatch = (s.mismatch if self.centred else s.plain_mismatch()) / terms.unit[:, None]
        moved = cholesky.solve(mismatch.view(len(s.mean), -1, s.mean.shape[1]))
        return dataclasses.replace(
            terms,
            target=(terms.weight.double() + moved.reshape(mismatch.shape)).float(),
            constant=s.mismatch_energy - (s.mismatch_mean.square() if self.centred else 0.0),
            mismatch=mismatch.float(),
        )

    def _assemble(self, matrices: GramMatrices, terms: ObjectiveTerms) -> None:
        super().__init__(matrices.gram, terms.target, terms.unit)
        self.matrices, self.terms = matrices, terms

    def _measure_energies(self) -> None:
        """E[(w x + e)^2]: the loss of weights of 0 with nothing of it put into the bias."""
        zeros = torch.zeros_like(self.weight)
        energies = self.row_losses(zeros)
        if self.centred:
            energies = energies + self.bias_change(zeros).square()
        self.terms = dataclasses.replace(self.terms, energies=energies)

    def _like(self, matrices: GramMatrices, terms: ObjectiveTerms) -> GramObjective:
        """Another with these settings, and none of what is kept of this one's rows."""
        other = GramObjective.__new__(GramObjective)
        other.centred, other.damping = self.centred, self.damping
        other.stored_dtype = self.stored_dtype
        other._assemble(matrices, terms)
        return other

    def without_targets(self) -> GramObjective:
        """The same inputs, with the layers' outputs on them as targets."""
        weight, zeros = self.weight, torch.zeros_like(self.unit)
        terms = dataclasses.replace(
            self.terms, target=weight, missed=zeros, constant=zeros, mismatch=None
        )
        plain = self._like(self.matrices, terms)
        plain._measure_energies()
        return plain

    def rows(self, rows: slice | Tensor) -> GramObjective:
        """The objective of some of the rows, where all have one Gram matrix."""
        return self._like(self.matrices, self.terms[rows])

    @staticmethod
    def join(objectives: Sequence[GramObjective]) -> GramObjective:
        """The objective of all their rows; they have Gram matrices of one shape, and settings."""
        matrices = GramMatrices.cat([objective.matrices for objective in objectives])
        terms = ObjectiveTerms.cat([objective.terms for objective in objectives])
        return objectives[0]._like(matrices, terms)

    @property
    def weight(self) -> Tensor:
        """The layer's weight, float32 [rows, cols]."""
        return self.terms.weight

    @property
    def dtype(self) -> torch.dtype:
        """Of gradients and what they are taken at."""
        return self.matrices.dtype

    @property
    def row_energies(self) -> Tensor:
        """E[(w x + e)^2], float64 [rows]."""
        return self.terms.energies

    @property
    def gptq_factor(self) -> GptqFactor:
        """Of ``gram``."""
        return self.matrices.gptq_factor

    @cached_property
    def _buffer(self) -> Tensor:
        return torch.empty_like(self.weight, dtype=self.dtype)

    def gradient(self, weight_q: Tensor) -> Tensor:
        """2 D* (G + d I) in ``dtype``, for errors D* [rows, cols] from ``target``."""
        grouped = self.grouped(weight_q)
        product = fixed_bmm(grouped, self.matrices.twice_gram, self._buffer.view(grouped.shape))
        return product.reshape(weight_q.shape)

    def row_losses(self, weight_q: Tensor) -> Tensor:
        """The undamped loss of each row in the data's units, float64 [rows]."""
        error = weight_q - self.weight
        product = fixed_bmm(self.grouped(error), self.matrices.undamped).reshape(error.shape)
        losses = self.unit * double_sum(product * error, 1)
        if self.terms.mismatch is not None:
            cross = double_sum(error * self.terms.mismatch, 1)
            losses = losses - self.unit * 2 * cross + self.terms.constant
            # A mean square: below 0 is what rounding left of terms that are many times larger.
            losses = losses.clamp(min=0)
        return losses

    def bias_change(self, weight_q: Tensor) -> Tensor:
        """E[e - D x], float64 [rows]: what a bias takes up."""
        error = self.grouped((weight_q - self.weight).double())
        means = (error * self.matrices.mean[:, None, :]).sum(2).view(-1)
        return self.terms.missed - means

    def new_bias(self, weight_q: Tensor) -> Tensor:
        """The biases that take up the mean error of ``weight_q``, float64 [rows]."""
        return self.bias_change(weight_q) + self.terms.bias

    def stored_losses(self, codes: Tensor, grid: QuantGrid) -> Tensor:
        """Row losses, float64 [rows], of weights and biases as the layer's dtype stores them."""
        weight_q = grid.stored(codes, self.stored_dtype).float()
        losses = self.row_losses(weight_q)
        if self.centred:
            bias = self.new_bias(weight_q)
            losses = losses + (bias.to(self.stored_dtype).double() - bias).square()
        return comparable(losses)


def _typical(diagonal: Tensor) -> Tensor:
    """Medians [groups] of what is not 0: a few huge inputs must not set the measure. 1 for none."""
    live = diagonal.masked_fill(diagonal <= 0, torch.nan)
    return live.nanmedian(1).values.nan_to_num(1.0)
