"""Exports to GGUF: what gguf-py, transformers and our own reading of the blocks make of them."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, quantize_
from adaround_ext.export.gguf import export_gguf, runners
from adaround_ext.export.manifest import read_manifest
from adaround_ext.export.runner import output_tensors
from tests.support import models

gguf = pytest.importorskip("gguf", reason="needs gguf")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 32,
}  # fmt: skip
HALF: dict[str, Any] = {"scale_dtype": torch.float16}
GROUPS: dict[str, Any] = {"granularity": "per_group", "group_size": 32, **HALF}


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 10)).eval()


def quantized(model: nn.Module, batch: Any = None, **settings: Any) -> nn.Module:
    """HALF unless the settings name a dtype of their own."""
    batch = torch.randn(32, 64) if batch is None else batch
    quantize_(model, [batch], preset="fast", progress=False, **{**HALF, **settings})
    return model


def tokens() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(1, 50, (4, 8))}


def language_model(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = getattr(transformers, f"{kind}Config")(**SMALL, num_key_value_heads=2, **more)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def encoder(pooler: bool) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(**SMALL)
    return transformers.BertModel(config, add_pooling_layer=pooler).eval()


def read(folder: Path) -> dict[str, Any]:
    return {tensor.name: tensor for tensor in gguf.GGUFReader(folder / "model.gguf").tensors}


def assert_near(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert float((a - b).norm() / b.norm()) <= 1e-5


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel", "per_group"])
@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
def test_what_gguf_dequantizes(tmp_path: Path, bits: int, granularity: str) -> None:
    settings = {"group_size": 32} if granularity == "per_group" else {}
    model = quantized(net(), bits=bits, granularity=granularity, **settings)
    before = copy.deepcopy(model.state_dict())
    export_gguf(model, tmp_path / "model")
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    tensors = read(tmp_path / "model")
    assert tensors.keys() == model.state_dict().keys()
    for key, tensor in tensors.items():
        kind = ("Q4_0" if bits <= 4 else "Q8_0") if key.endswith("weight") else "F32"
        assert tensor.tensor_type.name == kind
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert numpy.array_equal(values, model.state_dict()[key].numpy())
    (runner,) = runners(tmp_path / "model", model)
    assert (runner.name, runner.exact) == ("gguf-py", True)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert_near(runner.run((x,), {}), [model(x)])


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("largest", [3e-4, 3e-5, 2e-6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_small_weights(tmp_path: Path, bits: int, largest: float, dtype: torch.dtype) -> None:
    """Whose scales are below float16's smallest normal number, down to the smallest of all."""
    layer = nn.Linear(64, 96, bias=False)
    layer.weight.data *= largest / layer.weight.abs().max()
    layer = layer.to(dtype)
    before = layer.weight.detach().float().clone()
    x = 100 * torch.randn(512, 64).to(dtype)  # so that float16 has digits for the outputs
    model = quantized(nn.Sequential(layer), x, bits=bits, **GROUPS)
    scale = layer.quantized_weight.scale
    assert bool((scale < torch.finfo(torch.float16).smallest_normal).all())
    after = layer.weight.detach().float()
    assert float((after - before).norm() / before.norm()) < (0.15 if bits == 4 else 0.02)
    export_gguf(model, tmp_path / "model")
    (tensor,) = read(tmp_path / "model").values()
    assert tensor.tensor_type.name == ("Q4_0" if bits == 4 else "Q8_0")
    values = torch.tensor(gguf.quants.dequantize(tensor.data, tensor.tensor_type))
    assert torch.equal(values.to(dtype), layer.weight)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_bytes_of_their_quantization(tmp_path: Path, bits: int) -> None:
    """Where a block's largest weight lies as gguf's own rounding wants it, it finds our codes."""
    scale = torch.rand(16, 4).half().float() + 0.5
    codes = torch.randint(-7 if bits == 4 else -126, 8 if bits == 4 else 127, (16, 4, 32))
    codes[..., 5] = -8 if bits == 4 else 127
    layer = nn.Linear(128, 16)
    layer.weight.data = (codes * scale.unsqueeze(-1)).reshape(16, 128)
    model = quantized(
        nn.Sequential(layer), torch.randn(64, 128), bits=bits, scale=scale, granularity="per_group",
        group_size=32, bias="keep",
    )  # fmt: skip
    assert torch.equal(model[0].quantized_weight.codes.view_as(codes).int(), codes.int())
    export_gguf(model, tmp_path / "model")
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    expected = gguf.quants.quantize(layer.weight.detach().numpy(), kind)
    assert numpy.array_equal(read(tmp_path / "model")["0.weight"].data, expected)


