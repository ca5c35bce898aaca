"""What a call must leave as it was of the caller's modules and tensors, odd ones too."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.layers.matrix import SUPPORTED
from tests.fuzz.bits import bits
from tests.fuzz.verdict import require

State = dict[str, Any]


def tensor_state(t: Tensor) -> tuple[Any, ...]:
    """Identity, place and bits of a tensor."""
    lazy = nn.parameter.is_lazy(t)
    if lazy or t.layout != torch.strided or t.device.type != "cpu":
        return id(t), t.requires_grad, t.grad is None
    if t.numel() == 0:
        return id(t), t.data_ptr(), t.dtype, tuple(t.shape)
    return id(t), t.data_ptr(), t.dtype, t.stride(), t.requires_grad, bits(t).tolist()


def module_state(model: object) -> State:
    """Of a module and those below it."""
    if not isinstance(model, nn.Module):
        return {}
    modules = dict(model.named_modules())
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "training flags": {name: module.training for name, module in modules.items()},
        "hooks": {name: _hooks(module) for name, module in modules.items()},
        "attributes": {name: sorted(module.__dict__) for name, module in modules.items()},
        "tensors": {name: tensor_state(t) for name, t in tensors},
    }


def written_state(model: object) -> State:
    """What also a model that was quantized keeps: layers, and their parameters' identity."""
    if not isinstance(model, nn.Module):
        return {}
    layers = {name: m for name, m in model.named_modules() if isinstance(m, SUPPORTED)}
    weights = {name: m._parameters.get("weight") for name, m in layers.items()}
    return {
        "layers": {name: id(layer) for name, layer in layers.items()},
        "training flags": {name: layer.training for name, layer in layers.items()},
        "weights": {name: id(weight) for name, weight in weights.items()},
    }


def _hooks(module: nn.Module) -> tuple[int, int]:
    return len(module._forward_hooks), len(module._forward_pre_hooks)


def require_same(before: State, after: State) -> None:
    for name, value in before.items():
        require(value == after[name], f"{name} changed")
