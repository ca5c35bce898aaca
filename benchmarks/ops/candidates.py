"""The ways to do what the ops do: ours, and plain PyTorch as fast as it can be written.

A loop's own product gives d loss / d weight_q; it is left out everywhere, so every candidate
starts from the same given ``grad``. Constants (floor(w / s), scales) are computed beforehand.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from adaround_ext import ops, reference
from adaround_ext.rounding.anneal import schedule_table

QMIN, QMAX = -8, 7
OURS, BFLOAT16, EAGER, COMPILED = "ours", "ours bfloat16", "eager", "compiled"
WHOLE = "compiled whole"
_CONFIG = reference.ReferenceConfig(warmup=0.0)  # the regularizer is on in every step
_BETA = 5.3  # no integer: inductor would make products of the power, which no loop can


@dataclass(frozen=True)
class Candidate:
    """One way to do it; of a family the fastest counts. ``results`` are compared."""

    family: str
    call: Callable[[], object]
    results: Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Case:
    """One op's arguments at one size; all values are exact in bfloat16, so dtypes agree."""

    weight: Tensor
    v: Tensor
    scale: Tensor
    zero_point: Tensor
    grad: Tensor

    @staticmethod
    def make(rows: int, cols: int, device: torch.device) -> Case:
        generator = torch.Generator(device).manual_seed(0)

        def normal() -> Tensor:
            values = torch.randn(rows, cols, generator=generator, device=device)
            return values.bfloat16().float()

        weight = normal()
        scale = weight.abs().amax(1, keepdim=True) * (0.8 / QMAX)
        zero_point = torch.zeros(rows, 1, dtype=torch.int32, device=device)
        return Case(weight, reference.initial_v(weight, scale), scale, zero_point, normal())

    def grid(self) -> tuple[Tensor, Tensor, int, int]:
        return self.scale, self.zero_point, QMIN, QMAX


class _Given(torch.autograd.Function):
    """A loss with the gradient ``grad`` in weight_q, at no cost."""

    @staticmethod
    def forward(ctx: Any, weight_q: Tensor, grad: Tensor) -> Tensor:
        ctx.save_for_backward(grad)
        return weight_q.new_zeros(())

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0], None


