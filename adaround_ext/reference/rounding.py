"""AdaRound in plain PyTorch: the specification of the native ops, their oracle and the baseline.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020. Shapes and
names as in :mod:`adaround_ext.ops`. Everything here is differentiable by autograd in ``v`` and runs
in the dtype of its arguments. :func:`optimize` is the paper's whole algorithm. Of the solvers that
search codes, :func:`refine_` is here, gptq and tabu_search_ in
:mod:`adaround_ext.reference_solvers`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1  # stretch of the rectified sigmoid, eq. (23)
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # Adam's defaults, which the paper uses
FRACTION_MARGIN = 1e-4  # keeps weights on the grid off the edge of h's clip


def expand_grid(values: Tensor, rows: int, cols: int) -> Tensor:
    """scale or zero_point [rows or 1, n_groups] for every weight, [rows, cols]."""
    groups = values.shape[1]
    return values.repeat_interleave(cols // groups, dim=1).expand(rows, cols)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), eq. (23).

    Where h is 0 or 1 exactly, the ops have the derivative of the inside and torch's clamp that of
    the outside, from torch 2.14 on.
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def round_reg(h: Tensor, beta: float) -> Tensor:
    """f_reg(V) = sum 1 - |2h(V) - 1|^beta, eq. (24)."""
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def initial_v(weight: Tensor, scale: Tensor) -> Tensor:
    """V with h(V) = weight / scale - floor(weight / scale), inverse of eq. (23).

    The fraction is kept in [1e-4, 1 - 1e-4]: at 0 it would lie on the edge of h's clip, where the
    last bit decides whether the weight ever moves. The sign of V is made to agree with
    ``torch.round`` (ties to even), so that the hard decision V >= 0 starts as rounding to nearest.
    """
    steps = weight / expand_grid(scale, *weight.shape)
    below = steps.floor()
    fraction = (steps - below).clamp(FRACTION_MARGIN, 1 - FRACTION_MARGIN)
    v = -torch.log((ZETA - GAMMA) / (fraction - GAMMA) - 1)
    return torch.where(steps.round() > below, v.clamp(min=0), v.clamp(max=-1e-6))


def soft_quantize(
    weight: Tensor,
    v: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """w_q = s (clamp(floor(w / s) + z + h(V), n, p) - z), eq. (22), and the regularizer."""
    s, z = expand_grid(scale, *weight.shape), expand_grid(zero_point, *weight.shape)
    h = rectified_sigmoid(v)
    codes = torch.floor(weight / s) + z + h
    return s * (codes.clamp(qmin, qmax) - z), round_reg(h, beta)


def hard_quantize(
    weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    """The codes for h(V) in {0, 1}: up where V >= 0."""
    s, z = expand_grid(scale, *weight.shape), expand_grid(zero_point, *weight.shape)
    codes = (torch.floor(weight / s) + z + (v >= 0)).clamp(qmin, qmax)
    return codes.to(torch.int8 if qmin < 0 else torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """w_q = s (codes - z)."""
    s, z = expand_grid(scale, *codes.shape), expand_grid(zero_point, *codes.shape)
    return (s * (codes.to(scale.dtype) - z)).to(dtype)


def rounding_step_(
    v: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight_q: Tensor,
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    schedule: Tensor,
    step: Tensor,
    as_error: bool,
    normalize: bool,
) -> None:
    """One step of Adam on V from d loss / d weight_q, and the soft weights (or errors) after it."""
    row = min(max(int(step), 0), schedule.shape[0] - 1)
    beta, reg_weight, learning_rate, correction1, correction2_sqrt = schedule[row].tolist()
    s = expand_grid(scale, *weight.shape)
    with torch.enable_grad():
        leaf = v.detach().requires_grad_()
        soft, reg = soft_quantize(weight.to(v.dtype), leaf, scale, zero_point, qmin, qmax, beta)
        factor = s.square().reciprocal() if normalize else torch.ones_like(s)
        loss = (soft * grad.to(v.dtype) * factor).sum() + reg_weight * reg
        (grad_v,) = torch.autograd.grad(loss, leaf)
    exp_avg.lerp_(grad_v, 1 - ADAM_BETAS[0])
    exp_avg_sq.lerp_(grad_v.square(), 1 - ADAM_BETAS[1])
    denominator = exp_avg_sq.sqrt() / correction2_sqrt + ADAM_EPS
    v -= learning_rate / correction1 * exp_avg / denominator
    soft, _ = soft_quantize(weight.to(v.dtype), v, scale, zero_point, qmin, qmax, beta)
    weight_q.copy_(soft - weight if as_error else soft)
    step += 1


def refine_(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    max_sweeps: int,
) -> None:
    """Cyclic coordinate descent on e G e^T over the whole grid, row by row.

    ``residual`` is e G. Changing code j by k changes the row's objective by
    2 d residual_j + d^2 G_jj with d = k s_j, so the best k is round(-residual_j / (G_jj s_j)).
    A change must lie 1e-4 of a step past the midpoint. Ends when a sweep changes nothing.
    """
    rows, cols = codes.shape
    s = expand_grid(scale, rows, cols)
    rows_per_gram = rows // gram.shape[0]
    for row in range(rows):
        g = gram[row // rows_per_gram]
        for _ in range(max_sweeps):
            changed = False
            for j in range(cols):
                curvature = float(g[j, j] * s[row, j])
                now = int(codes[row, j])
                pull = -float(residual[row, j])
                if not abs(pull) > (0.5 + 1e-4) * curvature or not curvature > 0:
                    continue
                code = min(max(now + math.floor(pull / curvature + 0.5), qmin), qmax)
                if code != now:
                    codes[row, j] = code
                    residual[row] += (code - now) * s[row, j] * g[j]
                    changed = True
            if not changed:
                break


@dataclass(frozen=True)
class ReferenceConfig:
    """Settings of :func:`optimize`; the paper's where it states them (section 5), else AIMET's."""

    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 1e-3
    reg_weight: float = 0.01
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    seed: int = 0


def cosine_beta(step: int, steps: int, beta: tuple[float, float], warmup: float) -> float:
    """beta falls from beta[0] to beta[1] along half a cosine after the warm-up."""
    start = warmup * steps
    share = max(step - start, 0.0) / max(steps - start, 1.0)
    high, low = beta
    return low + 0.5 * (high - low) * (1 + math.cos(share * math.pi))


class Optimizer:
    """The state of the paper's algorithm for one layer: everything that lives from step to step.

    ``forward`` maps (inputs, weight matrix [rows, cols]) to outputs with the channels in
    ``channel_dim``. ``fused`` takes PyTorch's fused Adam, faster than its loop.
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
    """AdaRound as the paper has it: Adam on minibatches of samples, eq. (25); returns the codes.

    ``inputs`` [samples, ...] and ``targets``, the full-precision outputs for them (after the
    activation function, if ``forward`` applies one); ``forward`` maps (inputs, weight [rows, cols])
    to outputs. The loss is the squared error summed over channels, averaged over the rest.
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


def pack_bits(codes: Tensor, bits: int, qmin: int) -> Tensor:
    """uint8 [rows, ceil(cols bits / 8)]: each row of codes [rows, cols] as a stream of bits.

    Code j is the number code - qmin in bits j b to j b + b - 1 of its row, where bit i of a row is
    bit i % 8 of byte i // 8; what is left of the last byte is 0.
    """
    rows, cols = codes.shape
    values = codes.int() - qmin
    stream = (values.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
    stream = torch.nn.functional.pad(stream.view(rows, cols * bits), (0, -cols * bits % 8))
    places = 1 << torch.arange(8, device=codes.device)
    return (stream.view(rows, stream.shape[1] // 8, 8) * places).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, cols: int, qmin: int) -> Tensor:
    """codes [rows, cols], the inverse of :func:`pack_bits`; int8 where qmin < 0, else uint8."""
    stream = (packed.int().unsqueeze(-1) >> torch.arange(8, device=packed.device)) & 1
    stream = stream.flatten(1)[:, : cols * bits].reshape(len(packed), cols, bits)
    values = (stream * (1 << torch.arange(bits, device=packed.device))).sum(-1) + qmin
    return values.to(torch.int8 if qmin < 0 else torch.uint8)


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    qmin: int,
) -> Tensor:
    """y = x W_q^T + b for x [..., cols] and packed codes of W_q = s (codes - z) [rows, cols]."""
    cols = x.shape[-1]
    codes = unpack_bits(packed, bits, cols, qmin)
    weight = dequantize(codes, scale, zero_point, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)
