"""What tests of ``export_for`` share: models, data, and a way to see that nothing is optimised."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaround_ext import export_model, verify
from adaround_ext.export.goal.targets import EXPORT_TARGETS

FAST: dict[str, Any] = {"preset": "fast", "progress": False}
ONNX = ("onnxruntime", "openvino", "tensorrt")


def llama(folder: Path, dtype: torch.dtype, **sizes: int) -> nn.Module:
    """As users have it: read from files of that dtype, so that buffers are what loading makes."""
    import transformers

    settings = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1}
    settings |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 32}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(settings | sizes), use_cache=False)
    transformers.LlamaForCausalLM(config).to(dtype).save_pretrained(folder / "llama")
    found: nn.Module = transformers.LlamaForCausalLM.from_pretrained(folder / "llama", dtype=dtype)
    return found.eval()


def tokens(count: int = 2) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    drawn = [torch.randint(32, (3, 12), generator=generator) for _ in range(count)]
    return [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in drawn]


def exported(model: nn.Module, name: str, batch: Any, folder: Path) -> bool:
    target = EXPORT_TARGETS[name]
    export_model(model, folder, target.format, batch=batch, target=target.runtime)
    return verify(model, folder, [batch]).ok


def convolutions() -> nn.Sequential:
    torch.manual_seed(2)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
        nn.Linear(16, 15), nn.Linear(15, 64), nn.Linear(64, 8),
    ).eval()  # fmt: skip


def images() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(8, 2, 4, 4, generator=generator) for _ in range(2)]


def stopped(*_: object, **__: object) -> None:
    raise AssertionError("it was optimised")


@pytest.fixture
def never_solved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaround_ext.model.quantize.Fitter.run", stopped)
