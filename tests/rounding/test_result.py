"""LayerResult and LayerReport: files, and writing into a layer."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from adaround_ext import LayerReport, LayerResult, optimize_layer

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
TENSORS = ("weight_q", "codes", "scale", "zero_point")


def make(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    bits: int = 4,
    **settings: Any,
) -> LayerResult:
    layer = nn.Conv2d(4, 6, 3, device=device, dtype=dtype)
    x = torch.randn(8, 4, 6, 6, dtype=dtype).to(device)
    settings = {"preset": "fast", "bits": bits, "symmetric": bits != 3} | settings
    return optimize_layer(layer, x, **settings)


def assert_equal(one: LayerResult, other: LayerResult) -> None:
    for name in (*TENSORS, "bias"):
        a, b = getattr(one, name), getattr(other, name)
        if a is None or b is None:
            assert a is b
        else:
            assert (a.dtype, a.shape) == (b.dtype, b.shape)
            assert torch.equal(a.cpu(), b.cpu())
    assert one.report == other.report


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bits", [3, 4])
def test_round_trip(tmp_path: Path, device: torch.device, dtype: torch.dtype, bits: int) -> None:
    result = make(device, dtype, bits)
    assert result.weight_q.dtype == dtype
    assert result.codes.dtype == (torch.uint8 if bits == 3 else torch.int8)
    assert result.bias is not None
    assert result.bias.dtype == dtype
    result.save(tmp_path / "layer")
    back = LayerResult.load(tmp_path / "layer", device)
    assert back.weight_q.device == device
    assert_equal(back, result)
    assert_equal(LayerResult.load(str(tmp_path / "layer")), result)
    assert os.listdir(tmp_path) == ["layer"]


def test_round_trip_of_views_and_a_bias(tmp_path: Path) -> None:
    result = make()
    wide = torch.randn(6, 2)
    result = dataclasses.replace(
        result, bias=wide[:, 0], scale=result.scale.expand(-1, 4)[:, ::2], codes=result.codes.t()
    )
    result.save(str(tmp_path / "layer"))
    back = LayerResult.load(tmp_path / "layer")
    assert_equal(back, result)
    assert back.bias is not None


def test_round_trip_without_a_bias(tmp_path: Path) -> None:
    result = make(bias="keep")
    assert result.bias is None
    result.save(tmp_path / "layer")
    assert_equal(LayerResult.load(tmp_path / "layer"), result)


def test_round_trip_of_notes(tmp_path: Path) -> None:
    layer = nn.Linear(8, 3)
    result = optimize_layer(layer, torch.randn(2, 8), preset="fast")
    assert result.report.notes
    result.save(tmp_path / "layer")
    assert LayerResult.load(tmp_path / "layer").report == result.report


def test_save_replaces_a_file(tmp_path: Path) -> None:
    path = tmp_path / "layer"
    path.write_text("something else")
    first, second = make(), make(bits=3)
    for result in (first, second):
        result.save(path)
    assert_equal(LayerResult.load(path), second)


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_failed_save_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    path = tmp_path / "layer"
    old = make()
    old.save(path)

    def fail(tensors: dict[str, Tensor], name: str, metadata: dict[str, str]) -> None:
        Path(name).write_bytes(b"half of i")
        raise error

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(error):
        make(bits=3).save(path)
    assert os.listdir(tmp_path) == ["layer"]
    assert_equal(LayerResult.load(path), old)


def test_save_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        make().save(tmp_path / "no" / "layer")


def test_load_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        LayerResult.load(tmp_path / "layer")


def rewrite(path: Path, tensors: dict[str, Tensor] | None = None, **changes: str | None) -> None:
    """A safetensors file like a result's, with other tensors or metadata."""
    with safetensors.safe_open(path, framework="pt") as file:
        metadata = dict(file.metadata()) | changes
    kept = {name: value for name, value in metadata.items() if value is not None}
    safetensors.torch.save_file(tensors or safetensors.torch.load_file(path), path, kept)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


