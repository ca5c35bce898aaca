"""What tells one model, one data set and one plan from another."""

from __future__ import annotations

import hashlib
import platform
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaround_ext.config import make_config
from adaround_ext.native import build_info

if TYPE_CHECKING:
    from adaround_ext.blocks import BlockCall
    from adaround_ext.calibration import Calibration
    from adaround_ext.plan import Plan, Target

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


def run_fingerprint(
    model: str, data: Calibration, plan: Plan, calls: list[BlockCall]
) -> dict[str, object]:
    """What must be the same for two runs to be one: by part, plain values."""
    layers = {target.name: plain_config(target) for target in plan.targets}
    return {
        "model": model,
        "calibration": data.digest(),
        "configuration": layers,
        "blocks": [call.name for call in calls],
        "version": versions(),
    }


def plain_config(target: Target) -> dict[str, Any]:
    """A target's configuration as plain values; a callable activation as its name."""
    activation = target.config.activation
    if not callable(activation):
        return target.config.to_dict()
    plain = make_config(target.config, {"activation": None}).to_dict()
    return plain | {"activation": plain_name(activation)}


def plain_name(value: object) -> str | None:
    """A function's name, or what is given instead of one."""
    if value is None or isinstance(value, str):
        return value
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def versions() -> dict[str, str]:
    """Of what decides the bits of a result."""
    return {
        "adaround_ext": str(build_info()["version"]),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