def _soft(v: Tensor, beta: Tensor | float, below: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The reference's soft weights (zero_point 0) and regularizer, what is constant given."""
    h = reference.rectified_sigmoid(v)
    return scale * (below + h).clamp(QMIN, QMAX), reference.round_reg(h, beta)  # type: ignore[arg-type]


def _grad_v(v: Tensor, beta: Tensor, below: Tensor, scale: Tensor, grad: Tensor) -> Tensor:
    """d loss / d V in one function, which inductor makes one kernel of."""

    def loss(v: Tensor) -> Tensor:
        weight_q, reg = _soft(v, beta, below, scale)
        return (weight_q * grad).sum() + _CONFIG.reg_weight * reg

    return torch.func.grad(loss)(v)  # type: ignore[no-any-return]


def _ours_step(case: Case, dtype: torch.dtype) -> Candidate:
    v, m, s = case.v.clone(), torch.zeros_like(case.v), torch.zeros_like(case.v)
    weight, grad = case.weight.to(dtype), case.grad.to(dtype)
    weight_q = torch.empty_like(grad)
    schedule, step = _schedule(v.device), torch.zeros(1, dtype=torch.int64, device=v.device)

    def call() -> None:
        ops.rounding_step_(
            v, m, s, weight_q, grad, weight, *case.grid(), schedule, step, False, False
        )

    return Candidate(OURS if dtype == torch.float32 else BFLOAT16, call, lambda: (v,))


def _schedule(device: torch.device) -> Tensor:
    c = _CONFIG
    return schedule_table(c.steps, c.learning_rate, c.reg_weight, c.beta, c.warmup).to(device)


def _eager_step(case: Case, fused: bool) -> Candidate:
    state = reference.Optimizer(
        case.weight, case.scale, case.zero_point, QMIN, QMAX, _CONFIG, fused=fused
    )
    steps = cycle(range(_CONFIG.steps))

    def call() -> None:
        state.step(lambda weight_q: _Given.apply(weight_q, case.grad), next(steps))  # type: ignore[no-untyped-call]

    return Candidate(EAGER, call, lambda: (state.v,))


def _compiled_backward_step(case: Case) -> Candidate:
    """Compiled forward and, by autograd, backward; fused Adam."""
    below, v = torch.floor(case.weight / case.scale), case.v.clone().requires_grad_()
    adam = torch.optim.Adam([v], lr=_CONFIG.learning_rate, fused=True)
    reg_weight = torch.tensor(_CONFIG.reg_weight, device=v.device)
    betas = cycle(_schedule(v.device)[:, 0])
    soft = torch.compile(_soft, dynamic=False)

    def call() -> None:
        adam.zero_grad()
        torch.autograd.backward(soft(v, next(betas), below, case.scale), (case.grad, reg_weight))
        adam.step()

    return Candidate(COMPILED, call, lambda: (v,))


def _compiled_gradient_step(case: Case) -> Candidate:
    """Compiled gradient (h recomputed), fused Adam, compiled soft weights for the next product."""
    below, v = torch.floor(case.weight / case.scale), case.v.clone()
    adam = torch.optim.Adam([v], lr=_CONFIG.learning_rate, fused=True)
    betas = cycle(_schedule(v.device)[:, 0])
    grad_v = torch.compile(_grad_v, dynamic=False)
    weight_q = torch.compile(lambda v, below, scale: _soft(v, 2.0, below, scale)[0], dynamic=False)

    def call() -> None:
        v.grad = grad_v(v, next(betas), below, case.scale, case.grad)
        adam.step()
        weight_q(v, below, case.scale)

    return Candidate(COMPILED, call, lambda: (v,))


def _compiled_whole_step(case: Case) -> Candidate:
    """Adam written out and everything compiled together: what inductor can fuse by itself."""
    below, v = torch.floor(case.weight / case.scale), case.v.clone()
    state = v, torch.zeros_like(v), torch.zeros_like(v), torch.empty_like(v)
    rows = cycle(_schedule(v.device))

    def step(v: Tensor, m: Tensor, s: Tensor, weight_q: Tensor, row: Tensor, *rest: Tensor) -> None:
        below, scale, grad = rest
        g = _grad_v(v, row[0], below, scale, grad)
        m.lerp_(g, 1 - reference.ADAM_BETAS[0])
        s.lerp_(g.square(), 1 - reference.ADAM_BETAS[1])
        v.sub_(row[2] / row[3] * m / (s.sqrt() / row[4] + reference.ADAM_EPS))
        weight_q.copy_(_soft(v, 2.0, below, scale)[0])

    compiled = torch.compile(step, dynamic=False)
    return Candidate(
        WHOLE, lambda: compiled(*state, next(rows), below, case.scale, case.grad), lambda: (v,)
    )


def step_candidates(case: Case) -> dict[str, Candidate]:
    return {
        "ours": _ours_step(case, torch.float32),
        "ours bfloat16": _ours_step(case, torch.bfloat16),
        "eager, fused Adam": _eager_step(case, fused=True),
        "eager, Adam": _eager_step(case, fused=False),
        "compiled backward, fused Adam": _compiled_backward_step(case),
        "compiled gradient, fused Adam": _compiled_gradient_step(case),
        "compiled whole step, Adam written out": _compiled_whole_step(case),
    }


Soft = Callable[[Tensor], tuple[Tensor, Tensor]]


def _softs(case: Case) -> dict[str, Soft]:
    """soft_quantize as a function of v, by family."""
    below, scale = torch.floor(case.weight / case.scale), case.scale
    compiled = torch.compile(_soft, dynamic=False)
    short = case.weight.bfloat16()
    return {
        OURS: lambda v: ops.soft_quantize(case.weight, v, *case.grid(), _BETA),
        BFLOAT16: lambda v: ops.soft_quantize(short, v, *case.grid(), _BETA),
        EAGER: lambda v: _soft(v, _BETA, below, scale),
        COMPILED: lambda v: compiled(v, _BETA, below, scale),
    }


def _kept(family: str, call: Callable[[], tuple[Tensor, ...]]) -> Candidate:
    return Candidate(family, call, call)


def forward_candidates(case: Case) -> dict[str, Candidate]:
    return {
        family: _kept(family, torch.no_grad()(partial(soft, case.v)))
        for family, soft in _softs(case).items()
    }


def backward_candidates(case: Case) -> dict[str, Candidate]:
    def call(soft: Soft) -> tuple[Tensor, ...]:
        v = case.v.detach().requires_grad_()
        weight_q, reg = soft(v)
        grads = case.grad.to(weight_q.dtype), torch.full_like(reg, _CONFIG.reg_weight)
        return torch.autograd.grad((weight_q, reg), v, grads)

    return {family: _kept(family, partial(call, soft)) for family, soft in _softs(case).items()}


def with_grad_candidates(case: Case) -> dict[str, Candidate]:
    below, scale = torch.floor(case.weight / case.scale), case.scale
    short, ones = case.weight.bfloat16(), torch.ones_like(case.v)

    def eager() -> tuple[Tensor, ...]:
        v = case.v.detach().requires_grad_()
        weight_q, reg = _soft(v, _BETA, below, scale)
        (dweight_q,) = torch.autograd.grad(weight_q, v, ones, retain_graph=True)
        (dreg,) = torch.autograd.grad(reg, v)
        return weight_q.detach(), dweight_q, reg.detach(), dreg

    def pulled(v: Tensor, below: Tensor, scale: Tensor) -> tuple[Tensor, ...]:
        (weight_q, reg), pull = torch.func.vjp(lambda v: _soft(v, _BETA, below, scale), v)  # type: ignore[misc]
        ones, zeros = torch.ones_like(weight_q), torch.zeros_like(weight_q)
        one, zero = torch.ones_like(reg), torch.zeros_like(reg)
        return weight_q, pull((ones, zero))[0], reg, pull((zeros, one))[0]

    compiled = torch.compile(pulled, dynamic=False)
    return {
        OURS: _kept(
            OURS, lambda: ops.soft_quantize_with_grad(case.weight, case.v, *case.grid(), _BETA)
        ),
        BFLOAT16: _kept(
            BFLOAT16, lambda: ops.soft_quantize_with_grad(short, case.v, *case.grid(), _BETA)
        ),
        EAGER: _kept(EAGER, eager),
        COMPILED: _kept(COMPILED, lambda: compiled(case.v, below, scale)),
    }
