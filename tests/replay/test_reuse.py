"""What is kept within a block decides how much runs, and nothing else."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import quantize_
from adaround_ext.replay.cache import ActivationCache
from tests.model.test_quantize import codes

FEATURES, ROWS, BATCHES = 8, 16, 5
ACTIVATION = FEATURES * ROWS * 4  # bytes of a batch


class Block(nn.Module):
    """The model writes to what its layers return."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(FEATURES, FEATURES) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.c(F.relu_(self.b(self.a(x).tanh_())))


class Loop(Block):
    """The first layer's outputs depend on layers that come later."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            x = super().forward(x)
        return x


def products(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, batches: int, **arguments: Any
) -> tuple[dict[str, Tensor], int, int]:
    """The codes, how many linear layers were computed, and how often all data passed."""
    runs = 0
    plain = F.linear

    def counted(*args: Any) -> Tensor:
        nonlocal runs
        runs += 1
        return plain(*args)

    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(ROWS, FEATURES, generator=generator) for _ in range(batches)]
    with monkeypatch.context() as patch:
        patch.setattr(F, "linear", counted)
        report = quantize_(model, data, preset="fast", progress=False, **arguments)
    return codes(model), runs, report.passes


def per_batch(monkeypatch: pytest.MonkeyPatch, model: nn.Module, **arguments: Any) -> int:
    _, one, _ = products(monkeypatch, copy.deepcopy(model), 1, **arguments)
    _, several, _ = products(monkeypatch, model, BATCHES, **arguments)
    assert (several - one) % (BATCHES - 1) == 0
    return (several - one) // (BATCHES - 1)


def test_every_product_is_computed_once_in_each_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(Block(), Block())
    arguments: dict[str, Any] = {"blocks": [Block]}
    # All of them in the first pass, which keeps the first block's; the second block's in full
    # precision; and the quantized ones but for the last layer's, whose outputs nothing reads.
    assert per_batch(monkeypatch, copy.deepcopy(model), **arguments) == 6 + 3 + 5
    # A layer after the other, each anew for those behind it: the second's once and the third's
    # twice in the first block, twice and three times in the second one; and the recording.
    without = per_batch(monkeypatch, copy.deepcopy(model), memory_budget=0, **arguments)
    assert without == 6 + (2 + 3) + (1 + 2) + (1 + 2 + 3) + (3 + 1 + 2)
    # Rounded, what is kept would not be what a run gives.
    rounded = per_batch(monkeypatch, model, cache_dtype=torch.bfloat16, **arguments)
    assert rounded == without


@pytest.mark.parametrize("kind", [Block, Loop])
# Less than recordings need, about that, room for a batch or two more, and for everything.
@pytest.mark.parametrize("room", [4, 11, 29, 1000])
def test_as_without_room(kind: type[nn.Module], room: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """room: for so many activations of a batch."""
    model = nn.Sequential(kind(), kind())
    other = copy.deepcopy(model)
    expected, most, passes = products(monkeypatch, model, BATCHES, blocks=[kind], memory_budget=0)
    budget = room * ACTIVATION
    got, runs, fewer = products(monkeypatch, other, BATCHES, blocks=[kind], memory_budget=budget)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    assert runs <= most and (runs < most or room == 4)
    assert (fewer < passes) == (room > 11)  # of both streams, where some batch has no room


def test_room_is_taken_and_given_back() -> None:
    with ActivationCache(ACTIVATION) as cache:
        value = torch.randn(ROWS, FEATURES)
        assert cache.put_if_room("a", value)
        assert not cache.put_if_room("b", value[:1]) and "b" not in cache
        assert torch.equal(cache.get("a"), value)
        cache.drop("a")
        assert cache.put_if_room("b", value[1:]) and cache.put_if_room("c", value[:1])
        assert cache.peak == {"device": 0, "memory": ACTIVATION, "file": 0}
        cache.put("d", value[0])  # what has to be kept comes first
        assert "b" in cache and "c" not in cache and cache.peak["file"] == 0


def runs_with_and_without_room(
    monkeypatch: pytest.MonkeyPatch, model: nn.Module, blocks: list[type[nn.Module]]
) -> tuple[int, int]:
    """How many linear layers were computed; the codes are the same."""
    other = copy.deepcopy(model)
    expected, most, _ = products(monkeypatch, model, BATCHES, blocks=blocks, memory_budget=0)
    got, runs, _ = products(monkeypatch, other, BATCHES, blocks=blocks)
    assert all(torch.equal(got[name], expected[name]) for name in expected)
    return runs, most


class Turned(Block):
    """Batches that begin with a positive number take another order; the first one does not."""

    def forward(self, x: Tensor) -> Tensor:
        if x[0, 0] > 0:
            return x + self.b(self.a(F.relu_(self.c(x))))
        return x + self.c(F.relu_(self.b(self.a(x))))


def test_another_order_within_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a layer returns behind one that is not done is not kept."""
    model = nn.Sequential(Turned(), Turned())
    runs, most = runs_with_and_without_room(monkeypatch, model, [Turned])
    assert runs < most


