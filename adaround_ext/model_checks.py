"""What every call asks of the model it is given."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from adaround_ext.ops.library import check_device


def check_module(model: object) -> None:
    """TypeError for what is no module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch module, got {type(model).__name__}")


def refuse_inference(tensors: Iterable[tuple[str, Tensor]]) -> None:
    """ValueError for a model's named tensor that only inference mode can write to or trace."""
    for name, tensor in tensors:
        if tensor.is_inference():
            raise ValueError(f"model must not be made in inference_mode, as {name} was")


def check_devices(model: nn.Module, device: torch.device | None = None) -> None:
    """ValueError for a parameter's device, or that to work on, for which there are no kernels."""
    if device is not None:
        check_device("device", device)
    for name, parameter in model.named_parameters():
        check_device(name, parameter.device)


def device_here(device: torch.device | str) -> torch.device:
    """``device`` as torch knows it, ValueError where there is none that holds data."""
    try:
        found = torch.empty(1, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(f"device must be one of this machine, got {device!r}: {error}") from error
    if found.type == "meta":
        raise ValueError(f"device must hold data, got {device!r}")
    return found
