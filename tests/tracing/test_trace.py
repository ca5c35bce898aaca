"""A watched run: what it says of calls, values, readers; and what blocks are made of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext.tracing.blocks import block_calls, find_blocks
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.trace import Trace, trace
from tests.support import models

pytestmark = pytest.mark.usefixtures("one_thread")


def traced(model: nn.Module, *args: Any) -> Trace:
    with evaluation(model):
        return trace(model, lambda: model(*args))


def test_calls_in_order_with_their_tensors() -> None:
    model = models.ResidualNet()
    run = traced(model, torch.randn(2, 3, 8, 8))
    names = {module: name for name, module in model.named_modules()}
    order = [names[c.module] for c in run.calls if isinstance(c.module, (nn.Conv2d, nn.Linear))]
    assert order[:4] == ["stem", "blocks.0.conv1", "blocks.0.conv2", "blocks.0.down"]
    block = model.blocks[0]
    (conv1,), (down,) = run.calls_of(block.conv1), run.calls_of(block.down)
    assert conv1.inputs == down.inputs and conv1.outputs != down.outputs
    assert [c.index for c in run.calls_of(block.relu)] == [0, 1]
    assert run.calls_of(block)[0].begin < conv1.begin < conv1.end < run.calls_of(block)[0].end
    assert run.calls_of(nn.Linear(1, 1)) == []


def test_a_write_makes_another_value() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.a(x)
            x.add_(1)
            return y + self.b(x)

    model = InPlace()
    run = traced(model, torch.zeros(2, 4))
    one, two = run.calls_of(model.a)[0].inputs[0], run.calls_of(model.b)[0].inputs[0]
    assert one.storage == two.storage and one != two


def test_only_reader() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c, self.d = (nn.Linear(4, 4) for _ in range(4))

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            a = self.a(x)
            b = self.b(F.relu(a))
            c = self.c(F.gelu(b) + b)
            return c, F.silu(self.d(c))

    model = Net()
    run = traced(model, torch.randn(2, 4))
    readers = {
        name: run.only_reader(run.calls_of(layer)[0]) for name, layer in model.named_children()
    }
    got = {name: reader and reader.name for name, reader in readers.items()}
    assert got == {"a": "aten.relu.default", "b": None, "c": None, "d": "aten.silu.default"}


def test_hooks_are_gone_after_an_error() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(5, 5))
    with pytest.raises(RuntimeError):
        traced(model, torch.randn(2, 4))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def names_of_blocks(model: nn.Module, *args: Any, blocks: Any = None) -> list[str]:
    run = traced(model, *args)
    return [c.name for c in block_calls(model, run, find_blocks(model, run, blocks))]


def test_blocks_are_found() -> None:
    image, ids = torch.randn(2, 3, 8, 8), models.tokens(2, 4)
    assert names_of_blocks(models.ResidualNet(), image) == ["stem", "blocks.0", "blocks.1", "head"]
    assert names_of_blocks(models.UNet(), image) == ["down.0", "down.1", "middle", "up.0", "up.1"]
    layers = [f"layers.{i}" for i in range(3)]
    assert names_of_blocks(models.Transformer(2), ids) == [*layers, *layers, "head"]
    long = nn.Sequential(*(nn.Linear(4, 4) for _ in range(20)))
    assert names_of_blocks(nn.Sequential(long), torch.randn(2, 4))[0] == "0.0"


def test_blocks_are_given() -> None:
    image = torch.randn(2, 3, 8, 8)
    got = names_of_blocks(models.ResidualNet(), image, blocks=["blocks"])
    assert got == ["stem", "blocks", "head"]
    assert names_of_blocks(models.ResidualNet(), image, blocks=[models.Residual])[1] == "blocks.0"
    assert len(names_of_blocks(models.ResidualNet(), image, blocks=[])) == 8


def needs(model: nn.Module, *args: Any) -> list[set[int]]:
    run = traced(model, *args)
    return [set(c.needs) for c in block_calls(model, run, find_blocks(model, run, None))]


def test_what_a_block_needs_of_those_before() -> None:
    image = torch.randn(2, 3, 8, 8)
    assert needs(models.ResidualNet(), image) == [set(), {0}, {1}, {2}]
    assert needs(models.UNet(), image) == [set(), {0}, {1}, {1, 2}, {0, 3}]


def test_a_number_read_from_a_tensor_may_steer_everything() -> None:
    class Steered(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(x) if float(self.a(x).sum()) < 1e9 else x

    assert needs(Steered(), torch.randn(2, 4)) == [set(), {0}]


def test_side_effects_keep_a_block_running() -> None:
    def replaceable(model: nn.Module, *args: Any) -> list[bool]:
        run = traced(model, *args)
        calls = block_calls(model, run, find_blocks(model, run, None))
        return [c.replaceable for c in calls]

    x = torch.randn(4, 8)
    assert replaceable(models.ResidualNet(), torch.randn(2, 3, 8, 8)) == [True] * 4
    # What they write to is returned, and can be written again.
    assert replaceable(models.Writing(), x) == [True] * 4
    # The last one's keys are read by nobody.
    assert replaceable(models.SideDoor(), x) == [False, False, True]


def test_everything_is_as_before() -> None:
    model = models.ResidualNet().train()
    model.blocks[0].eval()
    flags = [m.training for m in model.modules()]
    fast_path, state = torch.backends.mha.get_fastpath_enabled(), torch.get_rng_state()
    with pytest.raises(ValueError, match="inside"), evaluation(model):
        assert not any(m.training for m in model.modules()) and not torch.is_grad_enabled()
        torch.rand(3)
        raise ValueError("inside")
    assert [m.training for m in model.modules()] == flags and torch.is_grad_enabled()
    assert torch.backends.mha.get_fastpath_enabled() == fast_path
    assert torch.equal(torch.get_rng_state(), state)
