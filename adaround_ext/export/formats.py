"""All export formats by name, and one call for any of them."""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

from torch import nn

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
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {kind!r}")
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

    format: one of :data:`FORMATS`; the functions of their modules have further options. batch: an
    example of what the model takes, for "onnx" and "aimet", and for a program beside "torchao"'s
    tensors. target: the runtime of "onnx" files. tokenizer: saved beside "compressed-tensors".
    Raises ImportError where a package of the format is missing, TypeError and ValueError for what
    it cannot hold, with the reason.
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
