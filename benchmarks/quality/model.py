"""MiniLM end to end: what quantized weights do to sentence embeddings."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.quality.methods import Rounding
from benchmarks.workloads import minilm

METHODS = ("nearest", "gptq", "fast", "balanced", "best")
Batches = Iterable[Mapping[str, Tensor]]


def measure(
    model: nn.Module,
    texts: Mapping[str, Batches],
    roundings: Mapping[tuple[int, str], Mapping[str, Rounding]],
) -> list[dict[str, Any]]:
    """A row for every (bits, method): mean 1 - cosine to the full-precision model's embeddings.

    ``roundings`` holds the layers by name, as "3.query"; all were found with full-precision inputs.
    """
    exact = {name: embeddings(model, batches) for name, batches in texts.items()}
    rows = []
    for (bits, method), layers in roundings.items():
        quantized = copy.deepcopy(model)
        for name, rounding in layers.items():
            block, short = name.split(".", 1)
            _replace(minilm.block_layers(quantized, int(block))[short], rounding)
        distances = {
            name: distance(embeddings(quantized, batches), exact[name])
            for name, batches in texts.items()
        }
        rows.append({"bits": bits, "method": method, "layers": len(layers)} | distances)
    return rows


@torch.no_grad()
def _replace(layer: nn.Linear, rounding: Rounding) -> None:
    layer.weight.copy_(rounding.weight)
    if rounding.bias is not None:
        layer.bias.copy_(rounding.bias)


def distance(embedded: Tensor, exact: Tensor) -> float:
    """Mean 1 - cosine of two sets of :func:`embeddings`."""
    # Of unit vectors it is half the squared distance, without cancellation.
    return float((embedded - exact).square().sum(1).mean() / 2)


@torch.no_grad()
def embeddings(model: nn.Module, batches: Batches) -> Tensor:
    """float64 [sequences, features]: the mean over tokens, at length 1; no token is padding."""
    device = next(model.parameters()).device
    vectors = []
    for batch in batches:
        states = model(**{key: value.to(device) for key, value in batch.items()}).last_hidden_state
        vectors.append(F.normalize(states.double().mean(1), dim=1))
    return torch.cat(vectors)
