"""Hugging Face models: what a class builds from its configuration, and loads from a directory."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

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
            new_bias = key.endswith(".bias") and key not in theirs
            hint = ': quantize with bias="refit" or "keep"' if new_bias else ""
            raise ValueError(f"{rule}, got {got}{hint}")


def load_alike(folder: Path, kind: type[nn.Module], **settings: Any) -> PreTrainedModel:
    """What ``from_pretrained`` makes of a directory; ValueError where files and class disagree."""
    load: Any = kind.from_pretrained  # type: ignore[attr-defined]
    settings |= {"dtype": "auto", "local_files_only": True, "output_loading_info": True}
    rule = f"model must be one that transformers can load quantized, {kind.__name__}: "
    with no_progress_bars():
        try:
            loaded, info = load(folder, **settings)
        except Exception as error:
            raise ValueError(f"{rule}{error}") from error
    if disagreements := {key: sorted(map(str, keys)) for key, keys in info.items() if keys}:
        raise ValueError(f"{rule}{disagreements}")
    return loaded  # type: ignore[no-any-return]


@contextmanager
def no_progress_bars() -> Iterator[None]:
    """transformers shows none inside."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()
