"""Padding masks belong to positions: an encoder's, a decoder's, those of one of two towers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import ActivationConfig, ModelReport, quantize_, sensitivity
from adaround_ext.activations.quantizer import ActivationQuantizer

pytestmark = pytest.mark.usefixtures("one_thread")
BATCH, TOKENS, REAL = 4, 12, 3
QUIET: dict[str, Any] = {"preset": "fast", "progress": False, "bits": 4}


class Translator(nn.Module):
    """An encoder, and a decoder that looks at it."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.encode, self.decode, self.out = (nn.Linear(8, 8) for _ in range(3))
        self.query, self.key = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Tensor:
        memory = torch.tanh(self.encode(self.embed(input_ids)))
        if decoder_input_ids is None:
            assert labels is not None
            decoder_input_ids = F.pad(labels[:, :-1], (1, 0))
        x = torch.tanh(self.decode(self.embed(decoder_input_ids)))
        weights = self.query(x) @ self.key(memory).transpose(1, 2)
        return self.out(x + weights.softmax(-1) @ memory)


def ids(tokens: int = TOKENS) -> Tensor:
    return torch.randint(0, 32, (BATCH, tokens))


def mask(real: int, tokens: int = TOKENS) -> Tensor:
    return (torch.arange(tokens) < real).long().expand(BATCH, -1).clone()


def rows(report: ModelReport) -> dict[str, int]:
    return {layer.name: layer.report.samples for layer in report.layers}


@pytest.mark.parametrize("length", [TOKENS - 1, TOKENS])
@pytest.mark.parametrize("decoder", [None, 5])
@pytest.mark.parametrize("labels", [False, True])
def test_an_encoders_mask_is_not_the_decoders(
    length: int, decoder: int | None, labels: bool
) -> None:
    batch = {"input_ids": ids(), "attention_mask": mask(REAL)}
    batch["labels" if labels else "decoder_input_ids"] = ids(length)
    if decoder is not None:
        batch["decoder_attention_mask"] = mask(decoder, length)
    row_counts = rows(quantize_(Translator(), [batch, batch], **QUIET))
    encoder_rows = 2 * BATCH * REAL
    # Labels have no mask, and no name that one would begin with.
    decoder_rows = 2 * BATCH * (length if decoder is None or labels else decoder)
    assert row_counts["encode"] == row_counts["key"] == encoder_rows
    assert row_counts["decode"] == row_counts["query"] == row_counts["out"] == decoder_rows


def test_the_order_of_arguments_does_not_matter() -> None:
    batch = {"decoder_input_ids": ids(), "attention_mask": mask(REAL), "input_ids": ids()}
    row_counts = rows(quantize_(Translator(), [batch], **QUIET))
    assert (row_counts["encode"], row_counts["decode"]) == (BATCH * REAL, BATCH * TOKENS)


def test_a_functions_mask_is_the_encoders() -> None:
    batch = {"input_ids": ids(), "decoder_input_ids": ids()}
    report = quantize_(Translator(), [batch], padding_mask=lambda batch: mask(REAL), **QUIET)
    row_counts = rows(report)
    assert (row_counts["encode"], row_counts["decode"]) == (BATCH * REAL, BATCH * TOKENS)


@pytest.mark.parametrize("name", ["Bart", "T5"])
def test_models_of_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 64, "decoder_start_token_id": 0}
    if name == "Bart":
        names = ["encoder", "decoder"]
        counts = [f"{side}_{what}" for side in names for what in ("layers", "attention_heads")]
        sizes |= dict.fromkeys(counts, 1) | {f"{side}_ffn_dim": 16 for side in names}
        sizes |= {"d_model": 8, "max_position_embeddings": 16}
    else:
        sizes |= {"d_model": 8, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 1}
    config = getattr(transformers, f"{name}Config")(**sizes)
    model = getattr(transformers, f"{name}ForConditionalGeneration")(config).eval()
    batch = {"input_ids": ids(), "attention_mask": mask(REAL), "labels": ids()}
    row_counts = rows(quantize_(model, [batch], **QUIET))
    decoder = {n for n in row_counts if "decoder" in n}
    memory = {n for n in decoder if any(k in n for k in ("encoder_attn.k", "encoder_attn.v"))}
    memory |= {n for n in decoder if "EncDecAttention.k" in n or "EncDecAttention.v" in n}
    assert len(memory) == 2 and len(decoder) > 6 and len(row_counts) > len(decoder)
    for layer, count in row_counts.items():
        alone = layer in decoder and layer not in memory
        assert count == BATCH * (TOKENS if alone else REAL), layer


