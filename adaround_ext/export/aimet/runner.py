"""AIMET runner: encodings carried out by ONNX Runtime, from the files alone."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from adaround_ext.export.aimet.encodings import Encoding
from adaround_ext.export.formats import need
from adaround_ext.export.manifest import read_manifest
from adaround_ext.export.onnx.runner import cpu_session
from adaround_ext.export.runner import FLIPS, Runner
from adaround_ext.export.torch_export import bind
from adaround_ext.grid import quant_range

if TYPE_CHECKING:
    import onnx_ir as ir
    import onnxruntime  # type: ignore[import-untyped]

KIND = "aimet"
MODEL, ENCODINGS = "model.onnx", "model.encodings"


def runners(folder: Path, model: nn.Module) -> list[Runner]:
    """ONNX Runtime on the float file, its weights checked and its activations quantized.

    Raises ImportError without onnx_ir and onnxruntime.
    """
    read_manifest(folder, KIND)
    need("running an export for AIMET", "export", "onnx_ir", "onnxruntime")
    content = json.loads((folder / ENCODINGS).read_text(encoding="utf-8"))
    return [_session_runner(folder / MODEL, content, model)]


def _session_runner(path: Path, content: Mapping[str, Any], model: nn.Module) -> Runner:
    """Runs an ONNX file, its tensors quantized as ``content``, an encodings file, says.

    Raises ValueError where a tensor is missing, or a weight is not on the grid that it shall have.
    """
    import onnx_ir as ir

    graph_model = ir.load(path)
    version, values, note = content["version"], _values(graph_model), ""
    kinds = ("activation_encodings", "param_encodings", "encodings")
    for entry in (entry for kind in kinds for entry in content.get(kind, ())):
        value = values.get(entry["name"])
        if value is None:
            raise ValueError(f"{path} must have the tensor {entry['name']}, got none")
        if value.const_value is not None:
            _check_weight(value, entry, version)
        else:
            note = FLIPS
            _quantize(graph_model, value, Encoding.read(entry, version, (), None))
    session = _session(graph_model)
    names = {value.name for value in session.get_inputs()}

    def run(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
        leaves = bind(model, args, kwargs)
        given = {name: leaf for name, leaf in leaves.items() if isinstance(leaf, Tensor)}
        if given.keys() != names:
            rule = f"the exported model takes the tensors {', '.join(sorted(names))}"
            raise ValueError(f"{rule}, got {', '.join(given)}")
        feeds = {name: leaf.detach().cpu().numpy() for name, leaf in given.items()}
        return [torch.from_numpy(output) for output in session.run(None, feeds)]

    return Runner("onnxruntime with AIMET encodings", not note, note, run)


def _session(model: ir.Model) -> onnxruntime.InferenceSession:
    import onnx_ir as ir

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / MODEL
        ir.save(model, path, external_data=f"{MODEL}.data")  # of any size
        return cpu_session(path)


def _values(model: ir.Model) -> dict[str | None, ir.Value]:
    """All tensors of a graph by their names."""
    import onnx_ir as ir

    nodes = ir.traversal.RecursiveGraphIterator(model.graph)
    outputs = [output for node in nodes for output in node.outputs]
    values = [*model.graph.inputs, *model.graph.initializers.values(), *outputs]
    return {value.name: value for value in values}


def _check_weight(value: ir.Value, entry: Mapping[str, Any], version: str) -> None:
    assert value.const_value is not None
    weight = value.const_value.numpy()
    operator = next(iter(value.uses())).node.op_type
    encoding = Encoding.read(entry, version, weight.shape, operator)
    if not np.array_equal(encoding.quantize(weight), weight):
        raise ValueError(f"{value.name} must be on the grid of its encoding, got other weights")


def _quantize(model: ir.Model, value: ir.Value, encoding: Encoding) -> None:
    """All that reads a tensor reads scale clamp(round(x / scale), qmin - z, qmax - z)."""
    import onnx_ir as ir

    uses, producer = list(value.uses()), value.producer()
    graph = model.graph if producer is None else producer.graph
    assert graph is not None
    limits = (q - encoding.zero_point for q in quant_range(encoding.bits, encoding.symmetric))
    scale, low, high = (
        ir.node("Constant", [], {"value": ir.tensor(np.array(number, np.float32))})
        for number in (encoding.scale, *limits)
    )
    divided = ir.node("Div", [value, scale.outputs[0]])
    rounded = ir.node("Round", divided.outputs)
    clipped = ir.node("Clip", [*rounded.outputs, *low.outputs, *high.outputs])
    result = ir.node("Mul", [*clipped.outputs, *scale.outputs])
    nodes = [scale, low, high, divided, rounded, clipped, result]
    if producer is None:
        graph.insert_before(graph[0], nodes)
    else:
        graph.insert_after(producer, nodes)
    for use in uses:
        use.node.replace_input_with(use.idx, result.outputs[0])
    for index, output in enumerate(graph.outputs):
        if output is value:
            result.outputs[0].type, result.outputs[0].shape = value.type, value.shape
            graph.outputs[index] = result.outputs[0]
