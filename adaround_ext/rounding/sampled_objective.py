"""Sampled objective: minibatches through the layer and its activation function."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from adaround_ext.grid import QuantGrid
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.linalg.sums import double_sum
from adaround_ext.rounding.solution import comparable

_EVALUATION_BATCH = 64


class SampledObjective:
    """E ||f(W x) - f(w_q x^)||^2 over minibatches of samples: any activation function f.

    ``inputs`` and ``targets`` (what the layer should give before f) are held on the device.
    Minibatches are drawn there, with replacement, from an own generator.
    """

    as_error = False
    dtype = torch.float32
    centred = False
    damping = 0.0

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
        self.weight = weight
        self._layer = layer
        self._bias = layer.bias
        self._inputs = inputs
        self._activation: Callable[[Tensor], Tensor] = activation or torch.nn.Identity()
        self._targets = self._activation(targets)
        self._batch_size = batch_size
        self.generator: torch.Generator | None = torch.Generator(inputs.device).manual_seed(seed)
        mean = inputs.square().mean(dtype=torch.float64)
        # Differences are divided, not their squares, which float32 does not hold for tiny inputs.
        self._unit = float(mean.sqrt()) if normalize and mean > 0 else 1.0
        zeros = torch.zeros_like(weight)
        self.row_energies = self._mean_square(zeros, relative_to_zero=True)
        if not bool(mean.isfinite() & self.row_energies.isfinite().all()):
            raise ValueError(
                f"inputs and targets of {layer.layer} must be so small that float32 holds the "
                "squares of outputs, got larger values"
            )

    def gradient(self, weight_q: Tensor) -> Tensor:
        chosen = torch.randint(
            len(self._inputs),
            (self._batch_size,),
            generator=self.generator,
            device=self._inputs.device,
        )
        x, y = self._inputs[chosen], self._targets[chosen]
        with torch.enable_grad():
            leaf = weight_q.detach().requires_grad_()
            difference = (self._outputs(x, leaf) - y) / self._unit
            positions = y.numel() // y.shape[1]
            loss = difference.square().sum() / positions
            (grad,) = torch.autograd.grad(loss, leaf)
        return grad.contiguous()

    def row_losses(self, weight_q: Tensor) -> Tensor:
        """The loss of each row on all samples, float64 [rows]."""
        return self._mean_square(weight_q, relative_to_zero=False)

    def stored_losses(self, codes: Tensor, grid: QuantGrid) -> Tensor:
        """The same of weights as the layer's dtype stores them."""
        stored = grid.stored(codes, self._layer.weight.dtype)
        return comparable(self.row_losses(stored.float()))

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
            total += double_sum(difference.square().transpose(0, 1).flatten(1), 1)
        return total / (self._targets.numel() // self._targets.shape[1])
