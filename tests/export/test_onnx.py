"""ONNX export: what is in the file, its size, the runtimes, and what is refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaround_ext.export.manifest import read_manifest, write_manifest
from adaround_ext.export.onnx import export_onnx, runners
from adaround_ext.export.onnx.runner import matmul_nbits
from benchmarks.workloads.minilm import load_encoder, text_batches
from tests.support import models
from tests.support.export_models import convolutional, quantized, tied
from tests.support.onnx_exports import (
    Many,
    assert_same,
    assert_unchanged,
    attributes,
    exported,
    initializers,
    nodes,
    onnx,
    rounded,
    state,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def linears() -> tuple[nn.Module, Tensor]:
    """Two Linears, and inputs."""
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(96, 8), nn.ReLU(), nn.Linear(8, 5)), torch.randn(6, 96)


def test_quantized_models(tmp_path: Path) -> None:
    """What quantize_ leaves behind: folded batch norms, new biases, its choice of codes."""
    model, x = convolutional()
    quantized(model, x, bits=4, symmetric=False)
    before = state(model)
    file = exported(model, x, tmp_path / "out")
    assert_unchanged(model, before)
    assert_same(model, tmp_path / "out", [x, x[:3]])
    codes = {name: t for name, t in initializers(file).items() if name.endswith(".weight")}
    assert set(codes) == {f"{i}.weight" for i in (0, 3, 5, 7, 10)}
    assert all(t.dtype == ml_dtypes.uint4 for t in codes.values())
    assert not nodes(file, "BatchNormalization")


STORAGE = {
    (2, True): "int4",
    (2, False): "uint4",
    (3, True): "int4",
    (4, True): "int4",
    (4, False): "uint4",
    (5, True): "int8",
    (8, True): "int8",
    (8, False): "uint8",
}


def test_codes_are_stored_as_they_are(tmp_path: Path) -> None:
    groups = {"granularity": "per_group", "group_size": 8}
    layers = [
        rounded(nn.Linear(24, 5), bits=bits, symmetric=symmetric, **groups)
        for bits, symmetric in STORAGE
    ]
    model, batch = Many(*layers), [torch.randn(6, 24) for _ in layers]
    file = exported(model, batch, tmp_path / "out")
    assert_same(model, tmp_path / "out", [batch])
    found = initializers(file)
    details = read_manifest(tmp_path / "out", "onnx").details["layers"]
    for index, ((bits, symmetric), storage) in enumerate(STORAGE.items()):
        name = f"layers.{index}"
        weight = layers[index].quantized_weight
        codes = found[f"{name}.weight"]
        assert str(codes.dtype) == storage
        assert np.array_equal(codes.astype(np.int32), weight.codes.t().int().numpy())
        assert np.array_equal(found[f"{name}.weight_scale"], weight.scale.t().numpy())
        assert (f"{name}.weight_zero_point" in found) == (not symmetric)
        if not symmetric:
            zero_point = found[f"{name}.weight_zero_point"].astype(np.int32)
            assert np.array_equal(zero_point, weight.zero_point.t().numpy())
        assert details[name]["bits"] == bits
        assert (details[name]["storage"], details[name]["block_size"]) == (storage, 8)


def test_groups_become_blocks_that_are_fused(tmp_path: Path) -> None:
    """Below 16 inputs they stay what they are, and are not fused."""
    blocks = {8: 8, 16: 16, 48: 16, 64: 64, 96: 32, 192: 64, 512: 256}
    layers = [
        rounded(nn.Linear(2 * size, 6), granularity="per_group", group_size=size, symmetric=False)
        for size in blocks
    ]
    batch = [torch.randn(3, 2 * size) for size in blocks]
    model = Many(*layers)
    file = exported(model, batch, tmp_path / "out")
    places = [attributes(node) for node in nodes(file, "DequantizeLinear")]
    assert places == [{"axis": 0, "block_size": block} for block in blocks.values()]
    assert matmul_nbits(tmp_path / "out") == {"products": 7, "matmul_nbits": 6}
    assert_same(model, tmp_path / "out", [batch])


@pytest.mark.parametrize("activation", [nn.ReLU, nn.ReLU6, nn.GELU])
def test_products_before_an_activation_function(
    tmp_path: Path, activation: type[nn.Module]
) -> None:
    """ONNX Runtime would fuse ReLU and Clip with Gemm, which would not become MatMulNBits."""
    model = rounded(nn.Sequential(nn.Linear(64, 64), activation(), nn.Linear(64, 10)))
    exported(model, torch.randn(4, 64), tmp_path / "out")
    assert matmul_nbits(tmp_path / "out") == {"products": 2, "matmul_nbits": 2}
    assert_same(model, tmp_path / "out", [torch.randn(9, 64)])


def test_channel_blocks(tmp_path: Path) -> None:
    """Scales of channels and of tensors, repeated for blocks; groups keep their own."""
    settings = [
        {"granularity": "per_channel"},
        {"granularity": "per_tensor"},
        {"granularity": "per_group", "group_size": 16},
    ]
    layers = [rounded(nn.Linear(80, 6), symmetric=False, **setting) for setting in settings]
    model, batch = Many(*layers), [torch.randn(3, 80) for _ in layers]
    file = exported(model, batch, tmp_path / "out", channel_blocks=32)
    places = [attributes(node)["block_size"] for node in nodes(file, "DequantizeLinear")]
    assert places == [32, 32, 16]
    assert initializers(file)["layers.1.weight_scale"].shape == (3, 6)
    assert_same(model, tmp_path / "out", [batch])


def test_minilm(tmp_path: Path) -> None:
    """All Linears of a trained encoder, on batches of two lengths, padded."""
    pytest.importorskip("transformers", reason="needs transformers")
    try:
        model, tokenizer = load_encoder()
    except ImportError as error:
        pytest.skip(str(error))
    rounded(model.encoder, granularity="per_group", group_size=128, symmetric=False)
    batches = []
    for count, length in ((2, 16), (3, 25)):
        mask = torch.ones(count, length, dtype=torch.int64)
        mask[0, 10:] = 0
        held_out = text_batches(tokenizer, "held_out", sequences=count, length=length)
        batches += [{**batch, "attention_mask": mask} for batch in held_out]
    file = exported(model, batches[0], tmp_path / "out")
    assert [o.name for o in file.graph.output] == ["last_hidden_state", "pooler_output"]
    assert matmul_nbits(tmp_path / "out") == {"products": 36, "matmul_nbits": 36}
    assert_same(model, tmp_path / "out", batches)
    text = (tmp_path / "out" / "model.onnx").read_bytes()
    assert str(Path(torch.__file__).parent).encode() not in text  # nothing of this machine
    with torch.no_grad():
        wanted = model(**batches[0]).last_hidden_state
    for runner in runners(tmp_path / "out", model):
        if not runner.exact:  # int8 activations: near, and not equal
            got = runner.run((), batches[0])[0]
            assert 1e-4 < float((got - wanted).norm() / wanted.norm()) < 0.2, runner.name
            assert runner.note


def test_size_of_what_is_stored(tmp_path: Path) -> None:
    """Within 5 % of the bits of codes, zero points and scales; float weights are gone."""
    groups = {"granularity": "per_group", "symmetric": False}
    layers = [
        (rounded(nn.Linear(128, 64), symmetric=False), (128,)),
        (rounded(nn.Linear(128, 64), bits=3, granularity="per_tensor"), (128,)),
        (rounded(nn.Linear(128, 64), group_size=64, **groups), (128,)),
        (rounded(nn.Conv2d(32, 16, 3), bits=8), (32, 5, 5)),
        (rounded(nn.Conv2d(32, 16, 3), group_size=72, **groups), (32, 5, 5)),
        (rounded(nn.ConvTranspose2d(32, 16, 3)), (32, 5, 5)),
    ]
    model = Many(*(layer for layer, _ in layers))
    file = exported(model, [torch.randn(2, *size) for _, size in layers], tmp_path / "out")
    stored = {t.name: len(t.raw_data) for t in file.graph.initializer}
    for index, (layer, _) in enumerate(layers):
        weight = layer.quantized_weight
        width = 4 if weight.bits <= 4 else 8
        zero_points = weight.scale.numel() * (weight.codes.dtype == torch.uint8)
        wanted = width * (weight.codes.numel() + zero_points) + 32 * weight.scale.numel()
        parts = ("", "_scale", "_zero_point")
        size = sum(stored.pop(f"layers.{index}.weight{part}", 0) for part in parts)
        assert size <= 1.05 * wanted / 8
        assert stored.pop(f"layers.{index}.bias") == 4 * len(layer.bias)
    assert stored == {"layers.4.weight_shape": 32}


@pytest.mark.parametrize("chosen", [True, None])
def test_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chosen: bool | None
) -> None:
    """As the caller chooses, or from a size on, which here is a small one."""
    monkeypatch.setattr("adaround_ext.export.onnx.program._LARGE", 1500)
    model = rounded(nn.Sequential(nn.Linear(64, 3)))
    export_onnx(model, torch.randn(2, 64), tmp_path / "small", external_data=chosen)
    assert (tmp_path / "small" / "model.onnx.data").is_file() == bool(chosen)
    model = rounded(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 3)))
    x = torch.randn(2, 64)
    export_onnx(model, x, tmp_path / "out", external_data=chosen)
    file = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    outside = [tensor.name for tensor in file.graph.initializer if tensor.external_data]
    assert outside == ["0.weight"]  # what is small stays in the graph
    assert_same(model, tmp_path / "out", [x])
    assert matmul_nbits(tmp_path / "out") == {"products": 2, "matmul_nbits": 2}
    (tmp_path / "out" / "model.onnx.data").write_bytes(b"")
    with pytest.raises(ValueError, match=r"model\.onnx\.data has another size"):
        runners(tmp_path / "out", model)


def test_names(tmp_path: Path) -> None:
    """Those of the caller, also where something in the graph has them."""
    model, x = linears()
    rounded(model)
    for index, name in enumerate(("features", "0.weight")):
        folder = tmp_path / str(index)
        file = exported(model, x, folder, input_names=[name], output_names=["scores"])
        assert [i.name for i in file.graph.input] == [name]
        assert [o.name for o in file.graph.output] == ["scores"]
        assert_same(model, folder, [x])


def test_manifest(tmp_path: Path) -> None:
    model, ids = tied()
    rounded(model)
    export_onnx(model, ids, tmp_path / "out", target="openvino", opset=23)
    details = read_manifest(tmp_path / "out", "onnx").details
    assert (details["target"], details["opset"]) == ("openvino", 23)
    assert details["inputs"] == {"ids": "ids"}
    assert details["outputs"] == ["logits", "hidden"]
    assert details["layers"]["first"]["names"] == ["first", "second"]
    json.dumps(details)
    assert_same(model, tmp_path / "out", [ids, ids[:3, :5]])


def test_the_same_file_twice(tmp_path: Path) -> None:
    model, x = linears()
    rounded(model)
    for name in ("a", "b"):
        export_onnx(model, x, tmp_path / name)
    files = [(tmp_path / name / "model.onnx").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_training_mode(tmp_path: Path) -> None:
    model = rounded(nn.Sequential(nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)))
    model.train()
    before = state(model)
    exported(model, torch.randn(4, 8), tmp_path / "out")
    assert_unchanged(model, before)
    assert not nodes(onnx.load(tmp_path / "out" / "model.onnx"), "Dropout")
    assert_same(model.eval(), tmp_path / "out", [torch.randn(4, 8)])


class Failing(nn.Module):
    """Fails when it is traced, not when it is run."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.conv = nn.Conv1d(1, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.layer(x).unsqueeze(1))
        return y * float(y.detach().numpy().sum())


