"""quantize_ on Hugging Face models made from a configuration: nothing is downloaded."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, quantize_
from tests.model.test_quantize import codes
from tests.support import models

transformers = pytest.importorskip("transformers", reason="needs transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
FAST = AdaRoundConfig(preset="fast", bits=4)


def bert() -> nn.Module:
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=32,
        tie_word_embeddings=True,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def batches(padding: bool, **more: Any) -> list[dict[str, Any]]:
    found = []
    for index in range(3):
        ids = torch.randint(1, 50, (4, 8))
        mask = torch.ones_like(ids)
        if padding:
            mask[:, 8 - index :] = 0
        found.append({"input_ids": ids, "attention_mask": mask, **more})
    return found


def encoder_groups() -> list[list[str]]:
    groups = []
    for i in range(3):
        layer = f"encoder.layer.{i}"
        groups.append([f"{layer}.attention.self.{n}" for n in ("query", "key", "value")])
        groups += [[f"{layer}.{n}.dense"] for n in ("attention.output", "intermediate", "output")]
    return groups


def decoder_groups() -> list[list[str]]:
    groups = []
    for i in range(3):
        layer = f"model.layers.{i}"
        groups.append([f"{layer}.self_attn.{n}_proj" for n in "qkv"])
        groups.append([f"{layer}.self_attn.o_proj"])
        groups.append([f"{layer}.mlp.{n}_proj" for n in ("gate", "up")])
        groups.append([f"{layer}.mlp.down_proj"])
    return groups


@pytest.mark.parametrize(
    ("make", "groups", "more"),
    [
        (bert, encoder_groups(), {}),
        (llama, decoder_groups(), {"use_cache": True}),
        (llama, decoder_groups(), {"use_cache": False, "output_hidden_states": True}),
    ],
    ids=["encoder", "decoder with KV cache", "decoder"],
)
def test_as_without_recordings(make: Any, groups: list[list[str]], more: dict[str, Any]) -> None:
    model, data = make(), batches(padding=False, **more)
    expected = models.plain_walk(model, copy.deepcopy(data), groups, FAST)
    report = quantize_(model, data, FAST, progress=False)
    assert [entry.name for entry in report.layers] == [name for group in groups for name in group]
    got = codes(model)
    assert all(torch.equal(got[name], result.codes) for name, result in expected.items())
    assert {entry.block for entry in report.layers} == set(report.blocks)
    assert len(report.blocks) == 3


@pytest.mark.parametrize("make", [bert, llama])
def test_padding_and_tied_embeddings(make: Any) -> None:
    model, data = make(), batches(padding=True)
    before = model(**data[0])[0]
    embedding = model.get_input_embeddings().weight
    kept = embedding.detach().clone()
    report = quantize_(model, data, FAST, progress=False)
    assert {entry.report.samples for entry in report.layers} == {4 * (8 + 7 + 6)}
    assert torch.equal(embedding, kept)  # the decoder's head is the same tensor
    if make is llama:
        assert model.lm_head.weight is embedding
        assert "model.embed_tokens" in report.skipped["lm_head"]
    after = model(**data[0])[0]
    assert (after - before).norm() < 0.3 * before.norm()
    assert report.relative_error < 0.6 * report.nearest_error


def test_tokenizer_output_as_it_is() -> None:
    """One mapping of all samples, of a type that torch does not know."""
    data = batches(padding=True)
    joined: dict[str, Tensor] = {k: torch.cat([b[k] for b in data]) for k in data[0]}
    report = quantize_(
        bert(), transformers.BatchEncoding(joined), FAST, progress=False, mode="parallel"
    )
    assert (report.batches, report.samples) == (1, 12)


def test_generation_afterwards() -> None:
    """Nothing of the walk stays in the model: generation with its cache runs as ever."""
    model = llama()
    quantize_(model, batches(padding=False), FAST, progress=False)
    prompt = torch.randint(1, 50, (1, 4))
    one = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=True, pad_token_id=0)
    two = model.generate(prompt, max_new_tokens=6, do_sample=False, use_cache=False, pad_token_id=0)
    assert torch.equal(one, two)
