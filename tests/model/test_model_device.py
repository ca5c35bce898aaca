"""Whole models where they are: everything stays on their device, with the results of the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, AdaRoundConfig, quantize_
from tests.support import models

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
FAST = AdaRoundConfig(preset="fast")
SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {},
    "balanced": {"config": AdaRoundConfig()},
    "parallel": {"mode": "parallel"},
    "equalized": {"equalize": True},
    "activations": {"activations": ActivationConfig()},
    "no-budget": {"memory_budget": 0},
    "half-cache": {"cache_dtype": torch.bfloat16},
    "groups": {"config": AdaRoundConfig(preset="fast", granularity="per_group", group_size=2)},
}


def make(device: torch.device) -> tuple[nn.Module, list[Tensor]]:
    """A small network with every kind of layer in it, and its data."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=2),
        nn.ReLU(), nn.Flatten(2), nn.Linear(16, 12), nn.GELU(), nn.Flatten(), nn.Linear(96, 6),
    )  # fmt: skip
    return network.eval().to(device), [torch.randn(24, 2, 6, 6).to(device) for _ in range(3)]


def run(device: torch.device, **settings: Any) -> tuple[nn.Module, float]:
    """The quantized network and its relative error on the data."""
    model, data = make(device)
    with torch.no_grad():
        expected = torch.cat([model(x) for x in data])
        settings = {"config": FAST, **settings}
        quantize_(model, data, progress=False, **settings)
        error = torch.cat([model(x) for x in data]) - expected
    return model, float(error.norm() / expected.norm())


@pytest.mark.parametrize("name", SETTINGS)
def test_everything_is_on_the_device(device: torch.device, name: str) -> None:
    settings = SETTINGS[name]
    model, error = run(device, **settings)
    assert {t.device.type for t in model.state_dict().values()} == {device.type}
    _, on_cpu = run(torch.device("cpu"), **settings)
    assert error == pytest.approx(on_cpu, rel=0.2)


def test_what_is_kept_is_where_there_is_room(device: torch.device) -> None:
    def kept(**budgets: Any) -> tuple[int, int, int]:
        model, data = make(device)
        report = quantize_(model, iter(data), FAST, progress=False, **budgets)
        memory = report.memory
        return memory.get("cache_device", 0), memory["cache_memory"], memory["cache_file"]

    first = kept()
    everything = sum(first)
    assert everything > 0
    assert first == ((everything, 0, 0) if device.type == "cuda" else (0, everything, 0))
    assert kept(device_budget=0) == (0, everything, 0)
    assert kept(device_budget=0, memory_budget=0) == (0, 0, everything)


def test_data_from_elsewhere(device: torch.device) -> None:
    """They come to the device once; where there is no room, on every pass."""
    found = []
    for here, budget in ((True, None), (False, None), (False, 0)):
        model, data = make(device)
        data = data if here else [x.cpu() for x in data]
        report = quantize_(model, data, FAST, device_budget=budget, progress=False)
        found.append((model.state_dict(), report.memory))
    for state, memory in found[1:]:
        for name, value in found[0][0].items():
            assert torch.equal(state[name], value), name
        assert memory["cache_file"] == 0
    if device.type == "cuda":
        kept = [memory["cache_device"] for _, memory in found]
        assert kept[0] == kept[1] > sum(x.nbytes for x in data) and kept[2] == 0


def test_resumed_on_the_device(device: torch.device, tmp_path: Path) -> None:
    one, _ = run(device, checkpoint_dir=tmp_path)
    two, _ = run(device, checkpoint_dir=tmp_path)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name


def test_a_transformer_on_the_device(device: torch.device) -> None:
    """Attention masks, embeddings and shared inputs are made where the model is."""
    torch.manual_seed(2)
    model = models.Transformer().eval().to(device)
    data = [models.tokens(4, 7).to(device) for _ in range(2)]
    report = quantize_(model, data, FAST, progress=False)
    assert len(report.layers) > 4
    assert {t.device.type for t in model.state_dict().values()} == {device.type}
