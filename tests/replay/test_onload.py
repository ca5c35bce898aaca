"""Block by block on another device: what is where when, with a device that is none."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, quantize_
from adaround_ext.replay import onload
from adaround_ext.replay.onload import Onloader
from tests.model.test_quantize import codes
from tests.support import models

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = AdaRoundConfig(preset="fast", bits=3)


def test_what_is_brought_and_sent_home(monkeypatch: pytest.MonkeyPatch) -> None:
    model = models.Transformer()
    model.layers[2].key.weight = model.layers[1].key.weight  # stays, as two blocks have it
    model.layers[0].register_buffer("counter", torch.zeros(1))
    home = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
    monkeypatch.setattr(Onloader, "_moved", lambda self, data: data.clone())

    def away() -> set[str]:
        return {n for n, p in model.named_parameters() if p.data_ptr() != home[n][1]}

    outside = {"embedding.weight", "head.weight", "layers.1.key.weight"}

    def of(layer: int) -> set[str]:
        return {n for n in home if n.startswith(f"layers.{layer}.")}

    with (
        pytest.raises(OSError, match="enough"),
        Onloader(model, model.layers, torch.device("cpu")) as here,
    ):
        assert away() == outside
        here.only([model.layers[0]])
        assert away() == outside | of(0)
        model.layers[0].counter.add_(1)
        here.only([model.layers[1], model.layers[2]])
        assert away() == outside | of(1) | of(2)
        here.only([])
        assert away() == outside
        raise OSError("enough")
    assert away() == set() and all(p is home[n][0] for n, p in model.named_parameters())
    assert model.layers[0].counter == 1


@pytest.mark.parametrize("kind", ["transformer", "residual", "reused"])
def test_same_result_and_never_more_than_two_blocks(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other device is this one by another name, and what is brought there is a copy."""
    networks: dict[str, tuple[nn.Module, list[Any]]] = {
        "transformer": (models.Transformer(), [{"ids": models.tokens(4, 6)} for _ in range(2)]),
        "residual": (models.ResidualNet(), [torch.randn(4, 3, 8, 8) for _ in range(2)]),
        "reused": (models.Reused(), [torch.randn(16, 8) for _ in range(2)]),
    }
    model, batches = networks[kind]
    other = copy.deepcopy(model)
    home = {n: p.data_ptr() for n, p in other.named_parameters()}
    most = 0
    only = Onloader.only

    def counted(self: Onloader, blocks: Any) -> None:
        nonlocal most
        blocks = list(dict.fromkeys(blocks))
        most = max(most, len(blocks))
        only(self, blocks)

    def moved(self: Onloader, data: Tensor) -> Tensor:
        return data.clone()

    monkeypatch.setattr(onload.Onloader, "_moved", moved)
    monkeypatch.setattr(onload.Onloader, "only", counted)
    report = quantize_(model, batches, FAST, progress=False)
    quantize_(other, batches, FAST, device="cpu:0", progress=False)
    one, two = codes(model), codes(other)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    assert {n: p.data_ptr() for n, p in other.named_parameters()} == home
    assert most == (3 if kind == "reused" else 2)
    assert report.layers


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_a_model_on_the_cpu_fitted_on_a_gpu() -> None:
    model, batches = models.ResidualNet(), [torch.randn(4, 3, 8, 8) for _ in range(2)]
    report = quantize_(model, batches, FAST, device="cuda", progress=False)
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert {c.device.type for c in codes(model).values()} == {"cpu"}
    assert report.relative_error < 0.5 * report.nearest_error
