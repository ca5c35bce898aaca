"""ONNX programs: a model traced into a marked graph, and a finished graph written to a file."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.checks import refuse_inference
from adaround_ext.export.onnx.trace import marked
from adaround_ext.export.quantized_layers import QuantizedLayer
from adaround_ext.export.torch_export import NAMES_HINT
from adaround_ext.ops.library import build_info

if TYPE_CHECKING:
    import onnx_ir as ir

_LARGE = 3 << 29  # bytes of all initializers: 1.5 GiB; one file cannot have 2 GiB
_SMALL = 1024  # bytes of an initializer that stays in the file of the graph


def output_of(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """What the model returns; ValueError where it cannot run on these arguments."""
    try:
        return model(*args, **kwargs)
    except Exception as error:
        got = f"{type(error).__name__}: {error}"
        raise ValueError(f"args must be what the model takes, got {got}") from error


def traced(
    model: nn.Module,
    layers: Sequence[QuantizedLayer],
    quantizers: Sequence[ActivationQuantizer],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    shapes: Any,
    opset: int | None = None,
) -> ir.Model:
    """The model as an onnx_ir graph in which layers and quantizers are marked.

    shapes: torch.export's dynamic_shapes. Raises ValueError for a model that torch.onnx.export
    cannot trace, and where ``args`` do not lead through every layer.
    """
    refuse_inference((*model.named_parameters(), *model.named_buffers()))
    with (
        _without_noise(),
        torch.compiler.set_stance("default"),  # torch.cond compiles its branches
        marked(model, layers, quantizers, kwargs) as called,
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
            rule = "model must be one that torch.onnx.export can trace"
            got = f"{type(cause).__name__}: {cause}"
            hint = NAMES_HINT if isinstance(cause, SyntaxError) else ""
            raise ValueError(f"{rule}, got {got}{hint}") from error
    missing = [layer.name for index, layer in enumerate(layers) if index not in called]
    if missing:
        rule = "args must lead through every quantized layer"
        raise ValueError(f"{rule}, got none for {', '.join(missing)}")
    assert program is not None
    graph: ir.Model = program.model
    return graph


@contextmanager
def _without_noise() -> Iterator[None]:
    """What torch's own exporter says of itself, whatever the model: nobody can do anything."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)  # one line for each operator of torchvision, without that
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)
            yield
    finally:
        logger.setLevel(level)


def save(graph: ir.Model, path: Path, external_data: bool | None = None) -> None:
    """Writes a graph without traces of the machine that made it.

    external_data: initializers in a file beside it; from 1.5 GiB on unless given.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    common.ClearMetadataAndDocStringPass()(graph)
    for value in (*graph.graph.inputs, *graph.graph.outputs, *graph.graph.initializers.values()):
        value.metadata_props.clear()
    graph.producer_name = "adaround_ext"
    graph.producer_version = str(build_info()["version"])
    constants = [value.const_value for value in graph.graph.initializers.values()]
    if external_data is None:
        external_data = sum(c.nbytes for c in constants if c is not None) >= _LARGE
    data = f"{path.name}.data" if external_data else None
    ir.save(graph, path, external_data=data, size_threshold_bytes=_SMALL)
