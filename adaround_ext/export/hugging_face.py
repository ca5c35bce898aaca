"""What a class of transformers builds from its configuration."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def skeleton(model: PreTrainedModel) -> PreTrainedModel:
    """A model of the same class and configuration, on the meta device, in the model's dtype."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        built: PreTrainedModel = type(model)(config)
    built.to(dtype=model.dtype)  # type: ignore[arg-type, call-arg]
    if getattr(model, "generation_config", None) is not None:
        built.generation_config = copy.deepcopy(model.generation_config)
    return built


def check_alike(model: PreTrainedModel, built: PreTrainedModel) -> None:
    """ValueError unless both have tensors of the same names and shapes."""
    ours, theirs = (
        {key: list(tensor.shape) for key, tensor in each.state_dict().items()}
        for each in (model, built)
    )
    for key in (*ours, *theirs):
        if ours.get(key) != theirs.get(key):
            rule = f"model must hold what {type(model).__name__} builds from its configuration"
            got = f"{key} {ours.get(key, 'missing')} instead of {theirs.get(key, 'none')}"
            made = key.endswith(".bias") and key not in theirs
            hint = ': quantize with bias="refit" or "keep"' if made else ""
            raise ValueError(f"{rule}, got {got}{hint}")
