"""Decoders of the Llama shape with random weights, and token batches, padded or not."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

# Arguments of llama_shaped. 1b-ish has TinyLlama's shape: 1.1e9 weights, 4.4 GB in float32; 8b has
# that of Llama 3: 8.0e9 weights, 16 GB in bfloat16.
PRESETS = {
    "tiny": {
        "layers": 2,
        "hidden": 64,
        "intermediate": 176,
        "heads": 4,
        "kv_heads": 2,
        "vocabulary": 256,
    },
    "1b-ish": {
        "layers": 22,
        "hidden": 2048,
        "intermediate": 5632,
        "heads": 32,
        "kv_heads": 4,
        "vocabulary": 32000,
    },
    "8b": {
        "layers": 32,
        "hidden": 4096,
        "intermediate": 14336,
        "heads": 32,
        "kv_heads": 8,
        "vocabulary": 128256,
    },
}
_PADDING = 0  # the token behind a sequence's end, and none of a sequence's own


def llama_shaped(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    vocabulary: int,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LlamaForCausalLM:
    """A causal language model in eval mode, its weights drawn by ``seed`` on ``device``.

    Weights have the variance 1 / ``hidden``, biases do not exist, and the output layer is not tied
    to the embedding. ImportError without transformers; ValueError where ``heads`` does not divide
    ``hidden``, or ``kv_heads`` does not divide ``heads``.
    """
    if importlib.util.find_spec("transformers") is None:
        needs = "the decoder needs the package transformers"
        raise ImportError(f'{needs}: pip install "adaround_ext[demo]"')
    from transformers import AutoModelForCausalLM, LlamaConfig

    if hidden % heads or heads % kv_heads:
        rule = "heads must divide hidden, and kv_heads must divide heads"
        raise ValueError(f"{rule}, got hidden={hidden}, heads={heads}, kv_heads={kv_heads}")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        initializer_range=hidden**-0.5,
        tie_word_embeddings=False,
        use_cache=False,
    )
    cuda = [] if torch.device(device).type == "cpu" else [device]
    with torch.random.fork_rng(devices=cuda), torch.device(device):
        torch.manual_seed(seed)
        model: LlamaForCausalLM = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.eval()
    return model


def preset(name: str, seed: int = 0) -> LlamaForCausalLM:
    """:func:`llama_shaped` of a preset; ValueError for a name that is none of PRESETS."""
    if name not in PRESETS:
        raise ValueError(f"name must be one of {', '.join(PRESETS)}, got {name!r}")
    return llama_shaped(**PRESETS[name], seed=seed)


def token_batches(
    count: int, batch_size: int, length: int, vocabulary: int, seed: int = 0, padded: bool = False
) -> Iterator[dict[str, Tensor]]:
    """``count`` sequences as {"input_ids", "attention_mask"}, int64 [batch_size, length].

    Tokens are independent, from 1 to ``vocabulary`` - 1, token k with a probability of about 1 / k,
    as the words of a text. ``padded``: a sequence has 1 to ``length`` tokens, the number drawn
    evenly; padding is on the right, 0 in both tensors. A sequence depends on its index and on the
    arguments behind ``batch_size`` only. The last batch may be smaller. ValueError for a number
    below 1, or a vocabulary below 2.
    """
    for name, value in (("count", count), ("batch_size", batch_size), ("length", length)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if vocabulary < 2:
        raise ValueError(f"vocabulary must be at least 2, got {vocabulary}")
    starts = range(0, count, batch_size)
    return (
        _batch(range(n, min(n + batch_size, count)), length, vocabulary, seed, padded)
        for n in starts
    )


def _batch(
    indices: range, length: int, vocabulary: int, seed: int, padded: bool
) -> dict[str, Tensor]:
    ids = torch.full((len(indices), length), _PADDING)
    mask = torch.zeros_like(ids)
    for row, index in enumerate(indices):
        random = np.random.default_rng((seed, index))
        tokens = int(random.integers(1, length + 1)) if padded else length
        drawn = np.floor(float(vocabulary) ** random.random(tokens))  # log-uniform
        ids[row, :tokens] = torch.from_numpy(np.minimum(drawn, vocabulary - 1)).long()
        mask[row, :tokens] = 1
    return {"input_ids": ids, "attention_mask": mask}
