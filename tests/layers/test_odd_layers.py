"""quantize_ on layers, shapes and tensors that are not what they seem."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import quantize_
from tests.model.test_model_errors import Snapshot
from tests.model.test_odd_models import FAST, GROUPS, Block, Net, vectors
from tests.model.test_quantize import codes
from tests.support import models

pytestmark = pytest.mark.usefixtures("one_thread")


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
