"""Export formats: all of them by name, one call for any of them, and the packages they need."""

from __future__ import annotations

import importlib
import importlib.util
import os
from types import ModuleType
from typing import Any

from torch import nn

from adaround_ext.checks import fail

_MODULES = {
    "safetensors": "packed",
    "onnx": "onnx",
    "compressed-tensors": "compressed_tensors",
    "torchao": "torchao",
    "aimet": "aimet",
    "gguf": "gguf",
}
FORMATS = tuple(_MODULES)
TRACED = ("onnx", "aimet")  # these need an example of what the model takes


def format_module(kind: str) -> ModuleType:
    """The module of a format; ValueError for another name."""
    if not isinstance(kind, str) or kind not in _MODULES:
        fail("format", f"one of {', '.join(FORMATS)}", kind)
    return importlib.import_module(f"adaround_ext.export.{_MODULES[kind]}")


def export_model(
    model: nn.Module,
    folder: str | os.PathLike[str],
    format: str,
    *,
    batch: Any = None,
    target: str = "ort",
    tokenizer: Any = None,
) -> None:
    """Writes a quantized model to a new directory, in a format that runtimes load.

    The functions of the formats, such as :func:`adaround_ext.export.onnx.export_onnx`, have further
    options.

    Args:
        model: A model that :func:`adaround_ext.quantize_` has quantized. It is not changed.
        folder: The directory to write, new or empty.
        format: One of :data:`adaround_ext.export.FORMATS`.
        batch: An example of what the model takes, for "onnx" and "aimet", and for a program beside
            "torchao"'s tensors.
        target: The runtime of "onnx" files: "ort", "openvino", "tensorrt" or "qnn".
        tokenizer: Saved beside "compressed-tensors".

    Raises:
        ImportError: A package of the format is missing.
        TypeError: ``model`` is no module, or of a class that the format does not take.
        ValueError: For another format, for a model that is not quantized or that the format cannot
            hold, with the reason, and for a directory that is not new or empty.
        OSError: ``folder`` cannot be written.
    """
    module = format_module(format)
    if batch is None and format in TRACED:
        raise ValueError(
            f"batch must be given for {format}, to show what the model takes, got None"
        )
    if format == "safetensors":
        module.save_quantized(model, folder)
    elif format == "onnx":
        module.export_onnx(model, batch, folder, target=target)
    elif format == "compressed-tensors":
        module.export_compressed_tensors(model, folder, tokenizer=tokenizer)
    elif format == "torchao":
        module.export_torchao(model, folder, args=batch)
    elif format == "aimet":
        module.export_aimet(model, batch, folder)
    else:
        module.export_gguf(model, folder)


def need(what: str, extra: str, *packages: str) -> None:
    """ImportError saying that ``what`` needs a package, and which extra of ours brings it."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            hint = f'pip install "adaround_ext[{extra}]"'
            raise ImportError(f"{what} needs the package {package}: {hint}")
