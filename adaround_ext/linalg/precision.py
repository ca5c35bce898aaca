"""Precision of products: while a layer is solved float32 means float32, whatever is set outside.

What is set for that is the process's, so one thread at a time has it: see process/turns.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch

from adaround_ext.process.turns import one_caller

# torch keeps a precision for each kind of operator, and where that is "none" looks it up in the
# backend's, then in the generic one. By backend and operator, those that others look into first.
_LOOKED_INTO = (("generic", "all"), ("cuda", "all"), ("mkldnn", "all"))
_OPERATORS = (
    ("cuda", "matmul"), ("cuda", "conv"), ("cuda", "rnn"), ("mkldnn", "matmul"), ("mkldnn", "conv"),
)  # fmt: skip


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32: no TF32, no bfloat16, no autocast; restored at the end.

    ``torch.set_float32_matmul_precision`` acts on the CPU too, and convolutions on CUDA take TF32
    unless told otherwise. Theirs are algorithms that have the same bits each time.
    """
    with one_caller(), _ieee(), _repeatable(), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def tf32_products(device: torch.device, allowed: bool = True) -> Iterator[None]:
    """Within :func:`full_precision`: products on CUDA may take TF32, where ``allowed``."""
    if device.type != "cuda" or not allowed:
        yield
        return
    with one_caller():
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)


@contextmanager
def _repeatable() -> Iterator[None]:
    cudnn = torch.backends.cudnn
    before = cudnn.deterministic, cudnn.benchmark
    cudnn.deterministic, cudnn.benchmark = True, False
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark = before


@contextmanager
def _ieee() -> Iterator[None]:
    # torch has these settings twice, and its older functions raise where a caller used the newer
    # ones (torch.backends.fp32_precision and the like) in a way that they cannot tell. So both are
    # read while all of the newer ones are "none", and set to say the same.
    read, write = torch._C._get_fp32_precision_getter, torch._C._set_fp32_precision_setter
    before: dict[tuple[str, str], str] = {}
    matmul, convolutions = None, True
    try:
        for key in (*_LOOKED_INTO, *_OPERATORS):
            before[key] = read(*key)
            write(*key, "none")
        matmul = torch.get_float32_matmul_precision()
        with suppress(RuntimeError):  # it is True, which "none" contradicts
            convolutions = torch._C._get_cudnn_allow_tf32()
        torch.set_float32_matmul_precision("highest")
        torch._C._set_cudnn_allow_tf32(False)
        for key in _OPERATORS:
            write(*key, "ieee")
        for key in _LOOKED_INTO:
            write(*key, before[key])
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(matmul)
            torch._C._set_cudnn_allow_tf32(convolutions)
        for key, value in before.items():
            write(*key, value)
