"""torchao tensors: quantized weights as ``torchao.quantization.IntxUnpackedToInt8Tensor``.

A weight is scale (qdata - zero_point) with qdata and zero_point int8, in blocks of the weight's
shape that share a scale. Codes 0..2^b-1 and their zero points are stored less 2^(b-1). Source:
torchao, quantization/quantize_/workflows/intx.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import nn

from adaround_ext.export.quantized_layers import LEAVE_OUT, QuantizedLayer

if TYPE_CHECKING:
    from torchao.quantization import IntxUnpackedToInt8Tensor  # type: ignore[import-untyped]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def import_torchao() -> None:
    """Makes torch.load know torchao's tensors; ImportError that says how to get the package."""
    try:
        import torchao.quantization  # type: ignore[import-untyped]  # noqa: F401
    except ImportError as error:
        needs = "exporting to torchao needs the package torchao"
        raise ImportError(f'{needs}: pip install "adaround_ext[torchao]"') from error


def obstacle(layer: QuantizedLayer) -> str | None:
    """Why torchao has no tensor for a layer, None where it has."""
    if not isinstance(layer.module, (nn.Linear, nn.Conv2d)):
        kind = type(layer.module).__name__
        return f"its tensors work in Linear and Conv2d, got {kind}{LEAVE_OUT}"
    if layer.matrix.weight.dtype not in _DTYPES:
        got = f"got {layer.matrix.weight.dtype}; convert the model before it is quantized"
        return f"its tensors are float32, float16 or bfloat16, {got}"
    if _block_size(layer) is None:
        shape = list(layer.matrix.weight.shape)
        return f"groups must be blocks of the weight {shape}, got {layer.group_size} columns"
    return None


def _block_size(layer: QuantizedLayer) -> tuple[int, ...] | None:
    """The block of the weight's dimensions that shares a scale; None where that is no block."""
    rows, groups = layer.weight.scale.shape
    sizes = layer.matrix.weight.shape[1:]
    block: list[int] = []
    left = layer.cols // groups
    for size in reversed(sizes):
        if left % size == 0:
            block, left = [size, *block], left // size
        elif size % left == 0:
            block, left = [left, *block], 1
        else:
            return None
    return (layer.rows if rows == 1 else 1, *block)


def torchao_tensor(layer: QuantizedLayer) -> IntxUnpackedToInt8Tensor:
    """A layer's weight as torchao's tensor; ValueError unless it gives the very bits back."""
    from torchao.quantization import IntxUnpackedToInt8Tensor

    block_size = _block_size(layer)
    assert block_size is not None
    weight, quantized = layer.matrix.weight, layer.weight
    blocks = [size // block for size, block in zip(weight.shape, block_size, strict=True)]
    shift = 0 if layer.symmetric else 1 << (layer.bits - 1)
    codes = (quantized.codes.short() - shift).to(torch.int8)
    tensor = IntxUnpackedToInt8Tensor(
        qdata=codes.reshape(weight.shape),
        scale=quantized.scale.reshape(blocks).clone(),
        zero_point=(quantized.zero_point - shift).to(torch.int8).reshape(blocks),
        target_dtype=getattr(torch, f"int{layer.bits}"),
        block_size=block_size,
        dtype=weight.dtype,
        activation_quantization=None,
    )
    if not torch.equal(tensor.dequantize(), weight):
        raise ValueError(f"torchao must give the weight of {layer.name} back, got another")
    return tensor
