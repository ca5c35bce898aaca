"""The paper's loop in plain PyTorch: the benchmarks' baseline."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext.reference.rounding import (
    expand_grid,
    hard_quantize,
    initial_v,
    rectified_sigmoid,
    round_reg,
)


@dataclass(frozen=True)
class ReferenceConfig:
    """Settings of :func:`optimize`; the paper's where it states them (section 5), else AIMET's.

    Attributes:
        steps: Of Adam.
        batch_size: Samples a step.
        learning_rate: Of Adam.
        reg_weight: Lambda of eq. (25).
        beta: (from, to) of the regularizer's exponent.
        warmup: The share of steps before the regularizer is on.
        seed: Of the minibatches.
    """

    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    reg_weight: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    seed: int = 0


def cosine_beta(step: int, steps: int, beta: tuple[float, float], warmup: float) -> float:
    """The regularizer's exponent, which falls along half a cosine after the warm-up.

    Args:
        step: From 0 to ``steps``.
        steps: In all.
        beta: (from, to).
        warmup: The share of steps in which it stays where it begins.

    Returns:
        beta of this step.
    """
    start = warmup * steps
    share = max(step - start, 0.0) / max(steps - start, 1.0)
    high, low = beta
    return low + 0.5 * (high - low) * (1 + math.cos(share * math.pi))


class Optimizer:
    """The state of the paper's algorithm for one layer: everything that lives from step to step.

    Args:
        weight: [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        config: The settings.
        fused: Take PyTorch's fused Adam, faster than its loop.
    """

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        zero_point: Tensor,
        qmin: int,
        qmax: int,
        config: ReferenceConfig,
        *,
        fused: bool = True,
    ) -> None:
        rows, cols = weight.shape
        self.config = config
        self.s = expand_grid(scale, rows, cols).contiguous()
        self.z = expand_grid(zero_point, rows, cols).to(weight.dtype).contiguous()
        self.below = torch.floor(weight / self.s) + self.z  # constant: not computed every step
        self.qmin, self.qmax = qmin, qmax
        self.v = initial_v(weight, scale).requires_grad_()
        self.adam = torch.optim.Adam([self.v], lr=config.learning_rate, fused=fused)

    def soft_weight(self, h: Tensor) -> Tensor:
        return self.s * ((self.below + h).clamp(self.qmin, self.qmax) - self.z)

    def loss(self, reconstruction: Callable[[Tensor], Tensor], step: int) -> Tensor:
        """Reconstruction error plus regularizer, eq. (25); h(V) is computed once for both."""
        h = rectified_sigmoid(self.v)
        loss = reconstruction(self.soft_weight(h))
        if step >= self.config.warmup * self.config.steps:
            config = self.config
            beta = cosine_beta(step, config.steps, config.beta, config.warmup)
            loss = loss + config.reg_weight * round_reg(h, beta)
        return loss

    def step(self, reconstruction: Callable[[Tensor], Tensor], step: int) -> None:
        self.adam.zero_grad()
        self.loss(reconstruction, step).backward()
        self.adam.step()


def optimize(
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    inputs: Tensor,
    targets: Tensor,
    forward: Callable[[Tensor, Tensor], Tensor],
    config: ReferenceConfig | None = None,
    *,
    channel_dim: int = -1,
) -> Tensor:
    """AdaRound as the paper has it: Adam on minibatches of samples, eq. (25).

    The loss is the squared error summed over channels, averaged over the rest.

    Args:
        weight: [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        inputs: [samples, ...].
        targets: The full-precision outputs for them (after the activation function, if ``forward``
            applies one).
        forward: Maps (inputs, weight [rows, cols]) to outputs.
        config: The settings, None for the defaults.
        channel_dim: Of the outputs.

    Returns:
        Codes [rows, cols], int8 where qmin < 0, else uint8.
    """
    config = config or ReferenceConfig()
    generator = torch.Generator(device=inputs.device).manual_seed(config.seed)
    state = Optimizer(weight, scale, zero_point, qmin, qmax, config)
    for step in range(config.steps):
        chosen = torch.randint(
            len(inputs), (config.batch_size,), generator=generator, device=inputs.device
        )
        x, y = inputs[chosen], targets[chosen]

        def reconstruction(weight_q: Tensor, x: Tensor = x, y: Tensor = y) -> Tensor:
            return (forward(x, weight_q) - y).square().sum(channel_dim).mean()

        state.step(reconstruction, step)
    return hard_quantize(weight, state.v.detach(), scale, zero_point, qmin, qmax)
