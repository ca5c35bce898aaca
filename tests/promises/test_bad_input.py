"""What optimize_layer refuses, and that it changes nothing of the caller's, whatever happens."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from adaround_ext import optimize_layer

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
both_objectives = pytest.mark.parametrize("objective", ["gram", "sampled"])


class Snapshot:
    """All that a call must leave as it was: layers, tensors, random numbers, modes."""

    def __init__(self, layers: list[nn.Module], tensors: list[Tensor]) -> None:
        self.layers, self.tensors = layers, tensors
        self.before = self.take()

    def take(self) -> list[Any]:
        held = [t for layer in self.layers for t in layer.state_dict(keep_vars=True).values()]
        state: list[Any] = [torch.get_rng_state().tolist(), random.getstate()]
        state += [np.random.get_state()[1].tolist(), torch.get_num_threads()]  # type: ignore[index]
        state += [torch.is_grad_enabled(), torch.get_default_dtype(), logging.root.level]
        state += [(layer.training, list(layer.__dict__)) for layer in self.layers]
        for t in (*held, *self.tensors):
            state += [id(t), t.data_ptr(), t._version, t.requires_grad, t.dtype, t.device, t.shape]
            state += [t.grad if t.grad is None else t.grad.tolist()]
            state += [t.detach().cpu().view(-1).view(torch.uint8).tolist()]
        return state

    def check(self) -> None:
        assert self.take() == self.before


def linear(device: torch.device) -> nn.Linear:
    return nn.Linear(6, 4, device=device)


def conv(device: torch.device) -> nn.Conv2d:
    return nn.Conv2d(2, 4, 3, device=device)


def broken(device: torch.device) -> nn.Linear:
    layer = nn.Linear(6, 4, device=device)
    with torch.no_grad():
        layer.weight[1, 2], layer.weight[0, 0] = float("nan"), float("-inf")
    return layer


def with_bad_values(x: Tensor) -> Tensor:
    x = x.clone()
    x.view(-1)[:3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    return x


def parametrized(device: torch.device) -> nn.Module:
    return parametrizations.weight_norm(nn.Linear(6, 4, device=device))


# name: (error, its message, what to change of layer=linear, inputs=x [8, 6], targets=None, bits=4);
# a callable gets the value it replaces (or the device, for a layer).
Case = tuple[type[Exception], str, dict[str, Any]]
CASES: dict[str, Case] = {
    "module": (TypeError, r"^layer must be one of Linear, .*got ReLU", {"layer": nn.ReLU()}),
    "container": (TypeError, r"^layer must be .*got Sequential", {"layer": nn.Sequential()}),
    "no-module": (TypeError, r"^layer must be a module or a sequence .*got int$", {"layer": 3}),
    "none": (TypeError, r"^layer must be a module or .*got NoneType$", {"layer": None}),
    "no-layers": (ValueError, r"^layer must be a module or at least one", {"layer": []}),
    "parametrized": (ValueError, r"^layer must own its weight", {"layer": parametrized}),
    "nan-weight": (ValueError, r"^weight of Linear.* must be finite, got 2 NaN", {"layer": broken}),
    "other-geometry": (
        ValueError,
        r"^layer must hold modules .* take the same inputs .*Linear.*Conv2d",
        {"layer": lambda device: [linear(device), conv(device)]},
    ),
    "other-dtype": (
        ValueError,
        r"^layer must hold modules .*one dtype.*float32.*bfloat16",
        {"layer": lambda device: [linear(device), linear(device).bfloat16()]},
    ),
    "features": (
        ValueError,
        r"^inputs must have 6 features.*\[8, 5\]",
        {"inputs": torch.ones(8, 5)},
    ),
    "conv-shape": (
        ValueError,
        r"^inputs must be \[samples, 2, \*size\]",
        {"layer": conv, "inputs": torch.ones(3, 3, 5, 5)},
    ),
    "too-small": (
        ValueError,
        r"^inputs must be large enough",
        {"layer": conv, "inputs": torch.ones(3, 2, 2, 5)},
    ),
    "integers": (TypeError, r"^inputs must be floating point", {"inputs": Tensor.long}),
    "bytes": (TypeError, r"^inputs must be floating point", {"inputs": lambda x: [x.byte()]}),
    "device": (ValueError, r"^inputs must be on .*got meta", {"inputs": lambda x: x.to("meta")}),
    "text": (TypeError, r"^inputs must be a tensor or an iterable", {"inputs": "data"}),
    "number": (TypeError, r"^inputs must be a tensor or an iterable", {"inputs": 3}),
    "numbers": (TypeError, r"^inputs must hold tensors, got int", {"inputs": [1, 2]}),
    "no-samples": (ValueError, r"^inputs must hold at least one", {"inputs": lambda x: x[:0]}),
    "no-tokens": (ValueError, r"^inputs must hold at least one", {"inputs": torch.ones(2, 0, 6)}),
    "empty-list": (ValueError, r"^inputs must hold at least one", {"inputs": []}),
    "empty-iterator": (ValueError, r"^inputs must hold at least one", {"inputs": iter(())}),
    "nan": (ValueError, r"^inputs of Linear.* finite, got 3 NaN", {"inputs": with_bad_values}),
    "nan-later": (
        ValueError,
        r"^inputs of Linear.* finite, got 3 NaN",
        {"inputs": lambda x: iter([x, with_bad_values(x)])},
    ),
    "nan-float64": (
        ValueError,
        r"^inputs of Linear.* finite, got 3 NaN",
        {"inputs": lambda x: with_bad_values(x.double())},
    ),
    "target-shape": (
        ValueError,
        r"^targets must have 4 features .*\[8, 6\]",
        {"targets": torch.ones(8, 6)},
    ),
    "target-size": (
        ValueError,
        r"^targets must have the output's size \[3, 3\], got \[1, 1\]",
        {"layer": conv, "inputs": torch.ones(3, 2, 5, 5), "targets": torch.ones(3, 4, 1, 1)},
    ),
    "few-targets": (
        ValueError,
        r"^targets must .* samples.*8, got 7",
        {"targets": torch.ones(7, 4)},
    ),
    "fewer-batches": (
        ValueError,
        r"^targets must have as many batches as inputs, got fewer",
        {"inputs": lambda x: [x, x], "targets": [torch.ones(8, 4)]},
    ),
    "more-batches": (
        ValueError,
        r"^targets must have as many batches as inputs, got more",
        {"inputs": lambda x: [x], "targets": [torch.ones(8, 4)] * 2},
    ),
    "one-target-for-two": (
        ValueError,
        r"^targets must hold a tensor for each of the 2 layers, got 1",
        {"layer": lambda device: [linear(device), linear(device)], "targets": torch.ones(8, 4)},
    ),
    "nan-targets": (
        ValueError,
        r"^targets of Linear.* finite, got 3 NaN",
        {"targets": with_bad_values(torch.ones(8, 4))},
    ),
    "bits": (ValueError, r"^bits must be from 2 to 8, got 9", {"bits": 9}),
    "unknown": (TypeError, r"^'bit' is no setting; did you mean bits\? ", {"bit": 4}),
    "config": (TypeError, r"^config must be an AdaRoundConfig, got dict", {"config": {"bits": 4}}),
    "group-size": (
        ValueError,
        r"^group_size must divide the layer's 6 columns, got 4",
        {"granularity": "per_group", "group_size": 4},
    ),
    "scale-shape": (
        ValueError,
        r"^scale must have shape \[4, 1\] or \[1, 1\]",
        {"scale": torch.ones(3, 1)},
    ),
    "activation-of-nothing": (
        TypeError,
        r"^activation must return a tensor of the shape it gets, \[8, 4\], got NoneType",
        {"activation": lambda y: None, "objective": "sampled"},
    ),
    "activation-of-another-shape": (
        TypeError,
        r"^activation must return a tensor of the shape it gets, \[8, 4\], got \[32\]",
        {"activation": torch.flatten, "objective": "sampled"},
    ),
    "scale-zero": (ValueError, r"^scale must be positive", {"scale": torch.zeros(4, 1)}),
}


def to(value: Any, device: torch.device) -> Any:
    """Tensors and modules, also in a list, on the device; the scale may stay."""
    if isinstance(value, list):
        return [to(item, device) for item in value]
    return value.to(device) if isinstance(value, (Tensor, nn.Module)) else value


@both_objectives
@pytest.mark.parametrize("name", CASES)
def test_one_clear_exception(device: torch.device, name: str, objective: str) -> None:
    error, message, changes = CASES[name]
    x = torch.randn(8, 6).to(device)
    arguments: dict[str, Any] = {"layer": linear, "inputs": x, "steps": 2, **changes}
    if callable(arguments["layer"]) and not isinstance(arguments["layer"], nn.Module):
        arguments["layer"] = arguments["layer"](device)
    given = arguments.pop("inputs")
    arguments = {key: to(value, device) for key, value in arguments.items()}
    arguments["inputs"] = given(x) if callable(given) else to(given, device)
    layer = arguments["layer"]
    layers = layer if isinstance(layer, list) else [layer]
    before = Snapshot([item for item in layers if isinstance(item, nn.Module)], [x])
    with pytest.raises(error, match=message) as raised:
        optimize_layer(**{"objective": objective, **arguments})
    assert "\n" not in str(raised.value)
    before.check()


def test_large_finite_values_are_no_infinity() -> None:
    """Their sum overflows, they do not."""
    x = torch.full((8, 6), 1e38)
    assert optimize_layer(nn.Linear(6, 4), x * 1e-20, steps=1).report.samples == 8
    layer = nn.Linear(6, 4, dtype=torch.float16)
    optimize_layer(layer, torch.full((64, 6), 6e4, dtype=torch.float16), steps=1)


@both_objectives
@pytest.mark.parametrize("grad", [True, False])
def test_nothing_of_the_callers_changes(device: torch.device, objective: str, grad: bool) -> None:
    layer = linear(device)
    layer.weight.grad = torch.ones_like(layer.weight)
    layer.bias.requires_grad_(False)
    x, y = torch.randn(8, 6, device=device, requires_grad=True), torch.randn(8, 4, device=device)
    scale = torch.full((4, 1), 0.1, device=device)
    all_starts = {"starts": ("nearest", "gptq", "adaround")}
    sampled = {"activation": "relu", "objective": "sampled"}
    for settings in ({}, all_starts, {"scale": scale}, sampled):
        before = Snapshot([layer], [x, y, scale])
        with torch.set_grad_enabled(grad):
            result = optimize_layer(layer, x, y, steps=3, **{"objective": objective, **settings})
        before.check()
        result.scale.zero_()
        result.weight_q.zero_()
        if result.bias is not None:
            result.bias.zero_()
        before.check()


def test_works_in_inference_mode(device: torch.device) -> None:
    layer, x = linear(device), torch.randn(8, 6, device=device)
    for objective in ("gram", "sampled"):
        outside = optimize_layer(layer, x, steps=3, objective=objective)
        with torch.inference_mode():
            inside = optimize_layer(layer, x, steps=3, objective=objective)
        assert torch.equal(inside.codes, outside.codes)


@both_objectives
def test_interrupted_data(device: torch.device, objective: str) -> None:
    layer, x = linear(device), torch.randn(8, 6, device=device)

    def source() -> Iterator[Tensor]:
        yield x
        raise KeyboardInterrupt

    before = Snapshot([layer], [x])
    with pytest.raises(KeyboardInterrupt):
        optimize_layer(layer, source(), objective=objective)
    before.check()


def test_interrupted_annealing(device: torch.device) -> None:
    layer, x = conv(device), torch.randn(3, 2, 5, 5, device=device)
    calls = 0

    def activation(y: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 10:
            raise KeyboardInterrupt
        return y.relu()

    before = Snapshot([layer], [x])
    with pytest.raises(KeyboardInterrupt):
        optimize_layer(layer, x, activation=activation, steps=100)
    assert calls == 10
    before.check()


def test_silent_unless_asked(
    capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    layers, x = [nn.Linear(6, 4), nn.Linear(6, 4)], torch.randn(8, 6)
    optimize_layer(layers, x, steps=3)
    assert capfd.readouterr() == ("", "")
    assert not caplog.records
    with caplog.at_level(logging.INFO, "adaround_ext"):
        optimize_layer(layers, x, steps=3)
    assert [record.name for record in caplog.records] == ["adaround_ext"] * 2
    optimize_layer(layers, x, steps=3, starts=("adaround",), progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert "Linear" in err
    assert "3/3" in err
