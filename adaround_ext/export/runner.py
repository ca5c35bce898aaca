"""Runners: an exported model as something that can be run, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext.export.packed.modules import PackedLayer

FLIPS = (
    "activations are quantized: float32 sums in another order move some across a rounding "
    "threshold, as they do in PyTorch between batch sizes"
)


@dataclass(frozen=True)
class Runner:
    """One way of running an exported model.

    Attributes:
        name: Of the runtime and its settings, as "onnxruntime, default".
        exact: Whether it promises the simulated model's arithmetic, up to the order of float32
            sums.
        note: What differs where it is not exact, and what restores equality.
        run: From a model's positional and keyword arguments to all tensors of its output, in order.
        same_operators: Whether that is by the model's own operators, so that equality holds in 16
            bits too.
        stored: The parameters that it runs with, by their names in the model, in floating point.
    """

    name: str
    exact: bool
    note: str
    run: Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]
    same_operators: bool = False
    stored: Callable[[], Iterator[tuple[str, Tensor]]] | None = None


def output_tensors(output: object) -> list[Tensor]:
    """All tensors of a model's output, in the order of its pytree."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def module_runner(name: str, model: nn.Module) -> Runner:
    """Runs a torch module, in eval mode and without gradients."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        model.eval()
        with torch.no_grad():
            return output_tensors(model(*args, **kwargs))

    return Runner(name, True, "", run, stored=lambda: _parameters(model))


def _parameters(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Those of a module, and the weights that it dequantizes."""
    for name, parameter in model.named_parameters(remove_duplicate=False):
        packed = hasattr(parameter, "qdata")  # a tensor of torchao
        yield name, parameter.dequantize() if packed else parameter
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, PackedLayer):
            yield f"{name}.weight", module.weight
