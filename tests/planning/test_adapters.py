"""LoRA's layers are named in a note, with what leaves them alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import quantize_, sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {"preset": "fast", "progress": False}


class Adapted(nn.Module):
    """As peft wraps a Linear."""

    def __init__(self, names: tuple[str, str], dictionaries: bool) -> None:
        super().__init__()
        self.base_layer = nn.Linear(8, 8)
        for name, (cols, rows) in zip(names, ((8, 2), (2, 8)), strict=True):
            layer = nn.Linear(cols, rows, bias=False)
            self.add_module(name, nn.ModuleDict({"default": layer}) if dictionaries else layer)
        self._names = names

    def forward(self, x: Tensor) -> Tensor:
        down, up = (getattr(self, name) for name in self._names)
        if isinstance(down, nn.ModuleDict):
            down, up = down["default"], up["default"]
        return self.base_layer(x) + up(down(x))


@pytest.mark.parametrize(
    ("names", "dictionaries"),
    [
        (("lora_A", "lora_B"), True),
        (("lora_A", "lora_B"), False),
        (("lora_a", "lora_b"), False),
        (("lora_down", "lora_up"), False),
    ],
)
def test_adapters_are_named(names: tuple[str, str], dictionaries: bool) -> None:
    def model() -> nn.Module:
        return nn.Sequential(Adapted(names, dictionaries), nn.ReLU(), nn.Linear(8, 4))

    data = [torch.randn(16, 8)]
    report = quantize_(model(), data, **FAST)
    assert len(report.layers) == 4  # nothing is skipped unasked
    (note,) = (note for note in report.notes if "LoRA" in note)
    inner = ".default" if dictionaries else ""
    assert "2 layers of LoRA" in note and all(f"0.{name}{inner}" in note for name in names)
    assert note in sensitivity(model(), data, (4,), progress=False).notes
    overrides = {"*lora_*": "skip"}
    assert str(overrides).replace("'", '"').replace("{", "").replace("}", "") in note
    report = quantize_(model(), data, overrides=overrides, **FAST)
    assert [entry.name for entry in report.layers] == ["0.base_layer", "2"]
    assert not any("LoRA" in note for note in report.notes)


def test_no_adapters_no_note() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model.add_module("explora_tion", nn.Linear(4, 4))
    report = quantize_(model, [torch.randn(16, 8)], **FAST)
    assert not any("LoRA" in note for note in report.notes)
