"""What ``export_for`` chooses and refuses, before anything is optimised."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaround_ext import ActivationConfig, AdaRoundConfig, quantize_
from adaround_ext.export.goal.targets import EXPORT_TARGETS
from tests.support.target_models import (  # noqa: F401  a fixture
    FAST,
    ONNX,
    convolutions,
    exported,
    images,
    llama,
    never_solved,
    tokens,
)

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", EXPORT_TARGETS)
def test_a_bfloat16_model_ends_there(name: str, tmp_path: Path) -> None:
    model = llama(tmp_path, torch.bfloat16)
    report = quantize_(model, tokens(), export_for=name, **FAST)
    assert exported(model, name, tokens(1)[0], tmp_path / "there")
    dtype = torch.float32 if name in ONNX else torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {dtype}
    noted = f"the model is float32 now: {name} has no bfloat16"
    assert (noted in report.notes) == (name in ONNX)
    dtypes = {entry.config["scale_dtype"] for entry in report.layers}
    assert dtypes == {"gguf": {"float16"}}.get(name, {str(dtype).removeprefix("torch.")})
    # 64 and 96 columns.
    sizes = {entry.config["group_size"] for entry in report.layers}
    assert sizes == ({64, None} if name == "tensorrt" else {32})
    assert ("lm_head" in report.skipped) == (name in ("vllm", "transformers"))


@pytest.mark.parametrize("name", ["vllm", "gguf"])
def test_a_float16_model_ends_there(name: str, tmp_path: Path) -> None:
    model = llama(tmp_path, torch.float16)
    quantize_(model, tokens(), export_for=name, bits=8, **FAST)
    assert exported(model, name, tokens(1)[0], tmp_path / "there")


def test_settings_win_where_the_format_allows(tmp_path: Path) -> None:
    model = llama(tmp_path, torch.bfloat16)
    config = AdaRoundConfig(preset="fast", granularity="per_group", group_size=16)
    report = quantize_(
        model,
        tokens(),
        config,
        export_for="transformers",
        overrides={"lm_head": {"bits": 8}, "*.q_proj": {"bits": 3}, "*.o_proj": "skip"},
        progress=False,
    )
    bits = {e.name.split(".")[-1]: e.config["bits"] for e in report.layers}
    assert (bits["lm_head"], bits["q_proj"], bits["k_proj"]) == (8, 3, 4)
    assert {e.config["group_size"] for e in report.layers} == {16}
    assert report.skipped["model.layers.0.self_attn.o_proj"] == "overrides say skip"
    assert exported(model, "transformers", tokens(1)[0], tmp_path / "there")


def test_asymmetric_codes_share_their_settings(tmp_path: Path) -> None:
    """64 and 96 columns have groups of 64 and of 32: of both there must be one, or none."""
    for sizes, group in (({}, 32), ({"intermediate_size": 40}, None)):
        model = llama(tmp_path, torch.bfloat16, **sizes)
        report = quantize_(model, tokens(), export_for="vllm", symmetric=False, **FAST)
        assert {e.config["group_size"] for e in report.layers} == {group}
        assert exported(model, "vllm", tokens(1)[0], tmp_path / f"there{group}")


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("name", [*ONNX, "gguf"])
def test_convolutions_and_odd_columns(name: str, bits: int, tmp_path: Path) -> None:
    model = convolutions()
    report = quantize_(model, images(), export_for=name, bits=bits, **FAST)
    assert exported(model, name, images()[0], tmp_path / "there")
    if name == "gguf":
        assert report.skipped["0"] == "gguf: it must be a Linear, got Conv2d"
        assert report.skipped["5"] == "gguf: its columns must be whole blocks of 32, got 15"
        assert [entry.name for entry in report.layers] == ["6"]
        return
    known = {entry.name: entry.config for entry in report.layers}
    assert set(known) == {"0", "4", "5", "6"}
    assert known["5"]["bits"] == (8 if name == "openvino" else bits)
    narrow = {entry.config["narrow_range"] for entry in report.layers}
    assert narrow == {name == "tensorrt" and bits == 8}
    assert known["6"]["group_size"] == (None if bits == 8 else 64)


Make = Callable[[Path], nn.Module]


def of_half(folder: Path) -> nn.Module:
    return llama(folder, torch.bfloat16)


def net(folder: Path) -> nn.Module:
    return convolutions()


def experts(folder: Path) -> nn.Module:
    import transformers

    config = transformers.Qwen3MoeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, moe_intermediate_size=32,
        num_experts=2, num_experts_per_tok=1, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, use_cache=False,
    )  # fmt: skip
    return transformers.Qwen3MoeForCausalLM(config).eval()


def late(folder: Path) -> nn.Module:
    """It draws the weights of layers anew where tensors are missing: of packed layers, too."""
    import transformers

    config = transformers.T5Config(
        vocab_size=400, d_model=32, d_kv=8, d_ff=64, num_layers=3, num_heads=4, use_cache=False
    )
    transformers.T5ForConditionalGeneration(config).save_pretrained(folder / "t5")
    model: nn.Module = transformers.T5ForConditionalGeneration.from_pretrained(folder / "t5")
    return model.eval()


def circular(folder: Path) -> nn.Module:
    conv = nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular")
    return nn.Sequential(conv, nn.Flatten(), nn.Linear(64, 4))


@pytest.mark.parametrize(
    ("name", "make", "settings", "message"),
    [
        ("llamacpp", of_half, {}, "export_for must be one of onnxruntime, .* got 'llamacpp'"),
        ("gguf", of_half, {"symmetric": False}, "symmetric must be True for gguf, got False"),
        ("vllm", of_half, {"symmetric": False, "bits": 3},
         "symmetric must be True for vllm unless bits are one of 4, 8, got False"),
        ("tensorrt", of_half, {"symmetric": False}, "one of 2, 3, 5, 6, 7, got False"),
        ("gguf", of_half, {"scale_dtype": torch.bfloat16},
         "scale_dtype must be torch.float16 for gguf, got torch.bfloat16"),
        ("gguf", of_half, {"granularity": "per_group", "group_size": 16},
         "group_size must be a multiple of 32 for gguf, got 16"),
        ("vllm", of_half, {"scale_dtype": torch.float16},
         "export_for='vllm' cannot hold this model: model.layers.0.self_attn.q_proj.*: its scales "
         "must be exact in torch.bfloat16"),
        ("vllm", of_half, {"bias": "create"}, "bias must be refit or keep for vllm, got 'create'"),
        ("gguf", of_half, {"overrides": {"*.q_proj": {"symmetric": False}}},
         "cannot hold this model: .*q_proj: it has no asymmetric codes of 4 bits"),
        ("tensorrt", of_half, {"bits": 8, "narrow_range": False}, "8-bit weights must be at least"),
        ("openvino", of_half, {"granularity": "per_group", "group_size": 6, "overrides":
         {"*": {"granularity": "per_channel", "group_size": None}, "*.down_proj":
          {"granularity": "per_group", "group_size": 3}}}, "down_proj: it computes groups of 3 "),
        ("vllm", of_half, {"symmetric": False, "overrides": {"*.down_proj": {"bits": 8}}},
         "layers must all be symmetric, or share their settings, for vllm"),
        ("vllm", of_half, {"activations": ActivationConfig()}, "activations must be None for vllm"),
        ("tensorrt", net, {"activations": ActivationConfig()}, "must be symmetric for tensorrt"),
        ("openvino", net, {"activations": ActivationConfig(bits=12)}, "at most 8 bits .* got 12"),
        ("vllm", net, {}, "must be a PreTrainedModel of transformers for vllm, got Sequential"),
        ("transformers", experts, {}, "as fused experts, .* got Qwen3MoeForCausalLM"),
        ("transformers", late, {}, "model must be one that transformers can load quantized, T5For"),
        ("vllm", late, {"overrides": {"decoder": "skip"}}, "can load quantized, T5For"),
        ("openvino", circular, {}, "no circular padding for openvino, got that of 0"),
        ("tensorrt", net, {"granularity": "per_group", "group_size": 3, "overrides":
         {nn.Linear: "skip"}}, "cannot hold this model: 0: it has no scales for groups"),
    ],
)  # fmt: skip
@pytest.mark.usefixtures("never_solved")
def test_refused_before_anything_is_optimised(
    name: str, make: Make, settings: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model = make(tmp_path)
    before = copy.deepcopy(model.state_dict())
    batches: list[Any] = tokens() if make in (of_half, experts, late) else images()
    if make is late:
        batches = [batch | {"decoder_input_ids": batch["input_ids"]} for batch in batches]
    with pytest.raises((TypeError, ValueError), match=message):
        quantize_(model, batches, export_for=name, **(FAST | settings))
    for key, tensor in model.state_dict().items():
        assert tensor.dtype == before[key].dtype and torch.equal(tensor, before[key]), key


@pytest.mark.usefixtures("never_solved")
def test_missing_packages_are_said_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaround_ext.export.formats.importlib.util.find_spec", lambda name: None)
    for name, target in EXPORT_TARGETS.items():
        with pytest.raises(ImportError, match=rf'for {name} .*adaround_ext\[{target.extra}\]"'):
            quantize_(convolutions(), images(), export_for=name, **FAST)


@pytest.mark.parametrize("kind", ["list", "tensor", "mapping", "generator"])
def test_bfloat16_batches_go_with_their_model(kind: str, tmp_path: Path) -> None:
    model = convolutions().bfloat16()
    x = torch.cat(images()).bfloat16()
    batches: dict[str, Any] = {
        "list": [x[:8], (x[8:],)], "tensor": x, "mapping": {"input": x},
        "generator": (part for part in x.split(4)),
    }  # fmt: skip
    report = quantize_(model, batches[kind], export_for="onnxruntime", **FAST)
    assert report.samples == 16 and model[0].weight.dtype == torch.float32
    assert exported(model, "onnxruntime", images()[0], tmp_path / "there")


def test_tied_weights_and_what_shares_memory_stay_so(tmp_path: Path) -> None:
    model = llama(tmp_path, torch.bfloat16, tie_word_embeddings=True)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    head.weight.grad = torch.ones_like(head.weight)
    report = quantize_(model, tokens(), export_for="openvino", **FAST)
    assert head.weight is embedding.weight and head.weight.dtype == torch.float32
    assert head.weight.grad.dtype == torch.float32
    assert "model.embed_tokens" in report.skipped["lm_head"]
    assert exported(model, "openvino", tokens(1)[0], tmp_path / "there")
