"""Quantized layers: those of a model whose weights are on a grid; every export starts there."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.activations.hooks import quantizers
from adaround_ext.checks import check_module, some
from adaround_ext.grid import quant_range
from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.result import QuantizedWeight


@dataclass(frozen=True, eq=False)
class QuantizedLayer:
    """A layer whose weight is scale (codes - zero_point), bit by bit.

    Attributes:
        name: Of its module in ``model.named_modules()``.
        names: Of all modules that hold the weight.
        matrix: The layer as a matrix product.
        weight: Its codes and their grid, on the device of the layer's weight.
    """

    name: str
    names: tuple[str, ...]
    matrix: MatrixLayer
    weight: QuantizedWeight

    @property
    def module(self) -> nn.Module:
        """The layer itself."""
        return self.matrix.layer

    @property
    def rows(self) -> int:
        """Output channels."""
        return self.matrix.rows

    @property
    def cols(self) -> int:
        """Weights of an output channel."""
        return self.matrix.cols

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.weight.bits

    @property
    def symmetric(self) -> bool:
        """Whether codes are signed and zero points 0."""
        return self.weight.codes.dtype == torch.int8

    @property
    def range(self) -> tuple[int, int]:
        """(qmin, qmax) of the codes."""
        return quant_range(self.bits, self.symmetric)

    @property
    def granularity(self) -> str:
        """What a scale belongs to: "per_tensor", "per_channel" or "per_group"."""
        rows, groups = self.weight.scale.shape
        if groups > 1:
            return "per_group"
        return "per_tensor" if rows == 1 else "per_channel"

    @property
    def group_size(self) -> int:
        """Columns that share a scale; all of them unless the granularity is per_group."""
        return self.cols // self.weight.scale.shape[1]

    @property
    def scale(self) -> Tensor:
        """float32 [rows, n_groups]: that of each row, also where all rows share it; a view."""
        return self.weight.scale.expand(self.rows, -1)

    @property
    def zero_point(self) -> Tensor:
        """int32 [rows, n_groups], likewise."""
        return self.weight.zero_point.expand(self.rows, -1)

    @property
    def scale_index(self) -> Tensor:
        """int32 [rows, cols]: which of all scales, counted row by row, each weight has."""
        scale = self.weight.scale
        index = torch.arange(scale.numel(), dtype=torch.int32, device=scale.device)
        return index.view(scale.shape).repeat_interleave(self.group_size, 1).expand(self.rows, -1)

    @property
    def grid(self) -> dict[str, Any]:
        """Bits, granularity and symmetry, as manifests have them."""
        return {"bits": self.bits, "granularity": self.granularity, "symmetric": self.symmetric}


def quantized_layers(model: nn.Module) -> list[QuantizedLayer]:
    """All layers that :func:`adaround_ext.quantize_` quantized, in the order of their definition.

    Modules that hold one weight are one layer.

    Args:
        model: A quantized model.

    Returns:
        At least one layer.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: No layer is quantized, or the weight of one, which is named, is no longer what
            its codes say.
    """
    check_module(model)
    names: dict[nn.Parameter, list[str]] = defaultdict(list)
    first: dict[nn.Parameter, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(getattr(module, "quantized_weight", None), QuantizedWeight):
            parameter = module.get_parameter("weight")
            names[parameter].append(name)
            first.setdefault(parameter, module)
    if not names:
        raise ValueError(
            "model must hold layers that quantize_ has quantized, got none; quantized weights are "
            "lost by copies through state dicts, but not by copy.deepcopy"
        )
    return [_checked(names[parameter], module) for parameter, module in first.items()]


def _checked(names: Sequence[str], module: nn.Module) -> QuantizedLayer:
    matrix = matrix_layer(module)
    weight = module.quantized_weight
    assert isinstance(weight, QuantizedWeight)
    weight = weight.to(matrix.weight.device)
    if not torch.equal(weight.dequantize(matrix), matrix.weight):
        raise ValueError(
            f"model must be as quantize_ left it, got another weight of {names[0]} than its codes "
            "give; quantize again, or undo what changed it"
        )
    return QuantizedLayer(names[0], tuple(names), matrix, weight)


LEAVE_OUT = "; leave it out"  # the end of a reason to refuse a layer that no settings can mend
_LISTED = 8


def refuse(
    what: str, layers: Sequence[QuantizedLayer], reason: Callable[[QuantizedLayer], str | None]
) -> None:
    """Refuses layers that a format cannot hold, each with the reason.

    Args:
        what: The format, as the message begins.
        layers: The layers to ask about.
        reason: Why the format cannot hold a layer, None where it can. One that ends with LEAVE_OUT
            is followed by how to leave the layer out.

    Raises:
        ValueError: There are reasons; the message names the layers of each.
    """
    reasons: dict[str, list[str]] = defaultdict(list)
    for layer in layers:
        why = reason(layer)
        if why is not None:
            reasons[why].append(layer.name)
    if reasons:
        kinds = {layer.name: type(layer.module) for layer in layers}
        listed = "; ".join(
            f"{some(names)}: {why}{_way_out(names, kinds) if why.endswith(LEAVE_OUT) else ''}"
            for why, names in reasons.items()
        )
        raise ValueError(f"{what} cannot hold this model: {listed}")


def refuse_quantizers(what: str, model: nn.Module) -> None:
    """ValueError for a model with quantized activations, which ``what`` (a format) has not."""
    if names := list(quantizers(model)):
        got = f"got {len(names)} quantizers, as {names[0]}"
        raise ValueError(f"{what} go without quantized activations, {got}")


def _way_out(names: Sequence[str], kinds: Mapping[str, type[nn.Module]]) -> str:
    """The overrides of quantize_ that skip these layers, and the options of the command line.

    Many of them by their class, where they are all that are quantized of it.
    """
    classes = list(dict.fromkeys(kinds[name] for name in names))
    if len(names) > _LISTED and sum(kind in classes for kind in kinds.values()) == len(names):
        keys = ", ".join(f'nn.{kind.__name__}: "skip"' for kind in classes)
        return f" by overrides={{{keys}}}"
    keys = ", ".join(f'"{name}": "skip"' for name in names)
    return f" by overrides={{{keys}}}, or {' '.join(f'--skip {name}' for name in names)}"
