"""Tensors compared by their bytes."""

from __future__ import annotations

import torch
from torch import Tensor


def bits(t: Tensor) -> Tensor:
    """The bytes of a tensor: NaN equals itself, -0.0 is not 0.0."""
    plain = t.detach().resolve_neg().resolve_conj()
    # A copy: what is contiguous by its sizes may still have odd strides, which views refuse.
    return plain.clone(memory_format=torch.contiguous_format).view(-1).view(torch.uint8)
