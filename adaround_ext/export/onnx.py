"""Quantized models as ONNX files: QuantizeLinear and DequantizeLinear around float operators."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from adaround_ext.export.manifest import new_export
from adaround_ext.export.onnx_contents import Contents
from adaround_ext.export.onnx_graph import expand_
from adaround_ext.export.onnx_names import (
    bind,
    chosen_names,
    distinct,
    name_axes_,
    name_values_,
    ordered,
    output_names_of,
    plain_leaves,
)
from adaround_ext.export.onnx_runtimes import FILE, KIND, runners
from adaround_ext.export.onnx_targets import MATMUL_BLOCKS, TARGETS
from adaround_ext.export.onnx_trace import automatic_shapes, marked
from adaround_ext.export.runner import arguments
from adaround_ext.native import build_info
from adaround_ext.trace import evaluation

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["export_onnx", "runners"]

_LARGE = 3 << 29  # bytes of all initializers: 1.5 GiB; one file cannot have 2 GiB
_SMALL = 1024  # bytes of an initializer that stays in the file of the graph
_FIRST_OPSET = 21  # with int4 and blocks


def export_onnx(
    model: nn.Module,
    args: Any,
    folder: str | os.PathLike[str],
    *,
    target: str = "ort",
    kwargs: Mapping[str, Any] | None = None,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    dynamic_shapes: Any = "auto",
    opset: int = _FIRST_OPSET,
    channel_blocks: int | None = None,
    external_data: bool | None = None,
) -> None:
    """Writes a quantized model to a new directory, as model.onnx that computes what it computes.

    A weight w = s (q - z) becomes DequantizeLinear of its codes: those up to 4 bits as int4
    (symmetric) or uint4, others as int8 or uint8. Linears become DequantizeLinear -> MatMul -> Add
    (or Sum) of a weight [in, out]; quantizers of activations QuantizeLinear -> DequantizeLinear of
    int8 or uint8 up to 8 bits, else int16 or uint16, behind Clip where the codes are fewer.

    args: an example of what the model takes, like a batch of ``quantize_``; kwargs: more of it.
    target: "ort" (ONNX Runtime), "openvino", "tensorrt" or "qnn", which decides what is refused
    (:class:`adaround_ext.export.onnx_targets.Target`). Names are those of the parameters of
    ``forward`` and of the output's fields unless they are given. dynamic_shapes: as torch.export
    takes them; with "auto" dimension 0 of inputs, and 1 of token ids and masks, may change where
    the model lets them. channel_blocks: repeats scales of Linears that have one a channel, or one,
    for blocks of 16, 32, 64, 128 or 256 inputs: ONNX Runtime before 1.25 makes MatMulNBits of
    blocks only. external_data: weights in model.onnx.data; from 1.5 GiB on unless given.

    The model is not changed. Raises ImportError without onnx and onnxscript; TypeError and
    ValueError for options, arguments and models that do not fit, naming layers with the reason.
    Format: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html.
    """
    _need_packages()
    _check_options(target, opset, channel_blocks, dynamic_shapes)
    contents = Contents(model, TARGETS[target], channel_blocks)
    positional, named = arguments(args)
    positional, named = ordered(model, positional, named | dict(kwargs or {}))
    positional, named = distinct((positional, named))
    with new_export(folder, KIND) as (part, details), evaluation(model):
        leaves = bind(model, positional, named)
        tensors = [name for name, leaf in leaves.items() if isinstance(leaf, Tensor)]
        found = output_names_of(_output(model, positional, named))
        inputs = chosen_names("input_names", input_names, tensors)
        outputs = chosen_names("output_names", output_names, found, inputs)
        if isinstance(dynamic_shapes, str):
            shapes = automatic_shapes(model, positional, named)
            graph = _graph(model, contents, positional, named, shapes, opset)
            name_axes_(graph)
        else:
            graph = _graph(model, contents, positional, named, dynamic_shapes, opset)
        name_values_(graph, inputs, outputs)
        _save(graph, part, external_data)
        details.update(
            target=target,
            opset=opset,
            inputs=dict(zip(tensors, inputs, strict=True)),
            constants=plain_leaves(leaves),
            outputs=outputs,
            **contents.details(),
        )


def _need_packages() -> None:
    for package in ("onnx", "onnxscript"):
        if importlib.util.find_spec(package) is None:
            needs = f"the ONNX export needs the package {package}"
            raise ImportError(f'{needs}: pip install "adaround_ext[onnx]"')


def _check_options(target: str, opset: int, channel_blocks: int | None, shapes: Any) -> None:
    from onnx import defs

    if target not in TARGETS:
        raise ValueError(f"target must be one of {', '.join(TARGETS)}, got {target!r}")
    latest = defs.onnx_opset_version()
    if not isinstance(opset, int) or not _FIRST_OPSET <= opset <= latest:
        raise ValueError(f"opset must be in {_FIRST_OPSET}..{latest}, got {opset!r}")
    if channel_blocks is not None and (target != "ort" or channel_blocks not in MATMUL_BLOCKS):
        sizes = ", ".join(map(str, MATMUL_BLOCKS))
        rule = f"channel_blocks must be None, or for target 'ort' one of {sizes}"
        raise ValueError(f"{rule}, got {channel_blocks!r} for {target!r}")
    if isinstance(shapes, str) and shapes != "auto":
        raise ValueError(f"dynamic_shapes must be 'auto' or as torch.export's, got {shapes!r}")


def _output(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    try:
        return model(*args, **kwargs)
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"args must be what the model takes, got {got}") from error


def _graph(
    model: nn.Module,
    contents: Contents,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
    opset: int,
) -> ir.Model:
    """The model as an onnx_ir model, without traces of the machine that made it."""
    from onnx_ir.passes import common

    with (
        torch.compiler.set_stance("default"),  # torch.cond compiles its branches
        marked(model, contents.layers, contents.quantizers, kwargs) as called,
    ):
        try:
            program = torch.onnx.export(
                model,
                args if kwargs else (*args, {}),  # a dict at the end would be taken for kwargs
                kwargs=kwargs,
                dynamic_shapes=shapes,
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            cause = error.__cause__ or error
            raise ValueError(
                f"model must be one that torch.onnx.export can trace, got {type(cause).__name__}: "
                f"{cause}"
            ) from error
    missing = [layer.name for i, layer in enumerate(contents.layers) if i not in called]
    if missing:
        raise ValueError(
            f"args must lead through every quantized layer, got none for {', '.join(missing)}"
        )
    assert program is not None
    graph = program.model
    expand_(graph, contents.weight_of, contents.quantizer_of, contents.target.bias_apart)
    common.ClearMetadataAndDocStringPass()(graph)
    for value in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    graph.producer_name = "adaround_ext"
    graph.producer_version = str(build_info()["version"])
    return graph


def _save(graph: ir.Model, folder: Path, external_data: bool | None) -> None:
    import onnx_ir as ir

    weights = [value.const_value for value in graph.graph.initializers.values()]
    if external_data is None:
        external_data = sum(weight.nbytes for weight in weights if weight is not None) >= _LARGE
    data = f"{FILE}.data" if external_data else None
    ir.save(graph, folder / FILE, external_data=data, size_threshold_bytes=_SMALL)
