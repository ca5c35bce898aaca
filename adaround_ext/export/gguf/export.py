"""GGUF export: a layer's codes as they are, in blocks of Q4_0 or Q8_0.

A block has 32 weights of a row, one float16 scale d, and codes q: d (q - 8) with q in 4 bits
(Q4_0), or d q with q in 8 bits (Q8_0). Source: gguf-py, gguf/quants.py.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.export.gguf.architecture import Architecture, architecture, row_order
from adaround_ext.export.gguf.runner import FILE, KIND, gguf_package, read_tensors
from adaround_ext.export.manifest import new_export
from adaround_ext.export.quantized_layers import (
    LEAVE_OUT,
    QuantizedLayer,
    quantized_layers,
    refuse,
    refuse_quantizers,
)

BLOCK = 32
_WIDER = {torch.bool: torch.int8, torch.uint8: torch.int16, torch.bfloat16: torch.float32}


def export_gguf(
    model: nn.Module, folder: str | os.PathLike[str], *, name: str | None = None
) -> None:
    """Writes a new directory with model.gguf, whose dequantized weights are the model's own.

    Codes of up to 4 bits become Q4_0, of 5 to 8 bits Q8_0; nothing is rounded again. Other float16
    tensors of two dimensions or more stay float16, what is smaller or bfloat16 becomes float32, and
    the file is read back and compared before the directory gets its name. LlamaForCausalLM,
    Qwen2ForCausalLM and BertModel without pooler, with the usual settings, get gguf's tensor names,
    and rows and settings as llama.cpp wants them, but no tokenizer: it runs them on token ids, its
    own way, with activations in 8 bits. Any other model gets torch's names and the architecture
    "torch", which gguf-py reads and llama.cpp refuses.

    Args:
        model: A model that :func:`adaround_ext.quantize_` has quantized. It is not changed.
        folder: The directory to write, new or empty.
        name: The file's ``general.name``, that of the class by default.

    Raises:
        ImportError: gguf is missing.
        TypeError: ``model`` is no module.
        ValueError: The model is not quantized, or changed since; for quantized activations, for
            quantized layers other than Linear, asymmetric codes, groups that are no whole blocks
            and scales that float16 cannot hold; and for a directory that is not new.
    """
    gguf = gguf_package()
    layers = quantized_layers(model)
    refuse_quantizers("GGUF files", model)
    refuse("GGUF", layers, obstacle)
    known = architecture(model)
    with new_export(folder, KIND) as (directory, details):
        details.update(_details(model, layers, known))
        writer = gguf.GGUFWriter(directory / FILE, details["architecture"])
        writer.add_type("model")
        writer.add_name(name or type(model).__name__)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(_file_type(layers))
        if known is not None:
            known.write_settings(writer)
        _add_tensors(writer, model, layers, details["tensors"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        _check_written(directory, model, details["tensors"])


def obstacle(layer: QuantizedLayer) -> str | None:
    """Why blocks cannot hold a layer, None where they can."""
    if not isinstance(layer.module, nn.Linear):
        rule = "blocks run along the columns of a matrix, so it must be a Linear"
        return f"{rule}, got {type(layer.module).__name__}{LEAVE_OUT}"
    if layer.cols % BLOCK:
        return f"its columns must be whole blocks of {BLOCK}, got {layer.cols}{LEAVE_OUT}"
    if not layer.symmetric:
        return "codes must be signed: quantize with symmetric=True"
    if layer.group_size % BLOCK:
        return (
            f"columns that share a scale must be whole blocks of {BLOCK}, got {layer.group_size}: "
            f'quantize with granularity="per_group", group_size={BLOCK}'
        )
    scale = layer.weight.scale
    if not torch.equal(scale.half().float(), scale):
        return "scales must be exact in float16: quantize with scale_dtype=torch.float16"
    return None


def _details(
    model: nn.Module, layers: Sequence[QuantizedLayer], known: Architecture | None
) -> dict[str, Any]:
    """tensors: by key in the state dict, name in the file and number of heads, if rows move."""
    tensors, seen = {}, set()
    for key, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:  # tied ones are there once
            seen.add(id(tensor))
            tensors[key] = {
                "name": key if known is None else known.names[key],
                "heads": None if known is None else known.heads.get(key),
            }
    return {
        "architecture": "torch" if known is None else known.name,
        "names": "torch" if known is None else "gguf",
        "tensors": tensors,
        "layers": {
            layer.name: {**layer.grid, "type": "Q4_0" if layer.bits <= 4 else "Q8_0"}
            for layer in layers
        },
    }


def _file_type(layers: Sequence[QuantizedLayer]) -> int:
    """That of most quantized weights."""
    small = sum(layer.rows * layer.cols for layer in layers if layer.bits <= 4)
    types = gguf_package().LlamaFileType
    total = sum(layer.rows * layer.cols for layer in layers)
    return int(types.MOSTLY_Q4_0 if 2 * small >= total else types.MOSTLY_Q8_0)


def _add_tensors(
    writer: Any,
    model: nn.Module,
    layers: Sequence[QuantizedLayer],
    tensors: Mapping[str, Mapping[str, Any]],
) -> None:
    types = gguf_package().GGMLQuantizationType
    quantized = {f"{name}.weight".lstrip("."): layer for layer in layers for name in layer.names}
    state = model.state_dict()
    for key, entry in tensors.items():
        if layer := quantized.get(key):
            order = row_order(layer.rows, entry["heads"]) if entry["heads"] else None
            kind = types.Q4_0 if layer.bits <= 4 else types.Q8_0
            writer.add_tensor(entry["name"], _blocks(layer, order).numpy(), raw_dtype=kind)
        else:
            tensor = state[key].detach().cpu()
            if entry["heads"]:
                tensor = tensor[row_order(len(tensor), entry["heads"])]
            writer.add_tensor(entry["name"], _stored(tensor).numpy())


def _stored(tensor: Tensor) -> Tensor:
    """In a dtype that GGUF has, without loss, and with a dimension."""
    small = tensor.dim() < 2 and tensor.dtype == torch.float16  # llama.cpp wants them in float32
    dtype = torch.float32 if small else _WIDER.get(tensor.dtype, tensor.dtype)
    return tensor.to(dtype).reshape(tensor.shape or (1,)).contiguous()


def _blocks(layer: QuantizedLayer, order: Tensor | None) -> Tensor:
    """uint8 [rows, bytes]: for each block its scale, then its codes."""
    codes, scale = layer.weight.codes.cpu(), layer.scale.cpu()
    if order is not None:
        codes, scale = codes[order], scale[order]
    codes = codes.reshape(layer.rows, -1, BLOCK)
    if layer.bits <= 4:
        low, high = (codes + 8).to(torch.uint8).split(BLOCK // 2, dim=-1)
        packed = low | high << 4
    else:
        packed = codes.contiguous().view(torch.uint8)
    scale = scale.half().repeat_interleave(layer.group_size // BLOCK, dim=1)
    return torch.cat([scale.unsqueeze(-1).view(torch.uint8), packed], dim=-1).flatten(1)


def _check_written(
    folder: Path, model: nn.Module, tensors: Mapping[str, Mapping[str, Any]]
) -> None:
    """ValueError unless the file gives the very bits of the model, in the model's dtypes."""
    state = model.state_dict()
    for key, tensor in read_tensors(folder, tensors).items():
        expected = state[key].cpu()
        if not torch.equal(tensor.view(expected.shape).to(expected.dtype), expected):
            raise ValueError(f"model must be the same after reading the file, got another {key}")
