"""Exports of models in 16 bits, and of those with layers of two dtypes, as verify sees them."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import export_model, load_quantized, quantize_, save_quantized, verify
from adaround_ext.export import packed, runner
from adaround_ext.export.half_precision import HalfPrecision
from adaround_ext.export.packed.modules import PackedLayer
from adaround_ext.export.parity import ParityReport
from tests.support.export_models import convolutional, quantized, tied

pytestmark = pytest.mark.usefixtures("one_thread")
HALF = [torch.bfloat16, torch.float16]


def deep() -> tuple[nn.Module, Tensor]:
    layers = [nn.Sequential(nn.Linear(24, 24), nn.GELU()) for _ in range(12)]
    return nn.Sequential(*layers), torch.randn(16, 24)


class Difference(nn.Module):
    """Of two layers that are nearly equal, so that little is left but what is rounded."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 32), nn.Linear(32, 32)
        self.second.load_state_dict(self.first.state_dict())
        with torch.no_grad():
            self.second.weight[0, 0] += 0.1

    def forward(self, x: Tensor) -> Tensor:
        return self.first(x) - self.second(x)


class Stubborn(nn.Module):
    """Says itself what it computes in, so that it does not run in float32."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(32, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.to(torch.bfloat16))


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "linear": lambda: (nn.Sequential(nn.Linear(64, 32)), torch.randn(32, 64)),
    "deep": deep,
    "convolutional": convolutional,
    "tied": tied,
    "difference": lambda: (Difference(), torch.randn(64, 32)),
}


def made(name: str, dtype: torch.dtype, **settings: Any) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]()
    x = x.to(dtype) if x.is_floating_point() else x
    return quantized(model.to(dtype), x, bits=4, **settings), x


def run(report: ParityReport, name: str) -> Any:
    return next(each for each in report.runs if each.runner == name)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("name", MODELS)
def test_right_exports_are_called_right(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, x = made(name, dtype)
    save_quantized(model, tmp_path / "saved")
    report = verify(model, tmp_path / "saved", x)
    assert report.ok, str(report)
    loaded, packed = report.runs
    assert (loaded.exact, loaded.relative_error, loaded.allowed) == (True, 0, report.tolerance)
    assert not packed.exact
    assert str(dtype).removeprefix("torch.") in packed.note
    assert packed.relative_error <= packed.allowed
    assert "equal up to" in str(report)
    assert report.to_dict()["runs"][1]["allowed"] == packed.allowed


def test_float64(tmp_path: Path) -> None:
    model, x = made("tied", torch.float64)
    save_quantized(model, tmp_path / "saved")
    report = verify(model, tmp_path / "saved", x, tolerance=1e-12)
    assert report.ok
    assert all(each.exact for each in report.runs)


@pytest.mark.parametrize("dtype", HALF)
def test_wrong_ones_are_called_wrong(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A code that is off by one in a thousand is below all that outputs show in 16 bits."""
    model, x = made("linear", dtype)
    save_quantized(model, tmp_path / "saved")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other[0].bias[0] *= 1.25
    report = verify(other, tmp_path / "saved", x)
    assert not report.ok
    assert not run(report, "load_quantized").ok
    assert run(report, "QuantLinear, QuantConv").changed == ("0.bias",)
    assert "other weights than the model's: 0.bias" in str(report)

    def damaged(folder: Path, model: nn.Module) -> list[runner.Runner]:
        packed = load_quantized(folder, copy.deepcopy(model), packed=True)
        layer = packed[0]
        assert isinstance(layer, PackedLayer)
        layer.packed[0, 0] ^= 1
        return [runner.module_runner("damaged", packed)]

    monkeypatch.setattr(packed, "runners", damaged)
    report = verify(model, tmp_path / "saved", x)
    assert not report.ok
    assert report.runs[0].changed == ("0.weight",)

    def far(folder: Path, model: nn.Module) -> list[runner.Runner]:
        right = runner.module_runner("far", load_quantized(folder, copy.deepcopy(model)))
        return [dataclasses.replace(right, run=lambda *args: [1.1 * y for y in right.run(*args)])]

    monkeypatch.setattr(packed, "runners", far)
    assert not verify(model, tmp_path / "saved", x).ok


def test_what_16_bits_allow_is_the_models_matter() -> None:
    def allowed(model: nn.Module, x: Tensor) -> float:
        found = runner.module_runner("", model.eval()).run((x,), {})
        errors = []

        def compare(got: Any, want: Any) -> float:
            a, b = torch.cat(got[0]).double(), torch.cat(want[0]).double()
            errors.append(float((a - b).norm() / b.norm()))
            return errors[-1]

        return HalfPrecision(model, [((x,), {})], [found], compare).allowed

    torch.manual_seed(0)
    x = torch.randn(64, 32).bfloat16()
    eps = torch.finfo(torch.bfloat16).eps
    plain = allowed(nn.Linear(32, 32).bfloat16(), x)
    assert eps <= plain < 2 * eps
    assert allowed(Difference().bfloat16(), x) > 4 * plain
    assert allowed(Stubborn().bfloat16(), x) == eps  # of its one layer


