"""Rounding in plain PyTorch: the formulas of AdaRound, and one step of its optimisation.

Nagel et al., "Up or Down? Adaptive Rounding for Post-Training Quantization", ICML 2020. Shapes and
names as in :mod:`adaround_ext.ops`. Differentiable by autograd in ``v``; everything runs in the
dtype of its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

ZETA, GAMMA = 1.1, -0.1  # stretch of the rectified sigmoid, eq. (23)
ADAM_BETAS, ADAM_EPS = (0.9, 0.999), 1e-8  # Adam's defaults, which the paper uses
FRACTION_MARGIN = 1e-4  # keeps weights on the grid off the edge of h's clip


def expand_grid(values: Tensor, rows: int, cols: int) -> Tensor:
    """A scale or zero point for every weight.

    Args:
        values: [rows or 1, n_groups].
        rows: Of the weight.
        cols: Of the weight, a multiple of n_groups.

    Returns:
        [rows, cols].
    """
    groups = values.shape[1]
    return values.repeat_interleave(cols // groups, dim=1).expand(rows, cols)


def rectified_sigmoid(v: Tensor) -> Tensor:
    """h(V) = clip(sigmoid(V) (zeta - gamma) + gamma, 0, 1), eq. (23).

    Where h is 0 or 1 exactly, the ops have the derivative of the inside and torch's clamp that of
    the outside, from torch 2.14 on.

    Args:
        v: The rounding variable V, of any shape.

    Returns:
        h(V) in [0, 1], of the shape of ``v``.
    """
    return (torch.sigmoid(v) * (ZETA - GAMMA) + GAMMA).clamp(0, 1)


def round_reg(h: Tensor, beta: float) -> Tensor:
    """The regularizer f_reg(V) = ``sum 1 - |2h(V) - 1|^beta``, eq. (24).

    Args:
        h: h(V), see :func:`rectified_sigmoid`.
        beta: The exponent, at least 1.

    Returns:
        A tensor without dimensions.
    """
    return (1 - (2 * h - 1).abs().pow(beta)).sum()


def initial_v(weight: Tensor, scale: Tensor) -> Tensor:
    """V with h(V) = weight / scale - floor(weight / scale), inverse of eq. (23).

    The fraction is kept in [1e-4, 1 - 1e-4]: at 0 it would lie on the edge of h's clip, where the
    last bit decides whether the weight ever moves. The sign of V is made to agree with
    ``torch.round`` (ties to even), so that the hard decision V >= 0 starts as rounding to nearest.

    Args:
        weight: [rows, cols].
        scale: [rows or 1, n_groups].

    Returns:
        V [rows, cols].
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
    """w_q = s (clamp(floor(w / s) + z + h(V), n, p) - z), eq. (22), and the regularizer.

    Args:
        weight: [rows, cols].
        v: The rounding variable V [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        beta: Exponent of the regularizer.

    Returns:
        w_q [rows, cols] and f_reg(V) [].
    """
    s, z = expand_grid(scale, *weight.shape), expand_grid(zero_point, *weight.shape)
    h = rectified_sigmoid(v)
    codes = torch.floor(weight / s) + z + h
    return s * (codes.clamp(qmin, qmax) - z), round_reg(h, beta)


def hard_quantize(
    weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    """The codes for h(V) in {0, 1}: up where V >= 0.

    Args:
        weight: [rows, cols].
        v: The rounding variable V [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.

    Returns:
        Codes [rows, cols], int8 where qmin < 0, else uint8.
    """
    s, z = expand_grid(scale, *weight.shape), expand_grid(zero_point, *weight.shape)
    codes = (torch.floor(weight / s) + z + (v >= 0)).clamp(qmin, qmax)
    return codes.to(torch.int8 if qmin < 0 else torch.uint8)


def dequantize(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    """w_q = s (codes - z).

    Args:
        codes: [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        dtype: Of the weights.

    Returns:
        w_q [rows, cols] in ``dtype``.
    """
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
    """One step of Adam on V from d loss / d weight_q, and the soft weights (or errors) after it.

    Args:
        v: The rounding variable V [rows, cols]; updated.
        exp_avg: Adam's first moment [rows, cols]; updated.
        exp_avg_sq: Adam's second moment [rows, cols]; updated.
        weight_q: The new soft weights [rows, cols] are written here.
        grad: d loss / d weight_q [rows, cols].
        weight: [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        schedule: [steps, 5], a row a step: beta, reg_weight, learning rate and Adam's 1 - 0.9^t and
            sqrt(1 - 0.999^t).
        step: int64 [1], the row, kept in range; advanced by one.
        as_error: Write the error w_q - w into ``weight_q``.
        normalize: Divide the loss's gradient by s^2.
    """
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