def test_an_error_leaves_no_trace(tmp_path: Path) -> None:
    model = rounded(Failing())
    before = state(model)
    with pytest.raises(ValueError, match=r"^model must be one that torch\.onnx\.export can trace"):
        export_onnx(model, torch.randn(4, 8), tmp_path / "out")
    assert_unchanged(model, before)
    assert not list(tmp_path.iterdir())


def changed() -> nn.Module:
    model = rounded(nn.Sequential(nn.Linear(8, 4)))
    with torch.no_grad():
        model[0].weight[0, 0] += 1
    return model


X = torch.zeros(2, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": nn.Linear(8, 4)}, "model must hold layers that quantize_ has quantized"),
        ({"model": changed()}, "model must be as quantize_ left it, got another weight of 0"),
        ({"model": "net"}, "model must be a torch module, got str"),
        ({"target": "tvm"}, "target must be one of ort, openvino, tensorrt, qnn, got 'tvm'"),
        ({"opset": 20}, r"opset must be in 21\.\.\d+, got 20"),
        ({"channel_blocks": 24}, "channel_blocks must be None, or for target 'ort' one of 16, 32"),
        ({"channel_blocks": 32, "target": "qnn"}, "channel_blocks must .* got 32 for 'qnn'"),
        ({"dynamic_shapes": "all"}, "dynamic_shapes must be 'auto' or as torch.export's"),
        ({"input_names": ["a", "b"]}, r"input_names must be 1 distinct names, for input, got"),
        ({"input_names": ["a"], "output_names": ["a"]}, "output_names must be 1 distinct names"),
        ({"args": torch.zeros(2, 7)}, "args must be what the model takes, got RuntimeError"),
        ({"args": ()}, "args must fit the model's forward: missing a required argument"),
        ({"args": {"y": X}}, r"args must fit the model's forward: forward takes \(input\), got"),
        ({"args": 3}, r"args must hold a tensor, got \['input'\]"),
        ({"kwargs": {"extra": X}}, "args must fit the model's forward: got an unexpected keyword"),
        ({"dynamic_shapes": {"z": None}}, r"model must be one that torch\.onnx\.export can trace"),
    ],
)
def test_bad_input(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    options = {"model": rounded(nn.Sequential(nn.Linear(8, 4))), "args": X} | options
    model, args = options.pop("model"), options.pop("args")
    with pytest.raises((TypeError, ValueError), match=f"^{message}"):
        export_onnx(model, args, tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_empty(tmp_path: Path) -> None:
    model = rounded(nn.Sequential(nn.Linear(8, 4)))
    (tmp_path / "other").write_text("mine")
    with pytest.raises(ValueError, match="folder must be new or empty"):
        export_onnx(model, X, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["other"]


def test_layers_that_the_arguments_do_not_reach(tmp_path: Path) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(8, 4), nn.Linear(8, 4)

        def forward(self, x: Tensor, second: bool = True) -> Tensor:
            return self.a(x) + self.b(x) if second else self.a(x)

    model = rounded(Two())
    with pytest.raises(
        ValueError, match=r"args must lead through every quantized layer, .* for b$"
    ):
        export_onnx(model, X, tmp_path / "out", kwargs={"second": False})


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_missing_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == package else find(name, *a)
    )
    with pytest.raises(
        ImportError, match=rf'package {package}: pip install "adaround_ext\[onnx\]"'
    ):
        export_onnx(rounded(nn.Linear(8, 4)), X, tmp_path / "out")


def test_missing_runtimes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = rounded(nn.Linear(8, 4))
    export_onnx(model, X, tmp_path / "out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    with pytest.raises(ImportError, match="needs the package onnxruntime or openvino"):
        runners(tmp_path / "out", model)


def test_runners_refuse_other_arguments(tmp_path: Path) -> None:
    model = rounded(models.Transformer())
    ids = models.tokens(3, 5)
    export_onnx(model, ids, tmp_path / "out")
    runner = runners(tmp_path / "out", model)[0]
    with pytest.raises(ValueError, match="takes the tensors ids, got attention_mask, ids"):
        runner.run((ids, ids), {})
    with pytest.raises(FileNotFoundError):
        runners(tmp_path, model)
    details = read_manifest(tmp_path / "out").details
    del details["constants"]
    write_manifest(tmp_path / "out", "onnx", details)
    with pytest.raises(ValueError, match=r"details must have the keys .*, got missing 'constants'"):
        runners(tmp_path / "out", model)
