"""What changes from step to step: beta, the regularizer's weight, the learning rate, Adam's
bias corrections. Pure functions."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaround_ext.reference.rounding import ADAM_BETAS, cosine_beta


def schedule_table(
    steps: int,
    learning_rate: float,
    reg_weight: float,
    beta: tuple[float, float],
    warmup: float,
) -> Tensor:
    """The schedule of :func:`adaround_ext.ops.rounding.rounding_step_`, float32 [steps, 5].

    A row a step: beta, falling from beta[0] to beta[1] along half a cosine after the warm-up;
    reg_weight, 0 during the warm-up; the learning rate; 1 - 0.9^t; sqrt(1 - 0.999^t), t from 1.
    """
    start = warmup * steps
    rows = [
        (
            cosine_beta(step, steps, beta, warmup),
            reg_weight if step >= start else 0.0,
            learning_rate,
            1 - ADAM_BETAS[0] ** (step + 1),
            math.sqrt(1 - ADAM_BETAS[1] ** (step + 1)),
        )
        for step in range(steps)
    ]
    return torch.tensor(rows, dtype=torch.float32, device="cpu").view(steps, 5)
