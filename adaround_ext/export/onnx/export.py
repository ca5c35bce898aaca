"""ONNX export: a quantized model as QuantizeLinear and DequantizeLinear around float operators."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from adaround_ext.checks import fail
from adaround_ext.export.formats import need
from adaround_ext.export.manifest import new_export
from adaround_ext.export.onnx.contents import Contents
from adaround_ext.export.onnx.graph import expand_
from adaround_ext.export.onnx.names import chosen_names, name_axes_, name_values_, output_names_of
from adaround_ext.export.onnx.program import output_of, save, traced
from adaround_ext.export.onnx.runner import FILE, KIND
from adaround_ext.export.onnx.targets import MATMUL_BLOCKS, TARGETS
from adaround_ext.export.torch_export import automatic_shapes, bind, distinct, ordered, plain_leaves
from adaround_ext.tracing.arguments import arguments
from adaround_ext.tracing.evaluation import evaluation

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

    The model is not changed. Format: https://onnx.ai/onnx/operators/onnx__DequantizeLinear.html.

    Args:
        model: A model that :func:`adaround_ext.quantize_` has quantized.
        args: An example of what the model takes, like a batch of ``quantize_``.
        folder: The directory to write, new or empty.
        target: "ort" (ONNX Runtime), "openvino", "tensorrt" or "qnn", which decides what is
            refused.
        kwargs: More arguments of the example, by keyword.
        input_names: Names of the tensors that go in, in the order of the parameters of
            ``forward``; those of the parameters unless given.
        output_names: Names of the tensors that come out; those of the output's fields unless given.
        dynamic_shapes: As torch.export takes them; with "auto" dimension 0 of inputs, and 1 of
            token ids and masks, may change where the model lets them.
        opset: Of the file, at least 21, which has int4 and blocks.
        channel_blocks: Repeats scales of Linears that have one a channel, or one, for blocks of 16,
            32, 64, 128 or 256 inputs: ONNX Runtime before 1.25 makes MatMulNBits of blocks only.
        external_data: Whether weights lie in model.onnx.data; from 1.5 GiB on unless given.

    Raises:
        ImportError: onnx or onnxscript is missing.
        TypeError: ``model`` is no module, or the arguments do not fit it.
        ValueError: Options, arguments or the model do not fit; layers are named with the reason.
    """
    need("the ONNX export", "onnx", "onnx", "onnxscript")
    _check_options(target, opset, channel_blocks, dynamic_shapes)
    contents = Contents(model, TARGETS[target], channel_blocks)
    positional, named = arguments(model, args, "args")
    positional, named = ordered(model, positional, named | dict(kwargs or {}))
    positional, named = distinct((positional, named))
    with new_export(folder, KIND) as (directory, details), evaluation(model):
        leaves = bind(model, positional, named)
        tensors = [name for name, leaf in leaves.items() if isinstance(leaf, Tensor)]
        fields = output_names_of(output_of(model, positional, named))
        inputs = chosen_names("input_names", input_names, tensors)
        outputs = chosen_names("output_names", output_names, fields, inputs)
        if isinstance(dynamic_shapes, str):
            shapes = automatic_shapes(model, positional, named)
        else:
            shapes = dynamic_shapes
        graph = traced(
            model, contents.layers, contents.quantizers, positional, named, shapes, opset
        )
        expand_(graph, contents.weight_of, contents.quantizer_of, contents.target.bias_apart)
        if isinstance(dynamic_shapes, str):
            name_axes_(graph)
        name_values_(graph, inputs, outputs)
        save(graph, directory / FILE, external_data)
        details.update(
            target=target,
            opset=opset,
            inputs=dict(zip(tensors, inputs, strict=True)),
            constants=plain_leaves(leaves),
            outputs=outputs,
            **contents.details(),
        )


def _check_options(target: str, opset: int, channel_blocks: int | None, shapes: Any) -> None:
    from onnx import defs

    if target not in TARGETS:
        fail("target", f"one of {', '.join(TARGETS)}", target)
    latest = defs.onnx_opset_version()
    if not isinstance(opset, int) or not _FIRST_OPSET <= opset <= latest:
        fail("opset", f"in {_FIRST_OPSET}..{latest}", opset)
    if channel_blocks is not None and (target != "ort" or channel_blocks not in MATMUL_BLOCKS):
        sizes = ", ".join(map(str, MATMUL_BLOCKS))
        rule = f"channel_blocks must be None, or for target 'ort' one of {sizes}"
        raise ValueError(f"{rule}, got {channel_blocks!r} for {target!r}")
    if isinstance(shapes, str) and shapes != "auto":
        fail("dynamic_shapes", "'auto' or as torch.export's", shapes)