class Mixture(nn.Module):
    """Layers of two dtypes, with casts between them."""

    def __init__(self, first: torch.dtype, second: torch.dtype) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 64).to(first), nn.Linear(64, 32).to(second)
        self.last = nn.Linear(32, 8).to(first)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x.to(self.first.weight.dtype)))
        x = self.second(x.to(self.second.weight.dtype))
        return self.last(x.to(self.last.weight.dtype))


def formats_of(first: torch.dtype, second: torch.dtype) -> dict[str, str | None]:
    """What each format says of them: None where it takes both."""
    refusals: dict[str, str | None] = {"safetensors": None, "gguf": None}
    known = {torch.float32, torch.float16, torch.bfloat16}
    refusals["torchao"] = None if {first, second} <= known else "convert the model before"
    plain = {first, second} <= {torch.float32, torch.float16}
    refusals["onnx"] = None if plain else "convert the model before it is quantized"
    refusals["aimet"] = "convert the model before it is quantized"
    return refusals


@pytest.mark.parametrize(
    "dtypes",
    [
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float64),
        (torch.float16, torch.bfloat16),
    ],
    ids=str,
)
def test_layers_of_two_dtypes(dtypes: tuple[torch.dtype, torch.dtype], tmp_path: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(64, 32)
    settings: dict[str, Any] = {"granularity": "per_group", "group_size": 32}
    model = quantized(Mixture(*dtypes), x, bits=4, scale_dtype=torch.float16, **settings)
    for kind, refusal in formats_of(*dtypes).items():
        for package in ("onnx", "onnxruntime") if kind in ("onnx", "aimet") else (kind,):
            pytest.importorskip(package)
        folder = tmp_path / kind
        if refusal is None:
            export_model(model, folder, kind, batch=x)
            report = verify(model, folder, x)
            assert report.ok, str(report)
            if kind == "onnx":  # runtimes round float16 elsewhere: nothing is promised
                assert "onnxruntime, default: differs" in str(report)
            assert max(each.relative_error for each in report.runs) < 0.03
        else:
            with pytest.raises(ValueError, match=refusal):
                export_model(model, folder, kind, batch=x)
            assert not folder.exists()
    packed = load_quantized(tmp_path / "safetensors", Mixture(*dtypes), packed=True)
    assert [packed.first.dtype, packed.second.dtype] == list(dtypes)


def t5(kind: str, dtype: torch.dtype) -> tuple[Any, dict[str, Tensor]]:
    """In ``dtype`` but for the layers ``wo``, as transformers loads it in float16."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    torch.manual_seed(0)
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2}
    config = transformers.T5Config(**sizes, num_layers=1, use_cache=False)
    model = getattr(transformers, kind)(config).to(dtype).eval()
    for name, module in model.named_modules():
        if name.endswith(".wo"):
            module.float()
    ids = torch.randint(2, 64, (4, 8))
    more = {} if kind == "T5EncoderModel" else {"decoder_input_ids": ids.flip(1)}
    return model, {"input_ids": ids, **more}


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("T5EncoderModel", torch.bfloat16), ("T5ForConditionalGeneration", torch.float16)],
)
def test_t5(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model, batch = t5(kind, dtype)
    settings: dict[str, Any] = {"granularity": "per_group", "group_size": 32, "bits": 4}
    quantize_(model, [batch], preset="fast", progress=False, scale_dtype=dtype, **settings)
    kinds = ["safetensors", "torchao"] + ["onnx"] * (dtype == torch.float16)
    for each in kinds:
        pytest.importorskip({"onnx": "onnxscript"}.get(each, each))
        export_model(model, tmp_path / each, each, batch=batch)
    assert verify(model, [tmp_path / each for each in kinds], [batch]).ok
    pytest.importorskip("compressed_tensors")
    with pytest.raises(ValueError, match=r"\.wo.*got torch\.float32 .* convert the model before"):
        export_model(model, tmp_path / "compressed", "compressed-tensors")
    assert not (tmp_path / "compressed").exists()


def test_torchao_where_transformers_would_change_a_dtype(tmp_path: Path) -> None:
    """Unquantized layers in float32, which the class's own loading would make bfloat16."""
    pytest.importorskip("torchao")
    model, batch = t5("T5EncoderModel", torch.bfloat16)
    overrides = {"*.wo": "skip"}
    quantize_(model, [batch], preset="fast", progress=False, overrides=overrides)
    export_model(model, tmp_path / "out", "torchao")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "adaround.json",
        "weights.pt",
    ]
    assert verify(model, tmp_path / "out", [batch]).ok
