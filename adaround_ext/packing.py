"""The native ops on packed codes: for each a typed wrapper and its fake kernel.

``packed`` is uint8 [rows, ceil(cols bits / 8)]: each row of ``codes`` [rows, cols] as a dense
stream of bits. Code j of a row is the number code - qmin in bits j b to j b + b - 1, where bit i is
bit i % 8 of byte i // 8; what is left of the last byte is 0. ``bits`` is 1 to 8; ``codes`` are int8
where qmin < 0, else uint8, and qmin to qmin + 2^bits - 1 must lie in [-128, 127] or [0, 255].
Arguments may have any strides. Every op raises ValueError with a message that names the argument,
the rule and what came. Formulas: csrc/packing.h.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaround_ext.ops import _code_dtype, _ops


def _packed_bytes(cols: int, bits: int) -> int:
    return (cols * bits + 7) // 8


def pack_bits(codes: Tensor, bits: int, qmin: int) -> Tensor:
    """``packed`` of ``codes`` [rows, cols].

    On the CPU a code outside [qmin, qmin + 2^bits - 1] is an error; on CUDA, which would have to
    wait for the values, only the low ``bits`` bits of code - qmin are kept.
    """
    return _ops.pack_bits(codes, bits, qmin)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::pack_bits")
def _(codes: Tensor, bits: int, qmin: int) -> Tensor:
    rows, cols = codes.shape
    return codes.new_empty((rows, _packed_bytes(cols, bits)), dtype=torch.uint8)


def unpack_bits(packed: Tensor, bits: int, cols: int, qmin: int) -> Tensor:
    """``codes`` [rows, cols], the inverse of :func:`pack_bits`; the last byte's rest is ignored."""
    return _ops.unpack_bits(packed, bits, cols, qmin)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::unpack_bits")
def _(packed: Tensor, bits: int, cols: int, qmin: int) -> Tensor:
    return packed.new_empty((packed.shape[0], cols), dtype=_code_dtype(qmin))
