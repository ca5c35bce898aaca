"""Annealing of V: the loop and only the loop."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from tqdm.auto import tqdm

from adaround_ext import ops
from adaround_ext.config import AdaRoundConfig
from adaround_ext.grid import QuantGrid, expand
from adaround_ext.linalg.cuda_graph import repeat_captured
from adaround_ext.linalg.precision import tf32_products
from adaround_ext.presets import Settings

# As the kernels have them: the stretch of the rectified sigmoid, eq. (23), and Adam's decay rates.
_ZETA, _GAMMA = 1.1, -0.1
_ADAM_BETAS = (0.9, 0.999)
_FRACTION_MARGIN = 1e-4  # keeps weights on the grid off the edge of h's clip
_UNDECIDED = (0.05, 0.95)


@dataclass
class RoundingState:
    """What the loop changes, all [rows, cols]: V, Adam's moments, the soft weights or errors."""

    v: Tensor
    exp_avg: Tensor
    exp_avg_sq: Tensor
    weight_q: Tensor


@dataclass(frozen=True)
class Annealed:
    """What the loop ends with, all [rows, cols]: V, the soft weights, the codes of the hard
    decision, and which weights were still undecided, .05 < h(V) < .95."""

    v: Tensor
    weight_q: Tensor
    codes: Tensor
    undecided: Tensor


def anneal(
    weight: Tensor,
    grid: QuantGrid,
    objective: Objective,
    chosen: Settings,
    config: AdaRoundConfig,
    name: str = "layer",
) -> Annealed:
    """Gradient descent on eq. (25): the paper's loop, one fused op a step.

    weight float32 [rows, cols]: what is rounded.
    """
    v = initial_v(weight, grid)
    soft, _ = ops.soft_quantize(weight, v, grid.scale, grid.zero_point, grid.qmin, grid.qmax, 2.0)
    start = soft - weight if objective.as_error else soft
    start = start.to(objective.dtype)
    state = RoundingState(v, torch.zeros_like(v), torch.zeros_like(v), start)
    schedule = schedule_table(
        chosen.steps, chosen.learning_rate, chosen.reg_weight, config.beta, config.warmup
    ).to(weight.device)
    step = torch.zeros(1, dtype=torch.int64, device=weight.device)

    def one_step() -> None:
        grad = objective.gradient(state.weight_q)
        ops.rounding_step_(
            state.v, state.exp_avg, state.exp_avg_sq, state.weight_q, grad, weight, grid.scale,
            grid.zero_point, grid.qmin, grid.qmax, schedule, step, objective.as_error,
            config.scale_free,
        )  # fmt: skip

    precision = tf32_products(weight.device, config.products == "tf32")
    with precision, tqdm(total=chosen.steps, desc=name, disable=not config.progress) as bar:
        repeat_captured(one_step, chosen.steps, weight.device, objective.generator, bar.update)
    qrange = grid.scale, grid.zero_point, grid.qmin, grid.qmax
    soft, _ = ops.soft_quantize(weight, state.v, *qrange, 2.0)
    h = _rectified_sigmoid(state.v)
    undecided = (h > _UNDECIDED[0]) & (h < _UNDECIDED[1])
    return Annealed(state.v, soft, ops.hard_quantize(weight, state.v, *qrange), undecided)


def initial_v(weight: Tensor, grid: QuantGrid) -> Tensor:
    """V with h(V) = weight / scale - floor(weight / scale), the inverse of eq. (23), [rows, cols].

    The fraction is kept in [1e-4, 1 - 1e-4]: at 0 the last bit would decide whether a weight ever
    moves. V's sign is that of rounding to nearest, ties to even, so that the hard decision V >= 0
    starts there.
    """
    steps = weight / expand(grid.scale, *weight.shape)
    floor = steps.floor()
    fraction = (steps - floor).clamp(_FRACTION_MARGIN, 1 - _FRACTION_MARGIN)
    v = -torch.log((_ZETA - _GAMMA) / (fraction - _GAMMA) - 1)
    return torch.where(steps.round() > floor, v.clamp(min=0), v.clamp(max=-1e-6))


def _rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) of eq. (23), without derivatives."""
    return (torch.sigmoid(v) * (_ZETA - _GAMMA) + _GAMMA).clamp(0, 1)


class Objective(Protocol):
    """What the loop needs."""

    as_error: bool  # gradient takes w_q - target instead of w_q
    generator: torch.Generator | None  # which gradient draws from

    @property
    def dtype(self) -> torch.dtype:
        """Of the gradient and what it takes."""

    def gradient(self, weight_q: Tensor) -> Tensor:
        """d loss / d weight_q [rows, cols] for the soft weights or errors [rows, cols]."""


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
    begin = warmup * steps  # of the annealing
    first, last = beta
    rows = []
    for step in range(steps):
        done = max(step - begin, 0.0) / max(steps - begin, 1.0)
        rows.append(
            (
                last + 0.5 * (first - last) * (1 + math.cos(done * math.pi)),
                reg_weight if step >= begin else 0.0,
                learning_rate,
                1 - _ADAM_BETAS[0] ** (step + 1),
                math.sqrt(1 - _ADAM_BETAS[1] ** (step + 1)),
            )
        )
    return torch.tensor(rows, dtype=torch.float32, device="cpu").view(steps, 5)
