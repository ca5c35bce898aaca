"""The native ops on packed codes: for each a typed wrapper, its fake kernel and its autograd.

``packed`` is uint8 [rows, ceil(cols bits / 8)]: each row of ``codes`` [rows, cols] as a dense
stream of bits. Code j of a row is the number code - qmin in bits j b to j b + b - 1, where bit i is
bit i % 8 of byte i // 8; what is left of the last byte is 0. ``bits`` is 1 to 8; ``codes`` are int8
where qmin < 0, else uint8, and qmin to qmin + 2^bits - 1 must lie in [-128, 127] or [0, 255].
Arguments may have any strides. Errors are those of :mod:`adaround_ext.ops`. Formulas:
csrc/math/packing.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adaround_ext.ops.common import check_same_device, code_dtype, native_ops
from adaround_ext.ops.rounding import dequantize


def _packed_bytes(cols: int, bits: int) -> int:
    return (cols * bits + 7) // 8


def _check_matrix(name: str, tensor: Tensor) -> None:
    torch._check(
        tensor.dim() == 2, lambda: f"{name} must be a matrix, got shape {list(tensor.shape)}"
    )


def pack_bits(codes: Tensor, bits: int, qmin: int) -> Tensor:
    """Codes as a dense stream of bits a row.

    Args:
        codes: [rows, cols]. On the CPU one outside [qmin, qmin + 2^bits - 1] is an error; on CUDA,
            which would have to wait for the values, only the low ``bits`` bits of code - qmin are
            kept.
        bits: Of a code, 1 to 8.
        qmin: The lowest code.

    Returns:
        ``packed``, uint8 [rows, ceil(cols bits / 8)].
    """
    return native_ops.pack_bits(codes, bits, qmin)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::pack_bits")
def _(codes: Tensor, bits: int, qmin: int) -> Tensor:
    _check_matrix("codes", codes)
    rows, cols = codes.shape
    return codes.new_empty((rows, _packed_bytes(cols, bits)), dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, cols: int, qmin: int) -> Tensor:
    """The inverse of :func:`pack_bits`.

    Args:
        packed: uint8 [rows, ceil(cols bits / 8)]; what is left of the last byte is ignored.
        bits: Of a code, 1 to 8.
        cols: How many codes a row has.
        qmin: The lowest code.

    Returns:
        ``codes`` [rows, cols].
    """
    return native_ops.unpack_bits(packed, bits, cols, qmin)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::unpack_bits")
def _(packed: Tensor, bits: int, cols: int, qmin: int) -> Tensor:
    _check_matrix("packed", packed)
    return packed.new_empty((packed.shape[0], cols), dtype=code_dtype(qmin))


def packed_linear(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    qmin: int,
) -> Tensor:
    """y = x W_q^T + b for packed codes of W_q = s (codes - z) [rows, cols].

    On the CPU weights in floating point exist in registers and the first-level cache alone, sums
    are float32, and neither the number of threads nor other positions of ``x`` change a row of y.
    On CUDA the weight is unpacked and given to PyTorch's product: a kernel of our own would have to
    be measured first. Differentiable in ``x`` and ``bias``.

    Args:
        x: [..., cols], float32, bfloat16 or float16.
        packed: uint8 [rows, ceil(cols bits / 8)].
        scale: float32 [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        bias: [rows] in the dtype of ``x``, or None.
        bits: Of a code, 1 to 8.
        qmin: The lowest code.

    Returns:
        y [..., rows] in the dtype of ``x``.
    """
    return native_ops.packed_linear(x, packed, scale, zero_point, bias, bits, qmin)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::packed_linear")
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    qmin: int,
) -> Tensor:
    _check_matrix("packed", packed)
    check_same_device(x=x, packed=packed, scale=scale, zero_point=zero_point, bias=bias)
    return x.new_empty((*x.shape[:-1], packed.shape[0]))


def _linear_of_parts(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    bits: int,
    qmin: int,
) -> Tensor:
    codes = unpack_bits(packed, bits, x.shape[-1], qmin)
    return F.linear(x, dequantize(codes, scale, zero_point, x.dtype), bias)


torch.library.impl("adaround_ext::packed_linear", "cuda")(_linear_of_parts)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero_point, _, ctx.bits, ctx.qmin = inputs
    ctx.cols = x.shape[-1]
    ctx.save_for_backward(packed, scale, zero_point)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        packed, scale, zero_point = ctx.saved_tensors
        codes = unpack_bits(packed, ctx.bits, ctx.cols, ctx.qmin)
        grad_x = grad @ dequantize(codes, scale, zero_point, grad.dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None, None


torch.library.register_autograd(
    "adaround_ext::packed_linear", _backward, setup_context=_setup_context
)
