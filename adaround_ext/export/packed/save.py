"""Packed export, our own format: the codes and all else of a quantized model, bit by bit.

A directory with adaround.json (:mod:`adaround_ext.export.manifest`, with a
:class:`adaround_ext.export.packed.stored.StoredModel`) and adaround.safetensors: for each layer
``codes/NAME``, ``scale/NAME`` and, unless symmetric, ``zero_point/NAME``; ``bias/MODULE``;
``quantizer/NAME`` of activations; ``state/KEY`` for everything else.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from adaround_ext.activations.hooks import attached_sites, quantizers
from adaround_ext.export.manifest import new_export, write_manifest
from adaround_ext.export.packed.stored import (
    FILE,
    KIND,
    QUANTIZER,
    StoredLayer,
    StoredModel,
    StoredQuantizer,
    StoredSite,
    check_switch,
    narrowest,
)
from adaround_ext.export.quantized_layers import QuantizedLayer, quantized_layers
from adaround_ext.ops import pack_bits
from adaround_ext.ops.library import build_info


def save_quantized(
    model: nn.Module, folder: str | os.PathLike[str], *, complete: bool = True
) -> None:
    """Writes a quantized model to a new directory, for :func:`adaround_ext.load_quantized`.

    Codes take their bits, dense (:func:`adaround_ext.ops.pack_bits`), scales the shortest dtype
    that holds them exactly.

    Args:
        model: A model that :func:`adaround_ext.quantize_` has quantized. It is not changed.
        folder: The directory to write, new or empty.
        complete: Whether all other parameters and buffers are written too. Without them the codes
            belong to the model that was quantized, and are refused by another.

    Raises:
        TypeError: ``model`` is no module, or ``complete`` no bool.
        ValueError: The model is not quantized, or changed since, or the directory is not new or
            empty.
        OSError: ``folder`` cannot be written.
    """
    check_switch("complete", complete)
    with new_export(folder, KIND) as (directory, details):
        details.update(write_codes(model, directory, complete))


def save_codes(model: nn.Module, folder: Path) -> None:
    """Writes the codes of a model into a directory that has the model's other files already."""
    write_manifest(folder, KIND, write_codes(model, folder, complete=False), [FILE])


def write_codes(model: nn.Module, folder: Path, complete: bool) -> dict[str, Any]:
    """Writes the file of tensors; returns the details of the manifest."""
    layers = quantized_layers(model)
    modules = dict(model.named_modules(remove_duplicate=False))
    stored = StoredModel(
        model=type(model).__qualname__,
        complete=complete,
        fingerprint="",
        identities=tuple(name for name, m in modules.items() if type(m) is nn.Identity),
        shared=(),
        quantizers=_stored_quantizers(model),
        layers={layer.name: _stored_layer(layer, modules) for layer in layers},
        versions={"adaround_ext": str(build_info()["version"]), "torch": torch.__version__},
        described={},
    )
    stored = dataclasses.replace(
        stored,
        shared=stored.shared_by(model),
        fingerprint=stored.fingerprint_of(model),
        described=stored.description_of(model),
    )
    tensors: dict[str, Tensor] = {}
    for layer in layers:
        tensors |= _packed(layer)
        for name in stored.layers[layer.name].biases:
            tensors[f"bias/{name}"] = modules[name].get_parameter("bias")
    for name, quantizer in quantizers(model).items():
        tensors[f"quantizer/{name}"] = _quantizer_row(quantizer)
    if complete:
        tensors |= {f"state/{key}": tensor for key, tensor in stored.others(model).items()}
    # Copies: views and tensors that share memory are refused by the format.
    tensors = {k: t.detach().cpu().contiguous().clone() for k, t in tensors.items()}
    safetensors.torch.save_file(tensors, folder / FILE)
    return dataclasses.asdict(stored)


def _stored_layer(layer: QuantizedLayer, modules: Mapping[str, nn.Module]) -> StoredLayer:
    scale = narrowest(layer.weight.scale)
    return StoredLayer(
        names=layer.names,
        kind=type(layer.module).__name__,
        shape=tuple(layer.matrix.weight.shape),
        dtype=str(layer.matrix.weight.dtype),
        bits=layer.bits,
        symmetric=layer.symmetric,
        granularity=layer.granularity,
        scales=tuple(layer.weight.scale.shape),
        scale_dtype=str(scale.dtype).removeprefix("torch."),
        biases=tuple(name for name in layer.names if modules[name].bias is not None),
    )


def _packed(layer: QuantizedLayer) -> dict[str, Tensor]:
    qmin, _ = layer.range
    tensors = {
        f"codes/{layer.name}": pack_bits(layer.weight.codes, layer.bits, qmin),
        f"scale/{layer.name}": narrowest(layer.weight.scale),
    }
    if not layer.symmetric:
        zero_point = layer.weight.zero_point.to(torch.uint8)
        tensors[f"zero_point/{layer.name}"] = pack_bits(zero_point, layer.bits, qmin)
    return tensors


def _stored_quantizers(model: nn.Module) -> dict[str, StoredQuantizer]:
    by_name = quantizers(model)
    return {
        name: StoredQuantizer(
            by_name[name].config.to_dict(),
            tuple(StoredSite(site.module, site.kind, site.tensors) for site in sites),
        )
        for name, sites in attached_sites(model).items()
    }


def _quantizer_row(quantizer: nn.Module) -> Tensor:
    """Scale, zero point, qmin and qmax as float64, which has all of them exactly."""
    return torch.stack([quantizer.get_buffer(name).double().cpu() for name in QUANTIZER])
