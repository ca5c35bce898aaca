"""AIMET export, and by AIMET to Qualcomm's QAIRT: a float ONNX file and its encodings.

The encodings fix the grid of every quantized weight, and of activations where the model quantizes
them; AIMET (``load_encodings_to_sim``, ``set_and_freeze_param_encodings``) then computes what the
simulated model does. What has no entry is not quantized. AIMET, unless told otherwise, gives one
grid to all that operators like Concat and Relu read and give: where the model has several there, it
differs.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.activations.hooks import quantizers
from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.checks import fail
from adaround_ext.export.aimet.encodings import VERSIONS, Encoding
from adaround_ext.export.aimet.graph import FloatGraph, operator_of
from adaround_ext.export.aimet.runner import ENCODINGS, KIND, MODEL
from adaround_ext.export.formats import need
from adaround_ext.export.manifest import new_export
from adaround_ext.export.onnx.names import chosen_names, name_axes_, name_values_, output_names_of
from adaround_ext.export.onnx.program import output_of, save, traced
from adaround_ext.export.onnx.trace import is_plain_linear
from adaround_ext.export.quantized_layers import QuantizedLayer, quantized_layers, refuse
from adaround_ext.export.torch_export import automatic_shapes, bind, distinct, ordered
from adaround_ext.ops.library import build_info
from adaround_ext.tracing.arguments import arguments
from adaround_ext.tracing.evaluation import evaluation


def export_aimet(
    model: nn.Module, args: Any, folder: str | os.PathLike[str], *, version: str = "1.0.0"
) -> None:
    """Writes a new directory with model.onnx, the simulated model, and model.encodings for it.

    Weights are float initializers of their names in the model, those of Linear as [in, out], read
    by Conv, ConvTranspose and MatMul. Source: AIMET 2.42, aimet_onnx, _encoding.py.

    Args:
        model: A model that :func:`adaround_ext.quantize_` has quantized. It is not changed.
        args: A batch as the model takes it: a tensor, a tuple, or a mapping of keyword arguments.
            Dimension 0 of inputs, and 1 of token ids and masks, may change where the model lets
            them.
        folder: The directory to write, new or empty.
        version: Of the encodings: "1.0.0", AIMET's default, or "2.0.0".

    Raises:
        ImportError: onnx or onnxscript is missing.
        TypeError: ``model`` is no module, or the arguments do not fit it.
        ValueError: The model is not quantized, or changed since, or the arguments do not fit; for
            another version, quantized activations in 2.0.0 (AIMET refuses or moves those that it
            has no quantizer for), layers that are not float32, Linears with a forward of their own,
            scales that do not lie along the axes that AIMET has for an operator, and a directory
            that is not new.
    """
    if version not in VERSIONS:
        fail("version", " or ".join(map(repr, VERSIONS)), version)
    need("the export for AIMET", "export", "onnx", "onnxscript")
    layers = quantized_layers(model)
    encodings = _of_layers(layers)
    placed = {name: q for name, q in quantizers(model).items() if q.enabled}
    if placed and version != "1.0.0":
        rule = "version must be '1.0.0' for quantized activations"
        raise ValueError(f"{rule}, got {version!r} and {', '.join(placed)}")
    positional, named = distinct(ordered(model, *arguments(model, args, "args")))
    with new_export(folder, KIND) as (directory, details), evaluation(model):
        inputs, outputs = _names(model, positional, named)
        shapes = automatic_shapes(model, positional, named)
        program = traced(model, layers, list(placed.values()), positional, named, shapes)
        graph = FloatGraph(program, layers)
        name_axes_(program)
        name_values_(program, inputs, outputs)
        weights = {name: encodings[layer.name] for name, layer in graph.weights().items()}
        places = list(placed.items())
        activations = {name: places[index] for name, index in graph.activations().items()}
        save(program, directory / MODEL)
        grids = {name: _of_quantizer(quantizer) for name, (_, quantizer) in activations.items()}
        text = json.dumps(_content(grids, weights, version))
        (directory / ENCODINGS).write_text(text, encoding="utf-8")
        details.update(
            version=version,
            layers={
                layer.name: {**layer.grid, "tensor": name}
                for name, layer in graph.weights().items()
            },
            activations={name: quantizer for name, (quantizer, _) in activations.items()},
        )


def _of_layers(layers: Sequence[QuantizedLayer]) -> dict[str, Encoding]:
    """By the names of the layers; ValueError naming those that AIMET cannot hold."""
    encodings = {}

    def obstacle(layer: QuantizedLayer) -> str | None:
        if layer.matrix.weight.dtype != torch.float32:
            got = f"got a weight in {layer.matrix.weight.dtype}"
            return f"AIMET computes in float32, {got}; convert the model before it is quantized"
        if isinstance(layer.module, nn.Linear) and not is_plain_linear(layer.module):
            return "a Linear with a forward of its own may put Transpose between weight and MatMul"
        try:
            encodings[layer.name] = _of_layer(layer)
        except ValueError as error:
            return str(error)
        return None

    refuse("AIMET", layers, obstacle)
    return encodings


def _of_layer(layer: QuantizedLayer) -> Encoding:
    """ValueError where its scales do not lie along the axes that AIMET has for its operator."""
    operator = operator_of(layer.module)
    index = layer.matrix.weight_from_matrix(layer.scale_index.cpu())
    return Encoding(
        layer.bits,
        layer.symmetric,
        layer.weight.scale.cpu().double().numpy(),
        layer.weight.zero_point.cpu().long().numpy(),
    ).along(operator, (index.t() if operator == "MatMul" else index).numpy())


def _of_quantizer(quantizer: ActivationQuantizer) -> Encoding:
    return Encoding(
        quantizer.bits,
        quantizer.symmetric,
        quantizer.scale.cpu().double().numpy(),
        quantizer.zero_point.cpu().long().numpy(),
    )


def _names(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[list[str], list[str]]:
    """Of the tensors that go into the model and come out of it."""
    output = output_of(model, args, kwargs)
    inputs = [name for name, x in bind(model, args, kwargs).items() if isinstance(x, Tensor)]
    return inputs, chosen_names("outputs", None, output_names_of(output), inputs)


def _content(
    activations: Mapping[str, Encoding], weights: Mapping[str, Encoding], version: str
) -> dict[str, Any]:
    """Of the encodings file."""
    kinds = {"activation_encodings": activations, "param_encodings": weights}
    entries = {
        kind: [encoding.entry(name, version) for name, encoding in encodings.items()]
        for kind, encodings in kinds.items()
    }
    producer = {"package": "adaround_ext", "version": str(build_info()["version"])}
    content: dict[str, Any] = {"version": version, "producer": producer}
    if version == "1.0.0":
        return content | entries
    return content | {"encodings": [entry for kind in entries.values() for entry in kind]}