def test_mixed_bits_and_other_tensors(tmp_path: Path) -> None:
    model = nn.Sequential(
        nn.Linear(64, 64), nn.BatchNorm1d(64), nn.Linear(64, 64), nn.Tanh(), nn.BatchNorm1d(64)
    ).eval()
    model.register_buffer("flags", torch.tensor([True, False]))
    model[4].running_mean.normal_()
    model = quantized(model, bits=4, overrides={"2": {"bits": 6}})
    export_gguf(model, tmp_path / "model", name="a name")
    kinds = {name: tensor.tensor_type.name for name, tensor in read(tmp_path / "model").items()}
    assert (kinds["0.weight"], kinds["2.weight"], kinds["flags"]) == ("Q4_0", "Q8_0", "I8")
    assert kinds["4.num_batches_tracked"] == "I64"
    fields = gguf.GGUFReader(tmp_path / "model" / "model.gguf").fields
    assert fields["general.name"].contents() == "a name"
    assert fields["general.architecture"].contents() == "torch"
    (runner,) = runners(tmp_path / "model", model)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert_near(runner.run((x,), {}), [model(x)])


def test_a_shared_weight_is_there_once(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64)).eval()
    model[2].weight = model[0].weight
    quantized(model, bits=4)
    export_gguf(model, tmp_path / "model")
    assert set(read(tmp_path / "model")) == {"0.weight", "0.bias", "2.bias"}
    (runner,) = runners(tmp_path / "model", model)
    x = torch.randn(5, 64)
    with torch.no_grad():
        assert_near(runner.run((x,), {}), [model(x)])


@pytest.mark.parametrize(
    ("kind", "dtype", "more"),
    [
        ("Llama", torch.float32, {}),
        ("Llama", torch.float32, {"tie_word_embeddings": True, "rms_norm_eps": 1e-5}),
        ("Llama", torch.float16, {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
        ("Llama", torch.bfloat16, {"head_dim": 8}),
        ("Qwen2", torch.float32, {}),
    ],
)
def test_language_models(
    tmp_path: Path, kind: str, dtype: torch.dtype, more: dict[str, Any]
) -> None:
    model = language_model(kind, dtype, **more)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    quantized(model, tokens(), bits=4, **GROUPS)
    export_gguf(model, tmp_path / "model")
    details = read_manifest(tmp_path / "model", "gguf").details
    assert (details["architecture"], details["names"]) == (kind.lower(), "gguf")
    tensors = read(tmp_path / "model")
    assert tensors["blk.1.ffn_down.weight"].tensor_type.name == "Q4_0"
    assert ("output.weight" in tensors) == (not more.get("tie_word_embeddings"))
    assert tensors["blk.0.attn_norm.weight"].tensor_type.name == "F32"
    embedding = "F16" if dtype == torch.float16 else "F32"
    assert tensors["token_embd.weight"].tensor_type.name == embedding
    batch = tokens()
    with torch.no_grad():
        expected = output_tensors(model(**batch))
    for runner in runners(tmp_path / "model", model):
        assert_near(runner.run((), batch), expected)


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
def test_transformers_loads_the_file(tmp_path: Path, kind: str) -> None:
    """It undoes the order of Llama's rows by itself, and takes the configuration from the file."""
    pytest.importorskip("accelerate", reason="transformers needs accelerate for GGUF files")
    import transformers

    model = quantized(language_model(kind), tokens(), bits=4, **GROUPS)
    export_gguf(model, tmp_path / "model")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", gguf_file="model.gguf", dtype=torch.float32
    )
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], tensor), key
    names = [runner.name for runner in runners(tmp_path / "model", model)]
    assert names == ["gguf-py", "transformers, gguf_file"]


@pytest.mark.parametrize(
    ("kind", "more"),
    [("Llama", {}), ("Llama", {"tie_word_embeddings": True}), ("Qwen2", {})],
)
def test_llama_cpp_runs_the_file(tmp_path: Path, kind: str, more: dict[str, Any]) -> None:
    """Its activations have 8 bits, so it is near only: wrong rows or names give another output."""
    llama_cpp = pytest.importorskip("llama_cpp", reason="needs llama-cpp-python")
    model = language_model(kind, **more)
    for parameter in model.parameters():  # so that attention is not the same everywhere
        if parameter.dim() == 2:
            parameter.data.mul_(4)
    quantized(model, tokens(), bits=4, **GROUPS)
    export_gguf(model, tmp_path / "model")
    ids = tokens()["input_ids"][0]
    with torch.no_grad():
        expected = model(ids.unsqueeze(0)).logits[0]
    path = str(tmp_path / "model" / "model.gguf")
    runtime = llama_cpp.Llama(path, n_ctx=32, logits_all=True, n_threads=1, verbose=False)
    runtime.eval(ids.tolist())
    got = torch.from_numpy(runtime.scores[: len(ids)].copy())
    assert float((got - expected).norm() / expected.norm()) < 0.05