class ReadsWeight(Block):
    """The last layer's weight has an effect before that layer is called."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(F.linear(self.a(x), self.c.weight).relu())
        return x + self.c(y)


class Saving(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        self.saved = super().forward(x)
        return self.saved


class LeavesOutput(Block):
    """A layer hands its output on behind the model's back."""

    def __init__(self) -> None:
        super().__init__()
        self.a = Saving(FEATURES, FEATURES)

    def forward(self, x: Tensor) -> Tensor:
        y = self.b(self.a(x).relu())
        return x + self.c(y + self.a.saved)


@pytest.mark.parametrize("kind", [ReadsWeight, LeavesOutput])
def test_layers_that_do_more(kind: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(kind(), kind())
    runs_with_and_without_room(monkeypatch, model, [kind])


class Shared(Block):
    """Its first layer is another block's too, and only some batches use it here."""

    def __init__(self, shared: nn.Linear, always: bool) -> None:
        super().__init__()
        self.shared, self.always = shared, always

    def forward(self, x: Tensor) -> Tensor:
        used = self.always or bool(x[0, 0] > 0)
        return super().forward(self.shared(x) if used else x)


@pytest.mark.parametrize("first", [True, False])
def test_a_layer_of_two_blocks(first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    shared = nn.Linear(FEATURES, FEATURES)
    model = nn.Sequential(Shared(shared, first), Shared(shared, not first))
    runs_with_and_without_room(monkeypatch, model, [Shared])


class Two(nn.Module):
    """Two blocks with the layers ``shared`` and ``late``, which is called in the second one only:
    so the first one is not done before. Most batches call ``shared`` in the second one too, behind
    a layer that others call later."""

    def __init__(self) -> None:
        super().__init__()
        shared, late = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.first, self.second = Early(shared, late), Late(shared, late)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x), again=bool(x[0, 0] > -1))  # all but the first one


class Early(Block):
    def __init__(self, shared: nn.Linear, late: nn.Linear) -> None:
        super().__init__()
        self.shared, self.late = shared, late

    def forward(self, x: Tensor) -> Tensor:
        return x + self.a(self.shared(x).relu())


class Late(Early):
    def forward(self, x: Tensor, again: bool) -> Tensor:  # type: ignore[override]
        y = self.a(self.shared(self.b(x).relu()).relu()) if again else self.b(self.a(x).relu())
        return x + self.late(self.c(y.relu()).relu())


def test_a_block_that_is_done_late(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Two()
    runs_with_and_without_room(monkeypatch, model, [Early, Late])


def test_what_may_be_dropped_stays_where_that_is_not_enough() -> None:
    with ActivationCache(ACTIVATION) as cache:
        cache.put("needed", torch.randn(ROWS // 2, FEATURES))
        assert cache.put_if_room("spare", torch.randn(ROWS // 2, FEATURES))
        cache.put("large", torch.randn(ROWS, FEATURES))
        assert "spare" in cache and cache.peak["file"] == ACTIVATION
        cache.put("small", torch.randn(1, FEATURES))
        assert "spare" not in cache and cache.peak["file"] == ACTIVATION
