"""Pairs that cannot be equalized are left alone, with the reason, and failures are taken back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from adaround_ext.transforms import equalize
from adaround_ext.transforms.verified import Journal
from tests.support.models import Net
from tests.transforms.test_equalize import (
    assert_unchanged,
    even,
    linear,
    separable,
    snapshot,
    unbalance,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def two(**more: nn.Module) -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), **more}


def tied() -> nn.Module:
    net = Net(lambda m, x: m.b(m.a(x)), **two())
    net.b.weight = net.a.weight
    return net


def tied_bias() -> nn.Module:
    net = Net(lambda m, x: m.c(m.b(m.a(x)).sigmoid()), **two(c=nn.Linear(4, 4)))
    net.c.bias = net.a.bias
    return net


def parametrized() -> nn.Module:
    net = Net(lambda m, x: m.b(m.a(x)), **two())
    parametrize.register_parametrization(net.b, "weight", nn.Tanh())
    return net


def also_read(m: Any, x: Tensor) -> Tensor:
    y = m.a(x).relu()
    return m.b(y) + y


def read_early(m: Any, x: Tensor) -> Tensor:
    y = m.a(x)
    z = y + 1
    return m.b(y.relu_()) + z


def returned(m: Any, x: Tensor) -> Any:
    y = m.a(x).relu()
    return m.b(y), y


LEFT = [
    (lambda: Net(also_read, **two()), "its output is read 2 times"),
    (lambda: Net(read_early, **two()), "its output is read 2 times"),
    (lambda: Net(returned, **two()), "the model returns its output"),
    (lambda: Net(lambda m, x: m.b(F.relu6(m.a(x))), **two()), "goes to aten.hardtanh"),
    (lambda: Net(lambda m, x: m.b(F.gelu(m.a(x))), **two()), "goes to aten.gelu"),
    (
        lambda: Net(lambda m, x: m.b(m.a(x[..., None]).flatten(1)), **two(a=nn.Conv1d(4, 4, 1))),
        "goes to aten.view",
    ),
    (lambda: Net(lambda m, x: F.linear(m.a(x), m.b.weight), **two()), "goes to aten.mm"),
    (lambda: Net(lambda m, x: m.b(m.a(x)) + m.b(x), **two()), "b, which reads its output, runs"),
    (lambda: Net(lambda m, x: m.b(m.a(m.a(x))), **two()), "it runs 2 times"),
    (
        lambda: Net(lambda m, x: m.b(m.a(x.expand(4, 6, 4))), **two(b=nn.Conv1d(6, 2, 1))),
        "b has its channels in another dimension",
    ),
    (
        lambda: Net(lambda m, x: m.b(m.a(x)) + m.b.weight.sum(), **two()),
        "b has a weight or bias that is also read outside of it",
    ),
    (lambda: Net(lambda m, x: (m.a(x) * 0, m.b(x))[1], **two()), "goes to aten.mul"),
    (tied, "a shares its weight with b.weight"),
    (tied_bias, "a shares its bias with c.bias"),
    (parametrized, "b: layer must own its weight"),
]


@pytest.mark.parametrize(("build", "reason"), LEFT)
def test_left_alone(build: Callable[[], nn.Module], reason: str) -> None:
    model, x = build().eval(), torch.randn(6, 4)
    before = snapshot(model)
    result = even(model, x)
    assert not any(first == "a" for first, _ in result.pairs)
    assert reason in result.skipped["a"]
    assert_unchanged(model, before)


def test_a_wrong_scale_is_taken_back(monkeypatch: pytest.MonkeyPatch) -> None:
    right = equalize._scale

    def wrong(journal: Journal, traced: Any, pairs: Any, factors: Any) -> None:
        right(journal, traced, pairs, factors)
        if any(pair.first is model[2] for pair in pairs):
            journal.write_(model[2].bias, model[2].bias + 0.1)

    model, x, pairs = separable()
    expected = unbalance(model)(x)
    before = snapshot(model)
    monkeypatch.setattr(equalize, "_scale", wrong)
    result = even(model, x)
    assert list(result.pairs) == [pairs[0], pairs[2]]
    assert "output 0 of the model moves by" in result.skipped["2"]
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    result.undo()
    assert_unchanged(model, before)


class Clipped(nn.Linear):
    """Looks like a Linear, and is none."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=0.1)


def test_a_layer_that_is_not_linear_is_found_by_running() -> None:
    model = nn.Sequential(Clipped(4, 4), nn.Linear(4, 4), nn.Sigmoid(), nn.Linear(4, 2))
    unbalance(model)
    before = snapshot(model)
    result = even(model, torch.randn(6, 4))
    assert result.pairs == ()
    assert "moves by" in result.skipped["0"]
    assert_unchanged(model, before)


def test_a_model_that_does_not_repeat_itself() -> None:
    model, x, _ = linear()
    before = snapshot(unbalance(model))
    runs: list[int] = []

    def run() -> Tensor:
        runs.append(1)
        return model(x) * len(runs)

    result = even(model, x, run)
    assert result.pairs == ()
    assert "changes from run to run" in result.skipped["0"]
    assert_unchanged(model, before)


def test_errors_leave_nothing_changed() -> None:
    model, x, _ = linear()
    before = snapshot(unbalance(model))
    runs: list[int] = []

    def run() -> Tensor:
        runs.append(1)
        if len(runs) > 2:  # traced, before, after
            raise RuntimeError("out of memory")
        return model(x)

    with pytest.raises(RuntimeError, match="out of memory"):
        even(model, x, run)
    assert len(runs) == 4  # again, as it was: not the change is to blame
    assert_unchanged(model, before)


def test_bad_settings() -> None:
    model, x = nn.Linear(3, 2), torch.randn(4, 3)
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        even(model, x, iterations=0)
    for tolerance in (-1.0, float("nan")):
        with pytest.raises(ValueError, match="tolerance must not be negative, got"):
            even(model, x, tolerance=tolerance)
