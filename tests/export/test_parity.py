"""The parity report: what it counts as equal, and that it would see what is not."""

from __future__ import annotations

import copy
import json
from math import inf, nan
from pathlib import Path

import pytest
import torch
from torch import nn

from adaround_ext import save_quantized, verify
from adaround_ext.export.formats import FORMATS, format_module
from adaround_ext.export.manifest import read_manifest, write_manifest
from adaround_ext.export.parity import _parity
from tests.support.export_models import quantized, tied

pytestmark = pytest.mark.usefixtures("one_thread")


def test_equal_models(tmp_path: Path) -> None:
    model, x = tied()
    quantized(model, x)
    model.train()
    model.first.eval()
    save_quantized(model, tmp_path / "saved")
    report = verify(model, [tmp_path / "saved"], [x, (x[:2],), {"ids": x[:1]}])
    assert (model.training, model.first.training) == (True, False)
    assert (report.ok, report.batches, report.model) == (True, 3, "Tied")
    assert [run.runner for run in report.runs] == ["load_quantized", "QuantLinear, QuantConv"]
    exact, packed = report.runs
    assert [output.shape for output in exact.outputs] == [(8, 12, 7), (8, 12, 16)]
    assert all(output.max_error == output.relative_error == 0 for output in exact.outputs)
    assert packed.relative_error < 1e-5
    assert all(output.agreement == 1 for output in exact.outputs)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True
    assert "equal where equality is promised" in str(report)


def test_differences_are_seen(tmp_path: Path) -> None:
    model, x = tied()
    quantized(model, x)
    save_quantized(model, tmp_path / "saved")
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.embedding.weight[int(x[0, 0]), 0] += 1e-2
    report = verify(other, [tmp_path / "saved"], [x])
    assert not report.ok
    assert all(run.relative_error > 1e-4 for run in report.runs)
    assert "NOT EQUAL" in str(report)
    assert "load_quantized: WRONG" in str(report)
    assert verify(other, [tmp_path / "saved"], [x], tolerance=1.0).ok


def test_numbers() -> None:
    want = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 12.0]])
    got = want.clone()
    got[0, 0] = 5
    found = _parity([got], [want])
    assert found.max_error == 2
    assert found.relative_error == pytest.approx(2 / 13)
    assert found.agreement == 0.5
    assert _parity([want, got], [want, want]).relative_error == pytest.approx(2 / (13 * 2**0.5))


def test_values_that_are_no_numbers() -> None:
    want = torch.tensor([[1.0, -inf, nan]])
    assert _parity([want.clone()], [want]).relative_error == 0
    for value in (nan, inf, -1e30):
        got = want.clone()
        got[0, 0] = value
        assert _parity([got], [want]).relative_error > 1
    got = want.clone()
    got[0, 1] = 0
    assert _parity([got], [want]).relative_error == inf
    assert _parity([torch.zeros(2)], [torch.zeros(2)]).relative_error == 0
    assert _parity([torch.ones(2)], [torch.zeros(2)]).relative_error == inf
    assert _parity([torch.zeros(2)], [torch.zeros(3)]).relative_error == inf
    assert _parity([torch.zeros(0, 3)], [torch.zeros(0, 3)]).agreement is None
    assert _parity([torch.tensor([1])], [torch.tensor([1])]).agreement is None


def test_bad_arguments(tmp_path: Path) -> None:
    model, x = tied()
    quantized(model, x)
    save_quantized(model, tmp_path / "saved")
    with pytest.raises(ValueError, match="data must hold at least one batch, got none"):
        verify(model, [tmp_path / "saved"], [])
    with pytest.raises(ValueError, match="folders must hold at least one export, got none"):
        verify(model, [], [x])
    with pytest.raises(TypeError, match="model must be a torch module, got NoneType"):
        verify(None, [tmp_path / "saved"], [x])  # type: ignore[arg-type]
    assert verify(model, tmp_path / "saved", x).ok  # one folder, one batch
    with pytest.raises(FileNotFoundError, match="must be a directory that an export wrote"):
        verify(model, [tmp_path], [x])
    write_manifest(tmp_path / "saved", "other", read_manifest(tmp_path / "saved").details)
    with pytest.raises(
        ValueError, match=r"format must be one of safetensors, onnx, .*, got 'other'"
    ):
        verify(model, [tmp_path / "saved"], [x])


def test_every_format_has_its_module() -> None:
    for kind in FORMATS:
        assert callable(format_module(kind).runners), kind


def test_outputs_must_be_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tied()
    quantized(model, x)
    save_quantized(model, tmp_path / "saved")

    class Fewer(nn.Module):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return model(ids)["logits"]

    from adaround_ext.export import packed, runner

    monkeypatch.setattr(
        packed, "runners", lambda folder, model: [runner.module_runner("fewer", Fewer())]
    )
    with pytest.raises(ValueError, match=r"fewer must give the 2 outputs .*, got 1"):
        verify(model, [tmp_path / "saved"], [x])
