"""Where d loss / d weight_q comes from: the Gram matrix, or minibatches through the layer.

Both give the loss of eq. (25) without its regularizer, a row (output channel) at a time, since rows
are independent: the activation function, where there is one, is elementwise.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from adaround_ext.layers import MatrixLayer
from adaround_ext.statistics import LEAST_ROWS, GramStatistics

_EVALUATION_BATCH = 64


class Objective(Protocol):
    """What the loop needs."""

    as_error: bool  # gradient takes w_q - w instead of w_q
    row_energies: Tensor  # float64 [rows]: mean square of the full-precision outputs

    def gradient(self, weight_q: Tensor) -> Tensor:
        """d loss / d weight_q [rows, cols] for the soft weights or errors [rows, cols]."""

    def row_losses(self, weight_q: Tensor) -> Tensor:
        """The loss of each row on all calibration data, float64 [rows]."""


class GramObjective:
    """tr(D G D^T) - 2 <D, M> + E[e^2], D = w_q - w, M = E[e x^T]: exact without an activation.

    The gradient is 2 (D G - M), one matrix product whatever the number of samples (the paper's
    eq. (19) with E[x x^T] precomputed, appendix B for convolutions). With targets, e is what the
    full-precision layer on these inputs misses of them (asymmetric reconstruction), else 0. Loss
    and gradient of :meth:`gradient` are divided by the mean of G's diagonal, so that one
    learning rate and reg_weight fit all layers; :meth:`row_losses` is in the data's units.
    """

    as_error = True

    def __init__(self, weight: Tensor, statistics: GramStatistics, normalize: bool) -> None:
        self._weight = weight
        gram = statistics.gram
        mean = float(gram.diagonal(dim1=1, dim2=2).mean()) if normalize else 1.0
        self.divisor = mean if mean > 0 else 1.0
        self.gram = (gram / self.divisor).float()
        self.mismatch = (
            (statistics.mismatch / self.divisor).float() if statistics.has_targets else None
        )
        self._mismatch_energy = statistics.mismatch_energy
        rows = max(len(weight), LEAST_ROWS) if len(gram) == 1 else len(weight)
        self._padded = weight.new_empty(rows, weight.shape[1])
        energies = self._quadratic(weight)
        if self.mismatch is not None:
            cross = (weight * self.mismatch).sum(1, dtype=torch.float64)
            energies = energies + self.divisor * 2 * cross + self._mismatch_energy
        self.row_energies = energies

    def gradient(self, weight_q: Tensor) -> Tensor:
        grad = self._product(weight_q, self._padded)
        if self.mismatch is not None:
            grad -= self.mismatch
        return grad.mul_(2)

    def residual(self, error: Tensor) -> Tensor:
        """D G - M [rows, cols], half the gradient, for coordinate descent under ``gram``."""
        return self.gradient(error) / 2

    def row_losses(self, weight_q: Tensor) -> Tensor:
        error = weight_q - self._weight
        losses = self._quadratic(error)
        if self.mismatch is not None:
            cross = (error * self.mismatch).sum(1, dtype=torch.float64)
            losses = losses - self.divisor * 2 * cross + self._mismatch_energy
        return losses

    def _quadratic(self, rows: Tensor) -> Tensor:
        """diag(rows G rows^T), float64 [rows], in the data's units."""
        product = self._product(rows, torch.empty_like(self._padded))
        return self.divisor * (product * rows).sum(1, dtype=torch.float64)

    def _product(self, rows: Tensor, out: Tensor) -> Tensor:
        """rows G [rows, cols], group by group, in the memory of ``out`` [rows or more, cols]."""
        groups, cols, _ = self.gram.shape
        if len(out) > len(rows):
            rows = F.pad(rows, (0, 0, 0, len(out) - len(rows)))
        shape = (groups, -1, cols)
        torch.bmm(rows.view(shape), self.gram, out=out.view(shape))
        return out[: len(self._weight)]


class SampledObjective:
    """E ||f(W x) - f(w_q x^)||^2 over minibatches of samples: any activation function f.

    ``inputs`` and ``targets`` (what the layer should give before f) are held on the device.
    Minibatches are drawn there, with replacement, from an own generator.
    """

    as_error = False

    def __init__(
        self,
        layer: MatrixLayer,
        weight: Tensor,
        inputs: Tensor,
        targets: Tensor,
        activation: Callable[[Tensor], Tensor] | None,
        batch_size: int,
        normalize: bool,
        seed: int,
    ) -> None:
        self._layer = layer
        self._weight_shape = weight.shape
        self._bias = layer.bias
        self._inputs = inputs
        self._activation: Callable[[Tensor], Tensor] = activation or torch.nn.Identity()
        self._targets = self._activation(targets)
        self._batch_size = batch_size
        self._generator = torch.Generator(inputs.device).manual_seed(seed)
        mean = float(inputs.square().mean(dtype=torch.float64)) if normalize else 1.0
        self._divisor = mean if mean > 0 else 1.0
        zeros = torch.zeros_like(weight)
        self.row_energies = self._mean_square(zeros, relative_to_zero=True)

    def gradient(self, weight_q: Tensor) -> Tensor:
        chosen = torch.randint(
            len(self._inputs),
            (self._batch_size,),
            generator=self._generator,
            device=self._inputs.device,
        )
        x, y = self._inputs[chosen], self._targets[chosen]
        with torch.enable_grad():
            leaf = weight_q.detach().requires_grad_()
            difference = self._outputs(x, leaf) - y
            positions = y.numel() // y.shape[1]
            loss = difference.square().sum() / (positions * self._divisor)
            (grad,) = torch.autograd.grad(loss, leaf)
        return grad.contiguous()

    def row_losses(self, weight_q: Tensor) -> Tensor:
        return self._mean_square(weight_q, relative_to_zero=False)

    def _outputs(self, x: Tensor, matrix: Tensor) -> Tensor:
        weight = self._layer.weight_from_matrix(matrix)
        return self._activation(self._layer.forward(x, weight, self._bias))

    def _mean_square(self, weight_q: Tensor, relative_to_zero: bool) -> Tensor:
        """Mean over samples and positions of (outputs - targets)^2, or of targets^2, [rows]."""
        total = torch.zeros(weight_q.shape[0], dtype=torch.float64, device=weight_q.device)
        for x, y in zip(
            self._inputs.split(_EVALUATION_BATCH),
            self._targets.split(_EVALUATION_BATCH),
            strict=True,
        ):
            difference = y if relative_to_zero else self._outputs(x, weight_q) - y
            total += difference.square().transpose(0, 1).flatten(1).sum(1, dtype=torch.float64)
        return total / (self._targets.numel() // self._targets.shape[1])