# What happens to a file that save() wrote.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "empty": lambda path: path.write_bytes(b""),
    "half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "one-byte-short": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "header": lambda path: path.write_bytes(path.read_bytes().replace(b"{", b"\xff", 1)),
    "text": lambda path: path.write_text("not a result\n" * 20),
    "pickle": lambda path: torch.save({"weight_q": torch.ones(2)}, path),
    "folder": replace_by_folder,
    "other-tensors": lambda path: rewrite(path, {"weight": torch.ones(2)}),
    "more-tensors": lambda path: rewrite(
        path, safetensors.torch.load_file(path) | {"more": torch.ones(1)}
    ),
    "other-format": lambda path: rewrite(path, format="adaround_ext.layer.99"),
    "no-format": lambda path: rewrite(path, format=None),
    "no-report": lambda path: rewrite(path, report=None),
    "half-a-report": lambda path: rewrite(path, report='{"objective": "gram"'),
    "other-report": lambda path: rewrite(path, report='{"objective": "gram"}'),
    "no-report-at-all": lambda path: rewrite(path, report="[1, 2]"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_load_names_the_file_that_is_none_of_ours(tmp_path: Path, name: str) -> None:
    path = tmp_path / "some.file"
    make().save(path)
    DAMAGES[name](path)
    with pytest.raises(ValueError, match=r"some\.file must be a file written by LayerResult\.save"):
        LayerResult.load(path)


def test_apply(device: torch.device) -> None:
    result = dataclasses.replace(make(device), bias=torch.arange(6.0, device=device))
    layer = nn.Conv2d(4, 6, 3, device=device)
    weight, bias = layer.weight, layer.bias
    result.apply_(layer)
    assert layer.weight is weight
    assert layer.bias is bias
    assert weight.requires_grad
    assert torch.equal(weight, result.weight_q)
    assert torch.equal(bias, torch.arange(6.0, device=device))
    assert weight.data_ptr() != result.weight_q.data_ptr()


def test_apply_keeps_a_bias_that_is_not_new() -> None:
    layer = nn.Conv2d(4, 6, 3)
    before = layer.bias.detach().clone()
    make(bias="keep").apply_(layer)
    assert torch.equal(layer.bias, before)


@pytest.mark.parametrize(
    ("layer", "bias", "message"),
    [
        (nn.Conv2d(4, 6, 1), None, r"^layer must have a weight of shape \[6, 4, 3, 3\], got"),
        (nn.Linear(36, 6), None, r"^layer must have a weight of shape .*got \[6, 36\]$"),
        (
            nn.Conv2d(4, 6, 3),
            torch.ones(5),
            r"^layer must have a bias of shape \[5\] or none, got \[6\]",
        ),
        (nn.ReLU(), None, r"^layer must have a weight of shape \[6, 4, 3, 3\], got none"),
    ],
    ids=["kernel", "kind", "bias-shape", "no-weight"],
)
def test_apply_where_it_does_not_fit(layer: nn.Module, bias: Tensor | None, message: str) -> None:
    result = dataclasses.replace(make(), bias=bias)
    before = {name: t.clone() for name, t in layer.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        result.apply_(layer)
    assert all(torch.equal(t, before[name]) for name, t in layer.state_dict().items())


def test_report_as_json() -> None:
    settings = {"preset": "best", "starts": ("nearest", "gptq", "adaround")}
    report = make(**settings, steps=5, search_steps=5).report
    plain = json.loads(report.to_json())
    assert LayerReport.from_dict(plain) == report
    assert set(plain) == {field.name for field in dataclasses.fields(report)} | {"relative"}
    rules = {"nearest", "floor", "ceil", "stochastic", "soft", "hard", "final"}
    rules |= {"gptq", "adaround"}
    assert set(plain["losses"]) == set(plain["relative"]) == rules
    for name, loss in report.losses.items():
        assert report.relative[name] == pytest.approx(loss / report.energy)
    assert f"gram, best, {report.bits} bits" in str(report)


def test_report_of_a_layer_that_gives_nothing() -> None:
    report = dataclasses.replace(make().report, energy=0.0)
    assert set(report.relative.values()) == {0.0}
    assert "relative output error 0 " in str(report)
