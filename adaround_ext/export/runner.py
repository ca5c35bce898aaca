"""An exported model as something that can be run, whatever runs it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

FLIPS = (
    "activations are quantized: float32 sums in another order move some across a rounding "
    "threshold, as they do in PyTorch between batch sizes"
)


@dataclass(frozen=True)
class Runner:
    """One way of running an exported model.

    name: of the runtime and its settings, as "onnxruntime, default". exact: whether it promises
    the simulated model's arithmetic, up to the order of float32 sums; else ``note`` says what
    differs and what restores equality. run: from a model's positional and keyword arguments to
    all tensors of its output, in order.
    """

    name: str
    exact: bool
    note: str
    run: Callable[[tuple[Any, ...], dict[str, Any]], list[Tensor]]


def output_tensors(output: object) -> list[Tensor]:
    """All tensors of a model's output, in the order of its pytree."""
    return [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]


def module_runner(name: str, model: nn.Module) -> Runner:
    """Runs a torch module, in eval mode and without gradients."""

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        model.eval()
        with torch.no_grad():
            return output_tensors(model(*args, **kwargs))

    return Runner(name, True, "", run)
