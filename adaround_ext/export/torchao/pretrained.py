"""Hugging Face directories with torchao tensors, as transformers itself would have written them."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaround_ext.export.hugging_face import check_alike, load_alike, no_progress_bars, skeleton
from adaround_ext.export.quantized_layers import QuantizedLayer


def is_as_built(model: nn.Module) -> bool:
    """Whether transformers builds such a model, with the same state, from its configuration.

    It does not where biases are new, batch norms folded or activation quantizers attached.
    """
    try:
        from transformers import PreTrainedModel
    except ImportError:
        return False
    if not isinstance(model, PreTrainedModel):
        return False
    try:
        check_alike(model, skeleton(model))
    except ValueError:
        return False
    return True


def save_pretrained(
    converted: Any, layers: Sequence[QuantizedLayer], folder: Path, model: nn.Module
) -> bool:
    """As transformers saves a model that it has quantized by torchao itself.

    Without files, and False, where it would load tensors in other dtypes than the model's.
    """
    from torchao.quantization import FqnToConfig  # type: ignore[import-untyped]
    from transformers import TorchAoConfig
    from transformers.quantizers.auto import AutoHfQuantizer

    configs = {layer.name: _config(layer) for layer in layers}
    linears = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    first, *others = configs.values()
    config = TorchAoConfig(
        first if all(other == first for other in others) else FqnToConfig(configs),
        modules_to_not_convert=[name for name in linears if name not in configs] or None,
    )
    converted.config.quantization_config = config
    converted.hf_quantizer = AutoHfQuantizer.from_config(config, pre_quantized=True)
    settings: dict[str, Any] = {}
    if "safe_serialization" in inspect.signature(converted.hf_quantizer.is_serializable).parameters:
        # transformers 4 writes these tensors as a state dict of torch alone, and asks for what its
        # own loading has set.
        settings["safe_serialization"] = False
        converted.hf_quantizer.offload = False
    with no_progress_bars():
        converted.save_pretrained(folder, **settings)
    del converted.hf_quantizer, converted.config.quantization_config
    state = load_alike(folder, type(model)).state_dict()
    for key, tensor in model.state_dict().items():
        back = state[key].dequantize() if hasattr(state[key], "qdata") else state[key]
        if back.dtype != tensor.dtype:
            for path in folder.iterdir():
                path.unlink()
            return False
        if not torch.equal(back, tensor.cpu()):
            raise ValueError(f"model must be the same after loading again, got another {key}")
    return True


def _config(layer: QuantizedLayer) -> Any:
    """How torchao calls a layer's settings; for the reader, as loading takes the tensors' own."""
    from torchao.quantization import IntxWeightOnlyConfig, MappingType, PerAxis, PerGroup

    grouped = layer.granularity == "per_group"
    return IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{layer.bits}"),
        granularity=PerGroup(layer.group_size) if grouped else PerAxis(0),
        mapping_type=MappingType.SYMMETRIC if layer.symmetric else MappingType.ASYMMETRIC,
    )
