"""What ``export_for`` tries before anything is optimised."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from adaround_ext import quantize_
from tests.support.target_models import FAST, ONNX, llama, never_solved, tokens  # noqa: F401  a fixture

pytest.importorskip("transformers")
pytest.importorskip("onnxscript")
pytestmark = pytest.mark.usefixtures("one_thread", "never_solved")


def test_a_trial_that_shows_nothing_refuses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the packed model nor the plain one loads, or there is none with one layer."""

    def fails(*_: object, **__: object) -> None:
        raise ValueError("it does not load")

    model = llama(tmp_path, torch.bfloat16, num_hidden_layers=2)
    before = torch.get_rng_state()
    for place in ("compressed_tensors.load_alike", "trial"):
        with monkeypatch.context() as patch:
            if place == "trial":
                patch.setattr("adaround_ext.export.goal.trial._shallow", fails)
            else:
                patch.setattr(f"adaround_ext.export.{place}", fails)
                patch.setattr("adaround_ext.export.goal.trial.load_alike", fails)
            with pytest.raises(AssertionError, match="it was optimised"):
                quantize_(model, tokens(), export_for="vllm", **FAST)
    assert torch.equal(torch.get_rng_state(), before)


class Branching(nn.Module):
    """It decides by values, which no trace can."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x) if float(x.sum()) < 1e9 else x[:, :4]


def test_what_cannot_be_traced(tmp_path: Path) -> None:
    rows = [torch.randn(6, 8), torch.randn(6, 8)]
    for name in ONNX:
        with pytest.raises(ValueError, match=r"one that torch\.onnx\.export can trace, got "):
            quantize_(Branching(), rows, export_for=name, **FAST)
        with pytest.raises(AssertionError, match="it was optimised"):
            quantize_(Branching(), rows, export_for=name, forward_fn=run_it, **FAST)


def run_it(model: nn.Module, batch: torch.Tensor) -> torch.Tensor:
    """Whoever has a function of their own exports with arguments of their own."""
    found: torch.Tensor = model(batch)
    return found
