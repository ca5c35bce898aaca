"""The example that takes models through every format, at a size that takes no time."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaround_ext import ActivationConfig
from examples import deploy

pytestmark = pytest.mark.usefixtures("one_thread")


def small(name: str, quick: bool) -> tuple[nn.Module, list[Any], list[Any]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3))
    return model.eval(), [torch.randn(32, 1, 8, 8)], [torch.randn(5, 1, 8, 8)]


def test_rows_runs_and_refusals(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for package in deploy.PACKAGES:
        pytest.importorskip(package.replace("-", "_"))
    settings = {"4 bits": {"bits": 4}, "more": {"bits": 8, "activations": ActivationConfig()}}
    monkeypatch.setattr(deploy, "load", small)
    monkeypatch.setattr(deploy, "SETTINGS", {"residual": settings})
    output = tmp_path / "result.json"
    deploy.main(["--models", "residual", "--quick", "--output", str(output)])
    document = json.loads(output.read_text())
    rows = {row["format"]: row for row in document["results"] if row["settings"] == "4 bits"}
    others = {row["format"]: row for row in document["results"] if row["settings"] == "more"}
    assert list(rows) == list(deploy.FORMATS)
    assert list(others) == [None, *deploy.FORMATS]
    assert 0 <= others[None]["drift"] < 1
    assert not any(run["exact"] for run in others["onnx"]["runs"])
    assert set(document["packages"]) == set(deploy.PACKAGES)
    assert "must be a PreTrainedModel" in rows["compressed-tensors"]["refused"]
    assert "must be a Linear, got Conv2d" in rows["gguf"]["refused"]
    for kind in ("safetensors", "onnx", "torchao", "aimet"):
        assert all(run["relative_error"] <= 1e-5 for run in rows[kind]["runs"] if run["exact"])
        assert rows[kind]["bytes"] > 0
    assert rows["onnx"]["matmul_nbits"] == {"products": 1, "matmul_nbits": 1}
    assert [target["holds"] for target in document["targets"]] == [True, True]
    assert "gguf refused: GGUF cannot hold this model" in capsys.readouterr().out
