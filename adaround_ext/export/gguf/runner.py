"""GGUF runners: what gguf-py and transformers read of a file, in the model's place."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.export.formats import need
from adaround_ext.export.gguf.architecture import row_order
from adaround_ext.export.manifest import read_manifest
from adaround_ext.export.runner import Runner, module_runner

KIND = "gguf"
FILE = "model.gguf"
_READABLE_BY_TRANSFORMERS = ("llama", "qwen2")


def runners(folder: Path, model: nn.Module) -> list[Runner]:
    """gguf-py's reader and dequantization; transformers, with accelerate and if it reads such."""
    details = read_manifest(folder, KIND).details
    gguf_package()
    loaded = copy.deepcopy(model)
    with torch.no_grad():
        state = loaded.state_dict()
        for tensor in state.values():  # so that nothing of the model itself is left
            tensor.fill_(torch.nan if tensor.is_floating_point() else 0)
        for key, tensor in read_tensors(folder, details["tensors"]).items():
            state[key].copy_(tensor.view(state[key].shape))
    ways = [module_runner("gguf-py", loaded)]
    known = details["architecture"] in _READABLE_BY_TRANSFORMERS
    if known and importlib.util.find_spec("accelerate"):  # which transformers asks for
        load: Any = type(model).from_pretrained  # type: ignore[attr-defined]
        loaded = load(folder, gguf_file=FILE, dtype=next(model.parameters()).dtype)
        ways.append(module_runner("transformers, gguf_file", loaded))
    return ways


def gguf_package() -> ModuleType:
    """gguf-py; ImportError that says how to get it."""
    need("exporting to GGUF", "gguf", "gguf")
    import gguf

    return gguf


def read_tensors(folder: Path, tensors: Mapping[str, Mapping[str, Any]]) -> dict[str, Tensor]:
    """What gguf-py reads, dequantized, by key in the state dict; rows in the model's order."""
    gguf = gguf_package()
    try:
        stored = {tensor.name: tensor for tensor in gguf.GGUFReader(folder / FILE).tensors}
    except ValueError as error:  # numpy may have written a part, and said nothing
        raise OSError(f"{FILE} is not whole: {error}") from error
    quantized = (gguf.GGMLQuantizationType.Q4_0, gguf.GGMLQuantizationType.Q8_0)
    read = {}
    for key, entry in tensors.items():
        tensor = stored[entry["name"]]
        data = tensor.data
        if tensor.tensor_type in quantized:
            data = gguf.quants.dequantize(data, tensor.tensor_type)
        read[key] = torch.tensor(data, device="cpu")
        if entry["heads"]:
            read[key] = read[key][row_order(len(data), entry["heads"]).argsort()]
    return read
