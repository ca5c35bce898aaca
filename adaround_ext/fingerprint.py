"""What tells one model and one data set from another."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

_PIECE = 1 << 24  # bytes at a time: a large tensor on another device is not copied whole


def add_tensor(digest: Any, tensor: Tensor) -> None:
    """Adds dtype, shape and bits of a tensor to a hashlib object; a meta tensor has no bits."""
    digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
    if tensor.is_meta:
        digest.update(b"meta;")
        return
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(1, _PIECE // max(flat.element_size(), 1))):
        digest.update(memoryview(piece.cpu().contiguous().view(torch.uint8).numpy()))


def model_digest(model: nn.Module) -> str:
    """Of all parameters and buffers, with their names, and the modules' classes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        digest.update(f"{name}: {type(module).__qualname__};".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}=".encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()