def test_rows_of_heads_change_places(tmp_path: Path) -> None:
    """llama.cpp's converter: reshape(heads, 2, dim / 2, ...).swapaxes(1, 2) of q and k."""
    model = quantized(language_model("Llama"), tokens(), bits=8)
    export_gguf(model, tmp_path / "model")
    tensors = read(tmp_path / "model")
    for name, key, heads in (("attn_q", "q_proj", 4), ("attn_k", "k_proj", 2)):
        weight = model.get_submodule(f"model.layers.0.self_attn.{key}").weight.detach().numpy()
        tensor = tensors[f"blk.0.{name}.weight"]
        expected = weight.reshape(heads, 2, len(weight) // heads // 2, -1).swapaxes(1, 2)
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        assert numpy.array_equal(values, expected.reshape(weight.shape))


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (lambda: encoder(pooler=False), "gguf"),
        (lambda: encoder(pooler=True), "torch"),
        (lambda: language_model("Llama", attention_bias=True), "torch"),
        (lambda: language_model("Mistral"), "torch"),
    ],
    ids=["encoder", "encoder with pooler", "biases", "unknown"],
)
def test_whose_names(tmp_path: Path, make: Any, names: str) -> None:
    model = quantized(make(), tokens(), bits=4)
    export_gguf(model, tmp_path / "model")
    assert read_manifest(tmp_path / "model", "gguf").details["names"] == names
    assert ("token_embd.weight" in read(tmp_path / "model")) == (names == "gguf")
    batch = tokens()
    with torch.no_grad():
        expected = output_tensors(model(**batch))
    for runner in runners(tmp_path / "model", model):
        assert_near(runner.run((), batch), expected)


def test_a_layer_alone(tmp_path: Path) -> None:
    model = quantized(nn.Linear(64, 8), bits=4)
    export_gguf(model, tmp_path / "model")
    assert read(tmp_path / "model")["weight"].tensor_type.name == "Q4_0"


def test_new_biases_keep_torch_names(tmp_path: Path) -> None:
    model = quantized(language_model("Llama"), tokens(), bits=4, bias="create")
    export_gguf(model, tmp_path / "model")
    assert read_manifest(tmp_path / "model", "gguf").details["names"] == "torch"


def attended() -> nn.Module:
    return quantized(net(), bits=4, activations=ActivationConfig(bits=8))


REFUSED = {
    "not quantized": (net, "must hold layers that quantize_ has quantized"),
    "asymmetric": (
        lambda: quantized(net(), bits=4, symmetric=False),
        "0, 2: codes must be signed: quantize with symmetric=True",
    ),
    "scales": (
        lambda: quantized(net(), bits=4, scale_dtype=torch.float32),
        r"0, 2: scales must be exact in float16: quantize with scale_dtype=torch\.float16",
    ),
    "columns": (
        lambda: quantized(nn.Sequential(nn.Linear(40, 8)), torch.randn(8, 40), bits=4),
        r"whole blocks of 32, got 40; leave it out by overrides=",
    ),
    "groups": (
        lambda: quantized(net(), bits=4, granularity="per_group", group_size=16),
        "whole blocks of 32, got 16",
    ),
    "convolutions": (
        lambda: quantized(models.ResidualNet().eval(), torch.randn(4, 3, 8, 8), bits=4),
        "stem, .* more: blocks run along the columns of a matrix, .* got Conv2d",
    ),
    "activations": (attended, "go without quantized activations, got .* quantizers"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        export_gguf(make(), tmp_path / "model")
    assert os.listdir(tmp_path) == []


def test_what_is_no_model() -> None:
    with pytest.raises(TypeError, match="model must be a torch module, got dict"):
        export_gguf({}, "nowhere")  # type: ignore[arg-type]


def test_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        export_gguf(quantized(net(), bits=4), tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_a_cut_file_is_not_read(tmp_path: Path) -> None:
    model = quantized(net(), bits=4)
    export_gguf(model, tmp_path / "model")
    path = tmp_path / "model" / "model.gguf"
    path.write_bytes(path.read_bytes()[:-32])
    with pytest.raises(ValueError, match=r"model\.gguf has another size"):
        runners(tmp_path / "model", model)
