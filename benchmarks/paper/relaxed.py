"""Relaxations that the paper compares its own with (tables 3 and 5), in plain PyTorch.

Each starts at the full-precision weight, is minimised by Adam on minibatches, and ends as codes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext.grid import QuantGrid
from adaround_ext.reference import (
    FRACTION_MARGIN,
    ReferenceConfig,
    cosine_beta,
    expand_grid,
    initial_v,
    rectified_sigmoid,
    round_reg,
)


class UpOrDown:
    """codes = clamp(floor(w / s) + z + h(V), n, p): the part that the continuous h share.

    A subclass says what h is, where V starts, and whether f_reg is part of the loss.
    """

    regularized = True

    def __init__(self, weight: Tensor, grid: QuantGrid) -> None:
        self.grid = grid
        self.scale = expand_grid(grid.scale, *weight.shape)
        self.zero_point = expand_grid(grid.zero_point, *weight.shape)
        steps = weight / self.scale
        self.below = steps.floor() + self.zero_point
        fraction = (steps - steps.floor()).clamp(FRACTION_MARGIN, 1 - FRACTION_MARGIN)
        self.v = self.start(fraction, weight).requires_grad_()

    def start(self, fraction: Tensor, weight: Tensor) -> Tensor:
        raise NotImplementedError

    def h(self, progress: float) -> Tensor:
        raise NotImplementedError

    def weight_q(self, progress: float) -> Tensor:
        """The soft weight, differentiable in v, when a share ``progress`` of the steps is done."""
        codes = (self.below + self.h(progress)).clamp(self.grid.qmin, self.grid.qmax)
        return self.scale * (codes - self.zero_point)

    def regularizer(self, beta: float) -> Tensor | None:
        return round_reg(self.h(1.0), beta) if self.regularized else None

    @torch.no_grad()
    def codes(self) -> Tensor:
        """Whole numbers: up where V >= 0."""
        up = (self.v >= 0).to(self.below.dtype)
        return (self.below + up).clamp(self.grid.qmin, self.grid.qmax)

    @torch.no_grad()
    def undecided(self) -> float:
        """The share of weights with .05 < h(V) < .95."""
        h = self.h(1.0)
        return float(((h > 0.05) & (h < 0.95)).double().mean())


class RectifiedSigmoid(UpOrDown):
    """AdaRound: h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1) with f_reg, eq. (23) and (24)."""

    def start(self, fraction: Tensor, weight: Tensor) -> Tensor:
        return initial_v(weight, self.grid.scale)

    def h(self, progress: float) -> Tensor:
        return rectified_sigmoid(self.v)


class Sigmoid(UpOrDown):
    """h(V) = sigmoid(V) with f_reg."""

    def start(self, fraction: Tensor, weight: Tensor) -> Tensor:
        return torch.logit(fraction)

    def h(self, progress: float) -> Tensor:
        return torch.sigmoid(self.v)


class AnnealedSigmoid(Sigmoid):
    """h(V) = sigmoid(V / T) without f_reg: T falls geometrically from 1."""

    regularized = False
    last_temperature = 0.1

    def h(self, progress: float) -> Tensor:
        return torch.sigmoid(self.v / self.last_temperature**progress)


class StraightThrough:
    """codes = clamp(round(V), n, p) for any V, with the gradient of the clamp alone (STE).

    V = w / s + z starts at the weight and may go as far as the loss leads it.
    """

    def __init__(self, weight: Tensor, grid: QuantGrid) -> None:
        self.grid = grid
        self.scale = expand_grid(grid.scale, *weight.shape)
        self.zero_point = expand_grid(grid.zero_point, *weight.shape)
        self.v = (weight / self.scale + self.zero_point).requires_grad_()

    def weight_q(self, progress: float) -> Tensor:
        codes = self.v + (self.v.round() - self.v).detach()
        return self.scale * (codes.clamp(self.grid.qmin, self.grid.qmax) - self.zero_point)

    def regularizer(self, beta: float) -> Tensor | None:
        return None

    @torch.no_grad()
    def codes(self) -> Tensor:
        return self.v.round().clamp(self.grid.qmin, self.grid.qmax)

    def undecided(self) -> float:
        return 0.0


Relaxation = UpOrDown | StraightThrough


@dataclass(frozen=True)
class Fit:
    """Codes as floats [rows, cols], and the share of weights that the last step left undecided."""

    codes: Tensor
    undecided: float


@torch.enable_grad()
def fit(
    relaxation: Relaxation,
    inputs: Tensor,
    targets: Tensor,
    forward: Callable[[Tensor, Tensor], Tensor],
    settings: ReferenceConfig,
    *,
    falling: bool = False,
) -> Fit:
    """The paper's loop, eq. (25), as in :func:`adaround_ext.reference.optimize`, with another h.

    Outputs have their channels in dimension 1. The learning rate is constant, or falls to 0 along
    a line.
    """
    generator = torch.Generator().manual_seed(settings.seed)
    adam = torch.optim.Adam([relaxation.v], lr=settings.learning_rate, fused=True)
    for step in range(settings.steps):
        if falling:
            adam.param_groups[0]["lr"] = settings.learning_rate * (1 - step / settings.steps)
        chosen = torch.randint(len(inputs), (settings.batch_size,), generator=generator)
        weight_q = relaxation.weight_q(step / settings.steps)
        missed = forward(inputs[chosen], weight_q) - targets[chosen]
        loss = missed.square().sum(1).mean()
        if step >= settings.warmup * settings.steps:
            beta = cosine_beta(step, settings.steps, settings.beta, settings.warmup)
            regularizer = relaxation.regularizer(beta)
            if regularizer is not None:
                loss = loss + settings.reg_weight * regularizer
        adam.zero_grad()
        loss.backward()
        adam.step()
    return Fit(relaxation.codes(), relaxation.undecided())
