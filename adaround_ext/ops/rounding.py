"""Rounding ops: soft and hard quantization, and a step of the optimisation.

Shapes, dtypes and errors: :mod:`adaround_ext.ops`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaround_ext.ops.common import check_same_device, check_same_shape, code_dtype, native_ops


def soft_quantize(
    weight: Tensor,
    v: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Soft-quantized weights and the rounding regularizer, differentiable in ``v``.

    w_q = s (clamp(floor(w / s) + z + h(V), n, p) - z), eq. (22);
    reg = ``sum 1 - |2 h(V) - 1|^beta``, eq. (24).

    Args:
        weight: [rows, cols]; gets no gradient.
        v: The rounding variable V [rows, cols].
        scale: [rows or 1, n_groups]; gets no gradient.
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        beta: Exponent of the regularizer, at least 1.

    Returns:
        weight_q [rows, cols] in weight's dtype and reg [] in v's dtype.
    """
    return native_ops.soft_quantize(weight, v, scale, zero_point, qmin, qmax, beta)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::soft_quantize")
def _(
    weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, beta: float
) -> tuple[Tensor, Tensor]:
    check_same_device(weight=weight, v=v, scale=scale, zero_point=zero_point)
    check_same_shape("v", v, weight)
    return weight.new_empty(weight.shape), v.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.qmin, ctx.qmax, ctx.beta = inputs[4:]


def _backward(ctx: Any, grad_weight_q: Tensor, grad_reg: Tensor) -> tuple[Tensor | None, ...]:
    grad_v = native_ops._soft_quantize_backward(
        grad_weight_q, grad_reg, *ctx.saved_tensors, ctx.qmin, ctx.qmax, ctx.beta
    )
    return None, grad_v, None, None, None, None, None


torch.library.register_autograd(
    "adaround_ext::soft_quantize", _backward, setup_context=_setup_context
)


@torch.library.register_fake("adaround_ext::_soft_quantize_backward")
def _(
    grad_weight_q: Tensor,
    grad_reg: Tensor,
    weight: Tensor,
    v: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    beta: float,
) -> Tensor:
    check_same_device(
        weight=weight, v=v, scale=scale, zero_point=zero_point,
        grad_weight_q=grad_weight_q, grad_reg=grad_reg,
    )  # fmt: skip
    check_same_shape("grad_weight_q", grad_weight_q, weight)
    return v.new_empty(v.shape)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("adaround_ext::soft_quantize can be differentiated once, not twice")


torch.library.register_autograd("adaround_ext::_soft_quantize_backward", _no_double_backward)


def soft_quantize_with_grad(
    weight: Tensor,
    v: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`soft_quantize` with its derivatives in the same pass.

    h'(V) = (zeta - gamma) sigmoid(V) (1 - sigmoid(V)) inside h's clip.

    Args:
        weight: [rows, cols].
        v: The rounding variable V [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        beta: Exponent of the regularizer, at least 1.

    Returns:
        weight_q [rows, cols], d weight_q / d V = s h'(V) where the clamp is open, reg [] and
        d reg / d V [rows, cols].
    """
    return native_ops.soft_quantize_with_grad(weight, v, scale, zero_point, qmin, qmax, beta)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::soft_quantize_with_grad")
def _(
    weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    check_same_device(weight=weight, v=v, scale=scale, zero_point=zero_point)
    check_same_shape("v", v, weight)
    return (
        weight.new_empty(weight.shape),
        v.new_empty(v.shape),
        v.new_empty(()),
        v.new_empty(v.shape),
    )


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
    """One optimisation step in one pass over memory: chain rule, regularizer, Adam, soft weights.

    ``schedule`` and ``step`` live on the device, so that the call can be captured in a CUDA graph.

    Args:
        v: The rounding variable V [rows, cols]; updated.
        exp_avg: Adam's first moment [rows, cols]; updated.
        exp_avg_sq: Adam's second moment [rows, cols]; updated.
        weight_q: The new soft weights [rows, cols] are written here, or their error w_q - w where
            ``as_error``.
        grad: d loss / d weight_q [rows, cols], in the dtype of ``weight_q``: float32, bfloat16 or
            float16 (float64 beside float64).
        weight: [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        schedule: float32 [steps, 5], a row a step: beta, reg_weight, learning rate and Adam's
            1 - 0.9^t and sqrt(1 - 0.999^t).
        step: int64 [1], the row, kept in range; advanced by one.
        as_error: Whether ``weight_q`` is an error.
        normalize: Divide the loss's gradient by s^2, which makes reg_weight independent of the
            scale.
    """
    native_ops.rounding_step_(
        v, exp_avg, exp_avg_sq, weight_q, grad, weight, scale, zero_point, qmin, qmax, schedule,
        step, as_error, normalize,
    )  # fmt: skip


@torch.library.register_fake("adaround_ext::rounding_step_")
def _(
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
    named = {"v": v, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    named |= {"weight_q": weight_q, "grad": grad}
    check_same_device(
        weight=weight, scale=scale, zero_point=zero_point, schedule=schedule, step=step, **named
    )
    for name, tensor in named.items():
        check_same_shape(name, tensor, weight)


def hard_quantize(
    weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    """The hard decision: codes = clamp(floor(w / s) + z + [V >= 0], n, p).

    Args:
        weight: [rows, cols].
        v: The rounding variable V [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.

    Returns:
        Codes [rows, cols], int8 for a signed grid (qmin < 0), else uint8.
    """
    return native_ops.hard_quantize(weight, v, scale, zero_point, qmin, qmax)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::hard_quantize")
def _(weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    check_same_device(weight=weight, v=v, scale=scale, zero_point=zero_point)
    check_same_shape("v", v, weight)
    return weight.new_empty(weight.shape, dtype=code_dtype(qmin))


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Weights of codes: weight_q = s (codes - z).

    Args:
        codes: int8 or uint8 [rows, cols].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        dtype: Of the weights.

    Returns:
        weight_q [rows, cols] in ``dtype``.
    """
    return native_ops.dequantize(codes, scale, zero_point, dtype)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::dequantize")
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    check_same_device(codes=codes, scale=scale, zero_point=zero_point)
    return codes.new_empty(codes.shape, dtype=dtype)
