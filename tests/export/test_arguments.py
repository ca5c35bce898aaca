"""What exports, verify and load_quantized refuse of their arguments, and how they say so."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import export_model, load_quantized, save_quantized, verify
from adaround_ext.export import formats
from tests.support.export_models import quantized, tied
from tests.support.public_calls import example

pytestmark = pytest.mark.usefixtures("one_thread")
TRACED = ["onnx", "aimet"]


def need(kind: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime") if kind in TRACED else (kind,):
        pytest.importorskip(package)


@pytest.fixture
def saved(tmp_path: Path) -> tuple[nn.Module, Path, Tensor]:
    model, x = example()
    save_quantized(model, tmp_path / "saved")
    return model, tmp_path / "saved", x


@pytest.mark.parametrize("folder", [None, 3, ["a"]])
def test_folder_must_be_a_path(folder: Any) -> None:
    model, _ = example()
    message = f"folder must be a path, got {type(folder).__name__}"
    with pytest.raises(TypeError, match=message):
        export_model(model, folder, "safetensors")
    with pytest.raises(TypeError, match=message):
        load_quantized(folder, model)


@pytest.mark.parametrize("format", [None, ["onnx"], "ONNX"])
def test_format_must_be_a_name(format: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"format must be one of safetensors, onnx, .*, got"):
        export_model(example()[0], tmp_path / "out", format)


@pytest.mark.parametrize("value", ["no", 1, None])
def test_switches_must_be_switches(saved: tuple[nn.Module, Path, Tensor], value: Any) -> None:
    model, folder, _ = saved
    with pytest.raises(TypeError, match=f"packed must be True or False, got {value!r}"):
        load_quantized(folder, model, packed=value)
    assert type(model[0]) is nn.Linear
    with pytest.raises(TypeError, match=f"complete must be True or False, got {value!r}"):
        save_quantized(model, folder / "other", complete=value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"folders": None}, TypeError, "folder must be a path, got NoneType"),
        ({"folders": [None]}, TypeError, "folder must be a path, got NoneType"),
        ({"folders": []}, ValueError, "folders must hold at least one export, got none"),
        ({"data": None}, TypeError, "data must be an iterable of batches, got NoneType"),
        ({"data": "text"}, TypeError, "data must be an iterable of batches, got str"),
        ({"data": []}, ValueError, "data must hold at least one batch, got none"),
        ({"data": [torch.ones(2, 32), torch.ones(0, 32)]}, ValueError, "samples.* in batch 1"),
        ({"data": [torch.full((2, 32), torch.nan)]}, ValueError, "not be NaN, got 64 .* batch 0"),
        ({"data": torch.full((2, 32), torch.inf)}, ValueError, "finite.*, got none in output 0"),
        ({"tolerance": float("nan")}, ValueError, "tolerance must be finite and .*, got nan"),
        ({"tolerance": float("inf")}, ValueError, "tolerance must be finite and .*, got inf"),
        ({"tolerance": -1e-3}, ValueError, r"tolerance must be .* at least 0, got -0\.001"),
        ({"tolerance": "1e-5"}, TypeError, "tolerance must be a number, got '1e-5'"),
        ({"tolerance": True}, TypeError, "tolerance must be a number, got True"),
    ],
)
def test_verify_refuses_what_shows_nothing(
    saved: tuple[nn.Module, Path, Tensor],
    change: dict[str, Any],
    error: type[Exception],
    message: str,
) -> None:
    model, folder, x = saved
    given = {"folders": folder, "data": [x], "tolerance": 1e-5} | change
    with pytest.raises(error, match=message):
        verify(model, given["folders"], given["data"], tolerance=given["tolerance"])


def test_verify_takes_one_batch_and_infinities(tmp_path: Path) -> None:
    model, ids = tied()
    save_quantized(quantized(model, ids), tmp_path / "tied")
    assert verify(model, str(tmp_path / "tied"), {"ids": ids}).batches == 1
    linear, x = example()
    save_quantized(linear, tmp_path / "linear")
    x[0] = torch.inf  # of which NaN come, in both models
    assert verify(linear, tmp_path / "linear", [x], tolerance=0.1).ok


class Named(nn.Module):
    """A layer of any name."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name
        self.add_module(name, nn.Linear(32, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.get_submodule(self.name)(x)


@pytest.mark.parametrize("name", ['a"b', "a\nb", "a\\b", "ä' \t1"])
def test_names_of_modules_in_torchao_programs(name: str, tmp_path: Path) -> None:
    """torch.export writes them into code: what cannot be loaded is not even written."""
    need("torchao")
    x = torch.randn(16, 32)
    model = quantized(Named(name), x)
    folder = tmp_path / "out"
    if name == "ä' \t1":
        export_model(model, folder, "torchao", batch=x)
        assert verify(model, folder, x).ok
        return
    with pytest.raises(ValueError, match=r"model must be one that .* load and run .* renamed"):
        export_model(model, folder, "torchao", batch=x)
    assert list(tmp_path.iterdir()) == []
    export_model(model, folder, "torchao")  # tensors alone have no such trouble
    assert verify(model, folder, x).ok


def test_names_of_modules_that_cannot_be_traced(tmp_path: Path) -> None:
    need("onnx")
    x = torch.randn(16, 32)
    model = quantized(Named('a"b'), x)
    with pytest.raises(ValueError, match=r"SyntaxError.* quotes, .* must be renamed"):
        export_model(model, tmp_path / "out", "onnx", batch=x)
    assert list(tmp_path.iterdir()) == []


def test_inference_mode(tmp_path: Path) -> None:
    """Examples made in it are fine, models are refused in words by what traces."""
    need("onnx")
    model, _ = example()
    with torch.inference_mode():
        made, x = copy.deepcopy(model), torch.randn(4, 32)
        export_model(model, tmp_path / "out", "onnx", batch=x)
    assert verify(model, tmp_path / "out", x).ok
    for kind in TRACED:
        with pytest.raises(ValueError, match=r"model must not be made in inference_mode, as 0\.we"):
            export_model(made, tmp_path / "other", kind, batch=x)


def test_tracing_is_silent(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    need("onnx")
    model, x = example()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        export_model(model, tmp_path / "first", "onnx", batch=x)
        capfd.readouterr()
        found.clear()  # of imports, which come once
        export_model(model, tmp_path / "second", "onnx", batch=x)
    assert [str(warning.message) for warning in found] == []
    assert capfd.readouterr() == ("", "")


def test_packages_that_are_missing() -> None:
    formats.need("this", "onnx", "torch")
    message = r'this needs the package torch_x: pip install "adaround_ext\[onnx\]"'
    with pytest.raises(ImportError, match=message):
        formats.need("this", "onnx", "torch", "torch_x")
