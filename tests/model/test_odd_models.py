"""quantize_ on models that do what recordings of blocks cannot know."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import AdaRoundConfig, quantize_
from tests.model.test_checkpoint import interrupted
from tests.model.test_quantize import codes
from tests.support import models

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = AdaRoundConfig(preset="fast", bits=3)
GROUPS = [[f"blocks.{i}.{name}"] for i in range(3) for name in "ab"] + [["head"]]


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.b(torch.tanh(self.a(x)))


class Net(nn.Module):
    block: type[nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(self.block() for _ in range(3))
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class WritesInput(Net):
    """Its own batch, in place."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.mul_(0.5))


class Skip(Net):
    """Only large batches take the shortcut."""

    def forward(self, x: Tensor) -> Tensor:
        first = self.blocks[0](x)
        y = self.blocks[2](self.blocks[1](first))
        return self.head(y + first if len(x) > 16 else y)


class Repeats(Net):
    """Large batches go through the blocks more often."""

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(len(x) // 8):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


class Backwards(Net):
    """Large batches go through the blocks in another order."""

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks[::-1] if len(x) > 16 else self.blocks:
            x = block(x)
        return self.head(x)


class Appending(Net):
    """Blocks put what they return into a list, too."""

    class block(Block):
        def forward(self, x: Tensor, skips: list[Tensor]) -> Tensor:  # type: ignore[override]
            skips.append(super().forward(x))
            return skips[-1]

    def forward(self, x: Tensor) -> Tensor:
        skips: list[Tensor] = []
        for block in self.blocks:
            x = block(x, skips)
        return self.head(sum(skips, x))


class Counting(Net):
    """Blocks count themselves, and use the count."""

    class block(Block):
        def forward(self, x: Tensor, state: dict[str, int]) -> Tensor:  # type: ignore[override]
            state["blocks"] += 1
            return super().forward(x * state["blocks"])

    def forward(self, x: Tensor) -> Tensor:
        state = {"blocks": 0}
        for block in self.blocks:
            x = block(x, state)
        return self.head(x)


class Aliases(Net):
    """Two outputs of a block are one tensor, which is written to."""

    class block(Block):
        def forward(self, x: Tensor) -> dict[str, Tensor]:  # type: ignore[override]
            y = super().forward(x)
            return {"states": y, "first": y[:, :4], "last": y}

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            found = block(x)
            found["states"].relu_()
            x = found["last"] + torch.cat([found["first"], found["first"]], 1)
        return self.head(x)


class ViewOfInput(Net):
    class block(Block):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
            return x.view(-1, 8), super().forward(x)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone()
        for block in self.blocks:
            view, y = block(x)
            view.mul_(0.5)
            x = x + y
        return self.head(x)


class Generating(Net):
    class block(Block):
        def forward(self, x: Tensor) -> Iterator[Tensor]:  # type: ignore[override]
            yield self.a(x)
            yield self.b(torch.tanh(x))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + sum(block(x))
        return self.head(x)


class Locked(Net):
    """Blocks that let nobody set an attribute."""

    class block(Block):
        def __init__(self) -> None:
            super().__init__()
            self.__dict__["locked"] = True

        def __setattr__(self, name: str, value: Any) -> None:
            if self.__dict__.get("locked") and name != "training":
                raise AttributeError(f"{name} is locked")
            super().__setattr__(name, value)


def vectors(*rows: int) -> list[Tensor]:
    return [torch.randn(n, 8) for n in rows]


CARRIED = [Locked, WritesInput]
RUN_AGAIN = [Skip, Repeats, Backwards, Appending, Counting, Aliases, ViewOfInput, Generating]


@pytest.mark.usefixtures("one_segment")
@pytest.mark.parametrize("make", [*CARRIED, *RUN_AGAIN])
def test_as_without_recordings(make: Callable[[], nn.Module]) -> None:
    """The same bits as by whole runs; where recordings cannot stand for blocks, a note says so."""
    model = make()
    batches = vectors(16, 24, 32) if make is not Repeats else vectors(24, 16, 32)
    before = copy.deepcopy(batches)
    expected = models.plain_walk(model, copy.deepcopy(batches), GROUPS, FAST)
    report = quantize_(model, batches, FAST, progress=False)
    assert all(torch.equal(a, b) for a, b in zip(before, batches, strict=True))
    got = codes(model)
    if make is Repeats:  # plain_walk has samples and targets of another order there
        assert got.keys() == expected.keys()
    else:
        assert all(torch.equal(got[name], result.codes) for name, result in expected.items())
        assert torch.equal(model.head.weight, expected["head"].weight_q)  # type: ignore[union-attr]
    notes = [note for note in report.notes if "ran from its start" in note]
    assert bool(notes) == (make in RUN_AGAIN)


@pytest.mark.parametrize("after", [1, 3, 6])
def test_resumed_where_everything_runs_again(
    after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.model import test_checkpoint

    batches = vectors(16, 24)
    monkeypatch.setattr(test_checkpoint, "batches", lambda: copy.deepcopy(batches))
    model = Appending()
    whole = copy.deepcopy(model)
    quantize_(whole, batches, FAST, progress=False)
    interrupted(model, after, monkeypatch, checkpoint_dir=tmp_path)
    quantize_(model, batches, FAST, checkpoint_dir=tmp_path, progress=False)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in model.state_dict().items())


class Recursive(Net):
    """A block that calls itself, before and after others."""

    class block(Block):
        def forward(self, x: Tensor, depth: int = 1) -> Tensor:  # type: ignore[override]
            x = torch.tanh(super().forward(x))
            return self(x, depth - 1) if depth else x

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks[0](self.blocks[2](self.blocks[1](self.blocks[0](x)))))


def test_a_block_that_calls_itself() -> None:
    model, batches = Recursive(), vectors(16, 16)
    whole = copy.deepcopy(model)
    report = quantize_(model, batches, FAST, progress=False)
    assert not report.notes
    quantize_(whole, batches, FAST, blocks=[], progress=False)
    assert all(torch.equal(t, whole.state_dict()[n]) for n, t in model.state_dict().items())


class Borrowing(Net):
    """A weight of a block is read from outside of it, before and after."""

    def forward(self, x: Tensor) -> Tensor:
        weight = self.blocks[0].a.weight
        y = super().forward(x + F.linear(x, weight))
        return y + self.last(F.linear(x, weight))

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(8, 4)


@pytest.mark.usefixtures("one_segment")
def test_a_weight_that_is_read_elsewhere() -> None:
    model, batches = Borrowing(), vectors(16, 16)
    expected = models.plain_walk(model, batches, [*GROUPS, ["last"]], FAST)
    quantize_(model, batches, FAST, progress=False)
    assert all(torch.equal(codes(model)[name], r.codes) for name, r in expected.items())
    assert torch.equal(model.last.bias, expected["last"].bias)


def test_under_autocast() -> None:
    """Autocast keeps casts of weights as long as it lasts: not of those that are replaced."""
    inside, around, batches = Net(), Net(), vectors(16, 16)
    around.load_state_dict(inside.state_dict())

    def forward(model: nn.Module, batch: Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return model(batch)

    quantize_(inside, batches, FAST, forward_fn=forward, progress=False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        quantize_(around, batches, FAST, progress=False)
        assert torch.is_autocast_cache_enabled()
    assert all(torch.equal(t, around.state_dict()[n]) for n, t in inside.state_dict().items())
