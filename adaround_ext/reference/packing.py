"""Packed codes in plain PyTorch, the oracle of pack_bits, unpack_bits and packed_linear."""

from __future__ import annotations

import torch
from torch import Tensor

from adaround_ext.reference.rounding import dequantize


def pack_bits(codes: Tensor, bits: int, qmin: int) -> Tensor:
    """Each row of codes as a stream of bits.

    Code j is the number code - qmin in bits j b to j b + b - 1 of its row, where bit i of a row is
    bit i % 8 of byte i // 8; what is left of the last byte is 0.

    Args:
        codes: [rows, cols].
        bits: Of a code, b.
        qmin: The lowest code.

    Returns:
        uint8 [rows, ceil(cols bits / 8)].
    """
    rows, cols = codes.shape
    values = codes.int() - qmin
    stream = (values.unsqueeze(-1) >> torch.arange(bits, device=codes.device)) & 1
    stream = torch.nn.functional.pad(stream.view(rows, cols * bits), (0, -cols * bits % 8))
    places = 1 << torch.arange(8, device=codes.device)
    return (stream.view(rows, stream.shape[1] // 8, 8) * places).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, bits: int, cols: int, qmin: int) -> Tensor:
    """The inverse of :func:`pack_bits`.

    Args:
        packed: uint8 [rows, ceil(cols bits / 8)].
        bits: Of a code.
        cols: How many codes a row has.
        qmin: The lowest code.

    Returns:
        Codes [rows, cols], int8 where qmin < 0, else uint8.
    """
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
    """y = x W_q^T + b for packed codes of W_q = s (codes - z) [rows, cols].

    Args:
        x: [..., cols].
        packed: uint8 [rows, ceil(cols bits / 8)].
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        bias: [rows] or None.
        bits: Of a code.
        qmin: The lowest code.

    Returns:
        y [..., rows].
    """
    cols = x.shape[-1]
    codes = unpack_bits(packed, bits, cols, qmin)
    weight = dequantize(codes, scale, zero_point, x.dtype)
    return torch.nn.functional.linear(x, weight, bias)
