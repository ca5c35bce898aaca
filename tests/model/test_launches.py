"""On a GPU every operator is a launch, which costs more than work on a small piece of a layer."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from adaround_ext import optimize_layer
from adaround_ext.linalg import products

pytestmark = pytest.mark.on_a_device


class Operators(TorchDispatchMode):
    """Counts what is called, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found[str(func)] += 1
        return func(*args, **(kwargs or {}))


def operators(
    device: torch.device, rows: int, cols: int, tokens: int, preset: str, groups: int, targets: bool
) -> Counter[str]:
    """Those of one layer, with so many groups of columns."""
    torch.manual_seed(0)
    layer = nn.Linear(cols, rows).to(device)
    x = torch.randn(tokens, cols).to(device)
    y = layer(1.01 * x).detach() if targets else None
    size = {} if groups == 1 else {"granularity": "per_group", "group_size": cols // groups}
    few = {} if preset == "fast" else {"steps": 3, "search_steps": 3}
    with Operators() as counted:
        optimize_layer(layer, x, y, preset=preset, **size, **few)
    return counted.found


@pytest.mark.parametrize("targets", [False, True])
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("preset", ["fast", "balanced"])
def test_a_large_layer_takes_as_many_as_a_small_one(
    device: torch.device,
    preset: str,
    groups: int,
    targets: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if device.type == "cpu":
        pytest.skip("a processor works on as much as its caches hold")
    monkeypatch.setattr(products, "_MIN_LARGE", 1 << 60)  # else a large product is three, for speed
    small = operators(device, 24, 256, 512, preset, groups, targets)
    large = operators(device, 300, 1024, 8192, preset, groups, targets)
    assert large == small
