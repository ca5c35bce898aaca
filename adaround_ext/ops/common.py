"""Common to all wrappers of ops: the namespace of the ops, and checks of fake kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from adaround_ext.ops import library  # noqa: F401  loads the libraries

native_ops = torch.ops.adaround_ext


def code_dtype(qmin: int) -> torch.dtype:
    return torch.int8 if qmin < 0 else torch.uint8


def check_same_device(**tensors: Tensor | None) -> None:
    """Fake kernels also get real tensors beside one on the meta device, and must not take them."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    first_name, first = given[0]
    for name, tensor in given[1:]:
        torch._check(
            tensor.device == first.device,
            lambda name=name, tensor=tensor: (
                f"{name} must be on the device of {first_name}, got {tensor.device} and "
                f"{first.device}"
            ),
        )


def check_same_shape(name: str, tensor: Tensor, model: Tensor, of: str = "weight") -> None:
    torch._check(
        tensor.shape == model.shape,
        lambda: (
            f"{name} must have the shape of {of}, {list(model.shape)}, got {list(tensor.shape)}"
        ),
    )
