"""quantize_ on models that do what recordings of blocks cannot know, and on layers that do more."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import ActivationConfig, AdaRoundConfig, ModelReport, quantize_
from tests import models
from tests.test_model import codes
from tests.test_model_errors import Snapshot
from tests.test_resume import interrupted

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
    from tests import test_resume

    batches = vectors(16, 24)
    monkeypatch.setattr(test_resume, "batches", lambda: copy.deepcopy(batches))
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


class Standardized(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, weight / weight.std(), self.bias)


class Same(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(F.pad(x, (1, 1, 1, 1)))


class Adapted(nn.Linear):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Linear(inputs, 2), nn.Linear(2, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + self.up(self.down(x))


class Renamed(nn.Linear):
    """Another forward, the same function."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.mT + self.bias).clone()


class Layers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.standardized, self.same = Standardized(4, 4, 1), Same(4, 4, 3)
        self.sized = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
        self.unsized = nn.ConvTranspose2d(4, 4, 3, stride=2, padding=1)
        self.adapted, self.hooked, self.seen = Adapted(4, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.hooked.register_forward_hook(lambda module, args, y: 3 * y)
        self.seen.register_forward_hook(lambda module, args, y: None)
        self.seen.register_forward_pre_hook(lambda module, args: (2 * args[0],))
        self.renamed = Renamed(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.same(self.standardized(F.relu(self.stem(x)))))
        y = F.relu(self.sized(y, output_size=list(x.shape[2:])))
        y = F.relu(self.adapted(self.unsized(y).mean((2, 3))))
        return self.renamed(F.relu(self.seen(F.relu(self.hooked(y)))))


def test_layers_that_do_more_than_their_class_are_left_alone() -> None:
    model = Layers()
    state = copy.deepcopy(model.state_dict())
    report = quantize_(model, [torch.randn(4, 3, 8, 8) for _ in range(3)], FAST, progress=False)
    assert [entry.name for entry in report.layers] == [
        "stem", "unsized", "adapted.down", "adapted.up", "seen", "renamed",
    ]  # fmt: skip
    alone = {"standardized", "same", "sized", "adapted", "hooked"}
    assert {n for n, why in report.skipped.items() if "weight and bias alone" in why} == alone
    for name in alone:
        assert torch.equal(model.get_submodule(name).weight, state[f"{name}.weight"])
    assert [len(m._forward_hooks) for m in (model.hooked, model.seen, model.same)] == [1, 1, 0]


def test_weights_in_the_same_memory_are_left_alone() -> None:
    model = Net()
    model.blocks[2].b.weight = nn.Parameter(model.blocks[0].b.weight.data)
    model.head.weight = nn.Parameter(torch.randn(4, 1).expand(4, 8))
    report = quantize_(model, vectors(16, 16), FAST, progress=False)
    assert report.skipped == {
        "blocks.0.b": "its weight shares memory with blocks.2.b.weight",
        "blocks.2.b": "its weight shares memory with blocks.0.b.weight",
        "head": "entries of its weight share memory",
    }


class Writing(Net):
    """Writes one buffer and replaces another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(8))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.mean += x.mean(0)
        self.count = self.count + 1
        if self.count > 7:
            raise OSError("enough")
        return super().forward(x)


def test_buffers_that_the_model_writes() -> None:
    model = Writing()
    mean, count = model.mean, model.count
    before = Snapshot(model)
    with pytest.raises(OSError, match="enough"):
        quantize_(model, vectors(16, 16), FAST, progress=False)
    before.check()
    assert model.mean is mean and model.count is count
    quantize_(model, vectors(16), FAST, filter_fn=lambda m, name: "0.a" in name, progress=False)
    assert model.mean is mean and not mean.any() and not model.count


def test_convolutions_on_single_images() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Conv2d(4, 5, 3))
    images = [torch.randn(3, 8, 8) for _ in range(6)]
    expected = models.plain_walk(model, images, [["0"], ["2"]], FAST)
    report = quantize_(model, images, FAST, progress=False)
    assert not report.notes
    assert all(torch.equal(codes(model)[name], r.codes) for name, r in expected.items())


def test_channels_are_no_tokens() -> None:
    """A mask [batch, tokens] is nothing to a convolution with as many channels."""

    class Conv(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.head = nn.Conv1d(6, 6, 3), nn.Linear(8, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(F.relu(self.conv(x)).mean(1))

    mask = torch.arange(6)[None] < torch.tensor([[3], [6], [4], [5]])
    report = quantize_(Conv(), [(torch.randn(4, 6, 10), mask.long())], FAST, progress=False)
    assert [entry.report.samples for entry in report.layers] == [4 * 8, 4]


def test_sparse_tensors_between_blocks() -> None:
    class Graph(Net):
        class block(Block):
            def forward(self, x: Tensor, edges: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
                return super().forward(x), edges * 2

        def forward(self, x: Tensor, edges: Tensor) -> Tensor:
            for block in self.blocks:
                x, edges = block(x, edges)
                x = torch.sparse.mm(edges, x) / 10
            return self.head(x)

    batches = [(torch.randn(6, 8), (torch.rand(6, 6) > 0.5).float().to_sparse()) for _ in range(3)]
    model = Graph()
    expected = models.plain_walk(model, batches, GROUPS, FAST)
    quantize_(model, iter(batches), FAST, cache_dtype=None, progress=False)
    assert all(torch.equal(codes(model)[name], r.codes) for name, r in expected.items())


def test_scripted_submodules_are_run_as_they_are() -> None:
    model = nn.Sequential(torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.ReLU())), Net())
    report = quantize_(model, vectors(16, 16), FAST, progress=False)
    assert [entry.name for entry in report.layers] == [f"1.{name}" for [name] in GROUPS]
    assert "RecursiveScriptModule is not supported" in report.skipped["0.0"]


def fitted(source: Any, **arguments: Any) -> ModelReport:
    torch.manual_seed(5)
    return quantize_(Net(), source, FAST, progress=False, **arguments)


def test_a_loader_that_fills_one_array_again() -> None:
    batches = [torch.randn(16, 8).numpy() for _ in range(3)]

    def refilled() -> Iterator[dict[str, Any]]:
        array = np.empty((16, 8), dtype=np.float32)
        for batch in batches:
            array[:] = batch
            yield {"x": array, "name": "batch", "weight": None}

    def forward(model: nn.Module, batch: dict[str, Any]) -> None:
        model(torch.from_numpy(batch["x"]))

    losses = [
        [entry.report.losses for entry in fitted(source, forward_fn=forward).layers]
        for source in (refilled(), [{"x": batch} for batch in batches])
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"padding_mask": None}, "padding_mask"),
        ({"forward_fn": lambda model, batch: model(torch.tensor(batch))}, "forward_fn"),
        ({"source": [np.ones((4, 8), dtype=np.float32)]}, "calibration"),
    ],
)
def test_resuming_looks_at_all_that_is_given(
    change: dict[str, Any], part: str, tmp_path: Path
) -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        return model(torch.from_numpy(batch))

    first: dict[str, Any] = {"source": [np.zeros((4, 8), np.float32)], "forward_fn": forward}
    fitted(**first, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=f"of a run with another {part}"):
        fitted(**{**first, **change}, checkpoint_dir=tmp_path)


def test_what_prepares_a_batch_is_no_part_of_the_model() -> None:
    """Copies and casts of the inputs: a shortcut from the model's input is found all the same."""
    for forward in (None, lambda model, batch: model(batch.double().float())):
        model = Net()
        quantize_(
            model, vectors(16), FAST, activations=ActivationConfig(), forward_fn=forward,
            progress=False,
        )  # fmt: skip
        assert hasattr(model.blocks[0], "input_quantizer")  # not only its first layer


def test_models_without_weights_yet() -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"model must have been run once, got 0\.weight"):
        quantize_(lazy, vectors(4), progress=False)
    assert isinstance(lazy[0], nn.LazyLinear)
    with torch.inference_mode():
        frozen = Net()
    with pytest.raises(ValueError, match=r"inference_mode, as blocks\.0\.a\.weight was"):
        quantize_(frozen, vectors(4), progress=False)
