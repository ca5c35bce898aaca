"""float32 means float32 while a layer is solved, whatever the caller allows elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Products of float32 in float32: no TF32, no bfloat16, no autocast; restored at the end.

    ``torch.set_float32_matmul_precision`` acts on the CPU too, and convolutions on CUDA take TF32
    unless told otherwise.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with (
            # Its default for ``enabled`` would turn cuDNN off.
            torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False),
            torch.autocast(device.type, enabled=False),
        ):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