class Towers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(32, 8)
        self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(
        self, query: Tensor, document: Tensor, attention_mask: Tensor, **masks: Tensor
    ) -> Tensor:
        a, b = self.left(self.embed(query)), self.right(self.embed(document))
        return a.mean(1) @ b.mean(1).t()


def test_a_choice_is_noted() -> None:
    batch = {"query": ids(), "document": ids(), "attention_mask": mask(REAL)}
    report = quantize_(Towers(), [batch], **QUIET)
    assert rows(report) == {"left": BATCH * REAL, "right": BATCH * TOKENS}
    said = "attention_mask is taken for the padding of query, not of document"
    assert said in str(report.notes)
    batch["document_attention_mask"] = mask(5)
    report = quantize_(Towers(), [batch], **QUIET)
    assert rows(report) == {"left": BATCH * REAL, "right": BATCH * 5}
    assert "is taken for the padding" not in str(report.notes)


class Added(nn.Module):
    """Arguments that are added up are of the same positions."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.types = nn.Embedding(32, 8), nn.Embedding(2, 8)
        self.layer = nn.Linear(8, 8)

    def forward(self, token_type_ids: Tensor, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.layer(self.words(input_ids) + self.types(token_type_ids))


def test_arguments_of_the_same_positions() -> None:
    batch = {"token_type_ids": ids() % 2, "input_ids": ids(), "attention_mask": mask(REAL)}
    report = quantize_(Added(), [batch], **QUIET)
    assert rows(report) == {"layer": BATCH * REAL}
    assert "is taken for the padding" not in str(report.notes)


def test_ranges_of_activations() -> None:
    """Loud tokens at the encoder's padding are not seen; the decoder's at those places are."""
    torch.manual_seed(0)
    model = Translator()
    with torch.no_grad():
        model.embed.weight[31] *= 1000
    quiet, loud = ids() % 31, ids() % 31
    loud[:, REAL:] = 31
    batch = {"input_ids": loud, "attention_mask": mask(REAL), "decoder_input_ids": quiet}
    quantize_(model, [batch], activations=ActivationConfig(), **QUIET)
    scales = {n: m.scale for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    assert float(scales["encode.input_quantizer"].max()) < 1

    model = Translator()
    with torch.no_grad():
        model.embed.weight[31] *= 1000
    batch = {"input_ids": quiet, "attention_mask": mask(REAL), "decoder_input_ids": loud}
    quantize_(model, [batch], activations=ActivationConfig(), **QUIET)
    scales = {n: m.scale for n, m in model.named_modules() if isinstance(m, ActivationQuantizer)}
    assert float(scales["decode.input_quantizer"].max()) > 1


def test_sensitivity_measures_all_of_the_decoder() -> None:
    """Its outputs are at the decoder's positions, none of which is padding."""
    torch.manual_seed(0)
    model = Translator()
    plain = {"input_ids": ids(), "decoder_input_ids": ids()}
    settings: dict[str, Any] = {"bits": (4,), "filter_fn": lambda module, name: name == "out"}
    masked = sensitivity(
        model, [plain | {"attention_mask": mask(REAL)}], progress=False, **settings
    )
    every = sensitivity(model, [plain], progress=False, **settings)
    assert masked.network == every.network
