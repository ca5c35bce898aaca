"""A second call on a model that has quantizers of activations already."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, quantize_
from adaround_ext.activations.hooks import detach, quantizers

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {"preset": "fast", "progress": False}


class Residual(nn.Module):
    """With a quantizer at a layer's output."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        return self.c(torch.relu(h + self.b(h)))


def chain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4))


def pictures() -> nn.Module:
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten())


@pytest.mark.parametrize("make", [Residual, chain, pictures])
@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_again(make: Callable[[], nn.Module], mode: Any) -> None:
    torch.manual_seed(0)
    model, data = make(), [torch.randn(32, 16) for _ in range(3)]
    first = quantize_(model, data, activations=ActivationConfig(), mode=mode, **FAST)
    before = {name: (q, float(q.scale)) for name, q in quantizers(model).items()}
    assert before
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"activations must be None .*detach\(model\) takes them"):
        quantize_(model, data, activations=ActivationConfig(4), mode=mode, **FAST)
    assert all(torch.equal(p, weights[name]) for name, p in model.named_parameters())
    # They stay, and no layer is taken for one that does more because of them.
    again = quantize_(model, data, bits=8, mode=mode, **FAST)
    assert {n: (q, float(q.scale)) for n, q in quantizers(model).items()} == before
    assert all(q.enabled for q, _ in before.values())
    assert [e.name for e in again.layers] == [e.name for e in first.layers]
    assert again.skipped == first.skipped
    assert again.notes[0] == f"{len(before)} quantizers of activations stay as they were"
    assert not any("does not repeat itself" in note for note in again.notes)
    # The way out that the error names.
    detach(model)
    third = quantize_(model, data, activations=ActivationConfig(4), mode=mode, **FAST)
    assert all(q.bits == 4 for q in quantizers(model).values())
    assert len(third.layers) == len(first.layers)
