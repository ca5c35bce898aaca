"""A run as plain values: what must be the same for two runs to be one, and what a report says."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch
from torch import nn

from adaround_ext.config import make_config
from adaround_ext.ops.library import build_info
from adaround_ext.planning.plan import Plan, Target
from adaround_ext.replay.calibration import Calibration
from adaround_ext.tensors import add_tensor
from adaround_ext.tracing.blocks import BlockCall


def run_fingerprint(
    model: str, data: Calibration, plan: Plan, calls: list[BlockCall]
) -> dict[str, object]:
    """By part, what decides the result apart from the arguments of quantize_ itself."""
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


def model_digest(model: nn.Module) -> str:
    """Of all parameters and buffers, with their names, and the modules' classes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        digest.update(f"{name}: {type(module).__qualname__};".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}=".encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()
