"""Checks of layers: what an export would refuse, asked of the formats before any work."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from adaround_ext.export import compressed_tensors
from adaround_ext.export.gguf import export as gguf
from adaround_ext.export.goal.targets import ExportTarget
from adaround_ext.export.onnx.targets import TARGETS
from adaround_ext.export.onnx.weights import stored_weight
from adaround_ext.export.quantized_layers import QuantizedLayer, refuse
from adaround_ext.grid import quant_range
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.planning.plan import Target
from adaround_ext.result import QuantizedWeight


def check_layers(target: ExportTarget, model: nn.Module, layers: Sequence[Target]) -> None:
    """ValueError naming the layers to quantize whose settings the target cannot hold, and why."""
    stand_ins = [_stand_in(layer) for layer in layers]
    refuse(f"export_for={target.name!r}", stand_ins, lambda layer: _obstacle(target, model, layer))
    grids = {(t.config.bits, t.config.symmetric, t.config.group_size) for t in layers}
    unsigned = [layer.name for layer in stand_ins if not layer.symmetric]
    if target.pretrained and len(grids) > 1 and unsigned:
        rule = f"layers must all be symmetric, or share their settings, for {target.name}"
        raise ValueError(f"{rule}, got other settings beside asymmetric {unsigned[0]}")


def _obstacle(target: ExportTarget, model: nn.Module, layer: QuantizedLayer) -> str | None:
    """Why the format, at the settings of the stand-in, refuses a layer."""
    if not layer.symmetric and layer.bits not in target.asymmetric:
        return f"it has no asymmetric codes of {layer.bits} bits; quantize with symmetric=True"
    if target.format == "gguf":
        return gguf.obstacle(layer)
    if target.format == "compressed-tensors":
        return compressed_tensors.obstacle(layer, model.dtype)  # type: ignore[arg-type]
    runtime = TARGETS[target.runtime]
    reason = runtime.refuses_layer(layer, plain=True)
    if reason is not None or (layer.granularity != "per_group" and layer.bits < 8):
        return reason
    try:
        stored = stored_weight(
            layer,
            transpose=isinstance(layer.module, nn.Linear),
            centred=not runtime.zero_points and not layer.symmetric,
            blocks=runtime.linear_blocks,
        )
    except ValueError as error:  # it has no form
        return str(error)
    return runtime.refuses_weight(layer, stored)


def _stand_in(target: Target) -> QuantizedLayer:
    """A layer with the settings of ``target``, as if it was quantized, of the hardest values.

    Codes are the lowest, scales have all digits of their dtype. Nothing takes memory; a Linear has
    but two rows.
    """
    config, matrix = target.config, target.matrix
    if isinstance(matrix.layer, nn.Linear):
        matrix = MatrixLayer(matrix.layer, min(matrix.rows, 2), matrix.cols)
    qmin, _ = quant_range(config.bits, config.symmetric, config.narrow_range)
    limits = torch.finfo(config.scale_dtype)
    kind = torch.int8 if config.symmetric else torch.uint8
    groups = 1 if config.group_size is None else matrix.cols // config.group_size
    shape = (1 if config.granularity == "per_tensor" else matrix.rows, groups)
    codes = torch.full((1, 1), qmin, dtype=kind, device="cpu")
    scale = torch.full((1, 1), (2 - limits.eps) * limits.tiny, dtype=torch.float32, device="cpu")
    zero_point = torch.zeros(1, 1, dtype=torch.int32, device="cpu")
    return QuantizedLayer(
        target.name,
        (target.name, *(name for name, _ in target.tied)),
        matrix,
        QuantizedWeight(
            codes.expand(matrix.rows, matrix.cols),
            scale.expand(shape),
            zero_point.expand(shape),
            config.bits,
        ),
    )
