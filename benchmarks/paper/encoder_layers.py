"""Rows of MiniLM's layers with text drawn for their calibration, and the error of a rounding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from benchmarks.quality.layers import Moments, Subject
from benchmarks.workloads import minilm

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

LAYERS = ("query", "attn.output", "intermediate")
BLOCK = 3
Batches = list[dict[str, Tensor]]


def subjects(rows: int, draws: int, sequences: int) -> Iterator[tuple[int, Subject]]:
    """(draw, layer) for every draw of calibration text, with the first ``rows`` of each layer.

    Rows do not depend on each other, so their codes are those that they have in the whole layer.
    The held-out text is the same for all draws.
    """
    model, tokenizer = minilm.load_encoder()
    held_out = minilm.layer_inputs(model, minilm.text_batches(tokenizer, "held_out"), BLOCK)
    known = {name: Moments.of(layer, [held_out[name]]) for name, layer in _cut(model, rows)}
    for draw in range(draws):
        batches = drawn(everything(tokenizer), sequences, draw)
        inputs = minilm.layer_inputs(model, batches, BLOCK)
        for name, layer in _cut(model, rows):
            x = inputs[name]
            yield draw, Subject("minilm", name, layer, x, Moments.of(layer, [x]), known[name])


def everything(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """All windows of the calibration text, [windows, 32] token ids."""
    parts = [minilm.text_batches(tokenizer, unused=unused) for unused in (False, True)]
    return torch.cat([batch["input_ids"] for batches in parts for batch in batches])


def drawn(windows: Tensor, count: int, seed: int) -> Batches:
    """So many of the windows, without replacement, in batches of 32."""
    generator = torch.Generator().manual_seed(seed)
    chosen = windows[torch.randperm(len(windows), generator=generator)[:count]]
    return [{"input_ids": batch} for batch in chosen.split(32)]


def _cut(model: PreTrainedModel, rows: int) -> Iterator[tuple[str, nn.Linear]]:
    layers: Mapping[str, nn.Linear] = minilm.block_layers(model, BLOCK)
    for name in LAYERS:
        whole = layers[name]
        layer = nn.Linear(whole.in_features, min(rows, whole.out_features))
        with torch.no_grad():
            layer.weight.copy_(whole.weight[:rows])
            layer.bias.copy_(whole.bias[:rows])
        yield name, layer.requires_grad_(False)
