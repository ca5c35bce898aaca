"""ONNX export: quantized activations, and what each target holds and refuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig
from adaround_ext.activations.hooks import quantizers
from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.export.onnx import runners
from tests.support.export_models import quantized
from tests.support.onnx_exports import (
    Many,
    assert_same,
    assert_unchanged,
    attributes,
    exported,
    initializers,
    nodes,
    rounded,
    state,
)

pytestmark = pytest.mark.usefixtures("one_thread")


class Quantizers(nn.Module):
    """Many quantizers of one input, and a layer, without which no model is quantized."""

    def __init__(self, *configs: ActivationConfig) -> None:
        super().__init__()
        self.layer = rounded(nn.Linear(8, 8))
        self.each = nn.ModuleList(ActivationQuantizer(config) for config in configs)
        for quantizer in self.each:
            quantizer.set_range(-1.3, 2.7)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        layer = self.layer(inputs[0])
        return [q(x) for q, x in zip(self.each, inputs, strict=True)] + [layer]


def hard_values(quantizer: ActivationQuantizer) -> Tensor:
    """All codes and more, the middles between them and what is just beside, and large values."""
    scale = quantizer.scale
    count = 1 << min(quantizer.bits, 12)
    steps = torch.arange(-count - 5.0, count + 6)
    if quantizer.bits == 16:
        steps = torch.cat([steps, steps + 2**15, steps + 2**16])
    middles = (steps + 0.5) * scale
    beside = [torch.nextafter(middles, middles + sign) for sign in (-1, 1)]
    large = torch.tensor([0.0, -0.0, 1e30, -1e30, 3e38])
    values = torch.cat([steps * scale, middles, *beside, torch.randn(500) * 2, large])
    return values[: len(values) // 8 * 8].view(-1, 8)


CONFIGS = [
    ActivationConfig(bits=bits, symmetric=symmetric)
    for bits in (2, 4, 5, 8, 9, 12, 16)
    for symmetric in (True, False)
]


@pytest.mark.parametrize("target", ["ort", "qnn"])
def test_quantizers_bit_by_bit(tmp_path: Path, target: str) -> None:
    model = Quantizers(*CONFIGS).eval()
    batch = [hard_values(quantizer) for quantizer in model.each]
    file = exported(model, batch, tmp_path / "out", target=target, dynamic_shapes=None)
    wanted = model(*batch)
    for runner in runners(tmp_path / "out", model):
        if runner.name.startswith("onnxruntime"):
            got = runner.run(tuple(batch), {})
            for config, a, b in zip(CONFIGS, got, wanted[:-1], strict=False):
                assert torch.equal(a, b), (runner.name, config)
    found = initializers(file)
    for index, config in enumerate(CONFIGS):
        signed = config.symmetric and target == "ort"
        storage = f"{'' if signed else 'u'}int{8 if config.bits <= 8 else 16}"
        assert found[f"each.{index}_zero_point"].dtype == storage
        assert (f"each.{index}_low" in found) == (config.bits not in (8, 16))


def exact_network() -> tuple[nn.Module, Tensor]:
    """Scales are powers of two, so that every float32 sum is exact in any order."""
    torch.manual_seed(5)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    x = torch.randn(16, 3, 6, 6)
    quantized(
        model,
        x,
        bits=4,
        granularity="per_tensor",
        scale=torch.tensor([[2.0**-5]]),
        bias="keep",
        activations=ActivationConfig(bits=8),
    )
    for quantizer in quantizers(model).values():
        quantizer.set_range(-2, -2 + 255 / 64)
    with torch.no_grad():
        for index in (0, 2, 6):
            model[index].bias.mul_(256).round_().div_(256)
    return model, x


def test_a_network_with_quantized_activations(tmp_path: Path) -> None:
    """Equal bit by bit, also where ONNX Runtime computes in integers."""
    model, x = exact_network()
    before = state(model)
    exported(model, x[:2], tmp_path / "out")
    assert_unchanged(model, before)
    names = []
    for runner in runners(tmp_path / "out", model):
        assert not runner.exact
        assert runner.note
        if runner.name in ("onnxruntime, optimisations off", "onnxruntime, accuracy level 0"):
            assert torch.equal(runner.run((x,), {})[0], model(x))
            names.append(runner.name)
    assert len(names) == 2


def test_quantizers_that_are_off(tmp_path: Path) -> None:
    model, x = exact_network()
    for quantizer in quantizers(model).values():
        quantizer.enabled = False
    file = exported(model, x, tmp_path / "out")
    assert not nodes(file, "QuantizeLinear")
    assert_same(model, tmp_path / "out", [x])


def test_quantizers_without_a_range(tmp_path: Path) -> None:
    model = Quantizers(ActivationConfig())
    model.each.append(ActivationQuantizer())
    with pytest.raises(ValueError, match=r"cannot hold this model: each\.1: it has no range yet"):
        exported(model, [torch.randn(2, 8)] * 2, tmp_path / "out")


def test_float16_activations(tmp_path: Path) -> None:
    model = nn.Sequential(ActivationQuantizer(), nn.Linear(8, 4).half())
    rounded(model[1], scale_dtype=torch.float16)
    model[0].set_range(-3, 3)
    x = torch.randn(5, 8).half()
    exported(model, x, tmp_path / "out")
    run = runners(tmp_path / "out", model)[0].run
    assert torch.allclose(run((x,), {})[0], model(x), rtol=1e-2, atol=1e-3)
    model[0].set_range(-3, 7e4)
    with pytest.raises(ValueError, match="0: its largest values are beyond those of float16"):
        exported(model, x, tmp_path / "large")


# What TensorRT and QNN have no zero points for, stored without.
CENTRED = {2: "int4", 3: "int4", 5: "int8", 6: "int8", 7: "int8"}


@pytest.mark.parametrize("target", ["tensorrt", "qnn"])
def test_asymmetric_weights_without_zero_points(tmp_path: Path, target: str) -> None:
    layers = [rounded(nn.Linear(24, 5), bits=bits, symmetric=False) for bits in CENTRED]
    model, batch = Many(*layers), [torch.randn(6, 24) for _ in CENTRED]
    file = exported(model, batch, tmp_path / "out", target=target)
    assert_same(model, tmp_path / "out", [batch])
    found = initializers(file)
    assert not [name for name in found if name.endswith("zero_point")]
    for index, (bits, storage) in enumerate(CENTRED.items()):
        codes = found[f"layers.{index}.weight"]
        assert str(codes.dtype) == storage
        assert np.abs(codes.astype(np.int32)).max() < 1 << bits


def test_tensorrt(tmp_path: Path) -> None:
    """A network that it takes, with groups in Linears only, which OpenVINO would get wrong."""
    model = nn.Sequential(nn.Conv2d(4, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(96, 10))
    rounded(model[0], bits=8, narrow_range=True)
    rounded(model[3], granularity="per_group", group_size=48)
    file = exported(model, torch.randn(2, 4, 6, 6), tmp_path / "out", target="tensorrt")
    assert_same(model, tmp_path / "out", [torch.randn(3, 4, 6, 6)])
    assert {r.name.split(",")[0] for r in runners(tmp_path / "out", model)} == {"onnxruntime"}
    places = [attributes(node) for node in nodes(file, "DequantizeLinear")]
    assert places == [{"axis": 0}, {"axis": 0, "block_size": 48}]
    assert initializers(file)["0.weight"].min() >= -127


def test_qnn(tmp_path: Path) -> None:
    """Scales per channel or tensor, activations unsigned, nothing between weight and product."""
    x = torch.randn(16, 3, 6, 6)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(128, 10))
    quantized(model, x, bits=8, activations=ActivationConfig(bits=16, symmetric=True))
    file = exported(model, x, tmp_path / "out", target="qnn")
    readers = {name: node.op_type for node in file.graph.node for name in node.input}
    weights = [n for n in nodes(file, "DequantizeLinear") if n.input[0].endswith(".weight")]
    assert [readers[node.output[0]] for node in weights] == ["Conv", "MatMul"]
    assert [attributes(node) for node in weights] == [{"axis": 0}, {"axis": 1}]
    kinds = {initializers(file)[n.input[2]].dtype for n in nodes(file, "QuantizeLinear")}
    assert kinds == {np.dtype("uint16")}
    run = runners(tmp_path / "out", model)[0].run
    assert torch.allclose(run((x,), {})[0], model(x), rtol=1e-3, atol=1e-4)


def test_openvino(tmp_path: Path) -> None:
    """Groups are cut to powers of two; for one token, few and many, as it has kernels for each."""
    pytest.importorskip("openvino", reason="needs openvino")
    settings = {"granularity": "per_group", "symmetric": False}
    layers = [
        (rounded(nn.Linear(96, 8), group_size=48, **settings), (96,)),
        (rounded(nn.Linear(960, 8), group_size=320, **settings), (960,)),
        (rounded(nn.Linear(96, 8), bits=3, group_size=6, **settings), (96,)),
        (rounded(nn.Linear(96, 8), bits=8, group_size=6, **settings), (96,)),
        (rounded(nn.Linear(33, 8), bits=5, symmetric=False), (33,)),
        (rounded(nn.Linear(96, 8), bits=8, granularity="per_tensor"), (96,)),
        (rounded(nn.Conv2d(8, 6, 3), group_size=18, **settings), (8, 5, 5)),
        (rounded(nn.ConvTranspose2d(8, 6, 4), group_size=8, **settings), (8, 5, 5)),
        (rounded(nn.ConvTranspose2d(8, 6, 3, groups=2), symmetric=False), (8, 5, 5)),
    ]
    model = Many(*(layer for layer, _ in layers))
    batches = [[torch.randn(count, *size) for _, size in layers] for count in (1, 4, 9)]
    file = exported(model, batches[1], tmp_path / "out", target="openvino")
    places = [attributes(node) for node in nodes(file, "DequantizeLinear")]
    assert [place.get("block_size") for place in places[:4]] == [16, 64, 2, 2]
    exact = [runner.name for runner in runners(tmp_path / "out", model) if runner.exact]
    assert "openvino, float32" in exact
    assert_same(model, tmp_path / "out", batches)


REFUSED: list[tuple[str, nn.Module, dict[str, Any], str]] = [
    ("tensorrt", nn.Linear(8, 4), {"symmetric": False}, "asymmetric codes of 4 bits need zero"),
    ("qnn", nn.Linear(8, 4), {"bits": 8, "symmetric": False}, "asymmetric codes of 8 bits need"),
    (
        "tensorrt",
        nn.Conv2d(8, 4, 3),
        {"granularity": "per_group", "group_size": 9},
        "it has no scales for groups of columns of a convolution",
    ),
    (
        "qnn",
        nn.Linear(8, 4),
        {"granularity": "per_group", "group_size": 4},
        "it has no scales for groups of columns; quantize with granularity='per_channel'",
    ),
    (
        "openvino",
        nn.Linear(9, 4),
        {"granularity": "per_group", "group_size": 3, "bits": 8},
        "it computes groups of 3 inputs wrongly; quantize with an even group_size",
    ),
    ("openvino", nn.Linear(9, 4), {}, "it computes 4-bit products with an odd number of inputs"),
    (
        "ort",
        nn.ConvTranspose2d(8, 6, 3),
        {"granularity": "per_group", "group_size": 2},
        r"DequantizeLinear has no form for groups of 2 in a weight of shape \[8, 6, 3, 3\]",
    ),
]


@pytest.mark.parametrize(("target", "layer", "settings", "reason"), REFUSED)
def test_refused_layers(
    tmp_path: Path, target: str, layer: nn.Module, settings: dict[str, Any], reason: str
) -> None:
    model = nn.Sequential(rounded(layer, **settings))
    what = f"an ONNX file for {target} cannot hold this model: 0: {reason}"
    with pytest.raises(ValueError, match=f"^{what}"):
        exported(model, torch.randn(2, 8), tmp_path / "out", target=target)
    assert not list(tmp_path.iterdir())


def test_the_lowest_code_of_8_bits(tmp_path: Path) -> None:
    scale = torch.tensor([[2e-3]])
    model = rounded(nn.Sequential(nn.Linear(8, 4)), bits=8, scale=scale)
    assert int(model[0].quantized_weight.codes.min()) == -128
    with pytest.raises(ValueError, match=r"must be at least -127, .*narrow_range=True"):
        exported(model, torch.randn(2, 8), tmp_path / "out", target="tensorrt")
    exported(model, torch.randn(2, 8), tmp_path / "out")
    assert_same(model, tmp_path / "out", [torch.randn(2, 8)])


@pytest.mark.parametrize(
    ("target", "config", "reason"),
    [
        ("tensorrt", ActivationConfig(), "activations have no zero points"),
        ("tensorrt", ActivationConfig(bits=9, symmetric=True), "have at most 8 bits, got 9"),
        ("openvino", ActivationConfig(bits=16), "activations have at most 8 bits, got 16"),
    ],
)
def test_refused_activations(
    tmp_path: Path, target: str, config: ActivationConfig, reason: str
) -> None:
    model = Quantizers(config)
    with pytest.raises(
        ValueError, match=rf"for {target} cannot hold this model: each\.0: .*{reason}"
    ):
        exported(model, [torch.randn(2, 8)], tmp_path / "out", target=target)
