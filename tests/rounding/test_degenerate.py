"""Calibration data and weights with which statistics degenerate: finite results that say so."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import LayerResult, optimize_layer
from tests.support.problems import (
    assert_no_row_is_worse,
    losses_like,
    nearest_on_grid,
    result_losses,
)

pytestmark = pytest.mark.usefixtures("one_thread")
FEW: dict[str, Any] = {"steps": 20, "search_steps": 50, "bits": 3}
COLS, ROWS = 12, 5


def changed(change: Callable[[Tensor], object]) -> Callable[[Tensor], Tensor]:
    def apply(x: Tensor) -> Tensor:
        x = x.clone()
        change(x)
        return x

    return apply


def dead(x: Tensor) -> None:
    x[:, [3, 7]] = 0


def constant_column(x: Tensor) -> None:
    x[:, 3] = 2


def outlier_column(x: Tensor) -> None:
    x[:, 3] *= 1e6


def one_outlier(x: Tensor) -> None:
    x[7, 3] = 1e6


def duplicated(x: Tensor) -> None:
    x[:, 3] = x[:, 4]


# name: (the inputs, from correlated ones, what the report says of them)
INPUTS: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "one-sample": (lambda x: x[:1], "1 positions for 12 columns: the Gram matrix is singular"),
    "few": (lambda x: x[:5], "5 positions for 12 columns: the Gram matrix is singular"),
    "dead": (changed(dead), "2 of 12 inputs are always 0: their weights are free"),
    "zeros": (torch.zeros_like, "12 of 12 inputs are always 0: their weights are free"),
    "constant": (torch.ones_like, ""),
    "constant-column": (changed(constant_column), ""),
    "outlier-column": (changed(outlier_column), "1 inputs have more than 10000 times the median"),
    "one-outlier": (changed(one_outlier), "1 inputs have more than 10000 times the median"),
    "duplicated": (changed(duplicated), ""),
    "large": (lambda x: x * 1e15, ""),
    "small": (lambda x: x * 1e-15, ""),
    "tiny": (lambda x: x * 1e-20, ""),  # their squares are no normal numbers of float32
}
SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "best": {"preset": "best"},
    "all-starts": {"starts": ("nearest", "gptq", "adaround")},
    "asymmetric": {"symmetric": False},
    "tensor": {"granularity": "per_tensor"},
    "group": {"granularity": "per_group", "group_size": 4, "bits": 2},
    "no-bias": {"bias": "keep"},
    "undamped": {"damping": 0.0},
    "plain-gptq": {
        "starts": ("gptq",), "scale": "mse", "bias": "keep", "damping": 0.01, "refine": False,
        "search_steps": 0, "rounds": 0,
    },
    "paper": {"scale_free": False, "starts": ("adaround",)},
    "sampled": {"objective": "sampled"},
}  # fmt: skip
every_setting = pytest.mark.parametrize("name", SETTINGS)


def correlated(device: torch.device, cols: int = COLS) -> Tensor:
    return (torch.randn(60, cols) @ torch.randn(cols, cols) + 0.5).to(device)


def assert_sound(
    layer: nn.Module, result: LayerResult, x: Tensor, targets: Tensor | None = None
) -> None:
    assert bool(result.weight_q.isfinite().all())
    assert bool(((result.scale > 0) & result.scale.isfinite()).all())
    assert result.bias is None or bool(result.bias.isfinite().all())
    report = result.report
    assert all(0 <= loss < math.inf for loss in report.losses.values())
    assert all(math.isfinite(loss) for loss in report.relative.values())
    assert report.improvable_rows is None or report.improvable_rows >= 0
    losses = result_losses(layer, result, x, targets)
    before = losses_like(layer, result, nearest_on_grid(layer, result), x, targets)
    # Beyond what float32 can tell of outputs of this size.
    slack = 1e-10 * layer(x.float()).detach().double().square().mean()
    assert_no_row_is_worse(losses, before + slack)


@every_setting
@pytest.mark.parametrize("inputs", INPUTS)
@pytest.mark.parametrize("targets", [False, True], ids=["symmetric", "asymmetric"])
def test_inputs(device: torch.device, name: str, inputs: str, targets: bool) -> None:
    layer = nn.Linear(COLS, ROWS).to(device)
    if (name, inputs) == ("paper", "large"):
        pytest.skip("the paper's loss has the inputs' unit, and Adam squares its gradient")
    change, note = INPUTS[inputs]
    x = change(correlated(device))
    y = layer(x + 0.1 * x.roll(1, 1)).detach() if targets else None
    result = optimize_layer(layer, x, y, **{**FEW, **SETTINGS[name]})
    assert_sound(layer, result, x, y)
    notes = result.report.notes
    if note and name != "sampled":
        assert any(text.startswith(note) for text in notes)
    elif name != "sampled":
        assert notes == ()


@every_setting
@pytest.mark.parametrize("weights", ["zero-row", "zeros", "one-weight", "large", "small", "equal"])
def test_weights(device: torch.device, name: str, weights: str) -> None:
    if (name, weights) == ("paper", "large"):
        pytest.skip("the paper's loss has the weights' unit, and Adam squares its gradient")
    layer = nn.Linear(COLS, ROWS).to(device)
    with torch.no_grad():
        if weights == "zero-row":
            layer.weight[2] = 0
        elif weights == "zeros":
            layer.weight.zero_()
        elif weights == "one-weight":
            layer.weight[1:].zero_()
            layer.weight[:, 1:].zero_()
        elif weights == "equal":
            layer.weight.fill_(0.3)
        else:
            layer.weight.mul_(1e12 if weights == "large" else 1e-12)
    x = correlated(device)
    result = optimize_layer(layer, x, **{**FEW, **SETTINGS[name]})
    assert_sound(layer, result, x)
    if weights in ("zeros", "zero-row"):
        rows = slice(None) if weights == "zeros" else slice(2, 3)
        assert not result.weight_q[rows].any()


@every_setting
@pytest.mark.parametrize(("rows", "cols"), [(1, COLS), (ROWS, 1), (1, 1)])
def test_shapes(device: torch.device, name: str, rows: int, cols: int) -> None:
    settings = {**FEW, **SETTINGS[name]}
    if "group_size" in settings:
        settings["group_size"] = min(cols, settings["group_size"])
    layer, x = nn.Linear(cols, rows).to(device), correlated(device, cols)
    assert_sound(layer, optimize_layer(layer, x, **settings), x)


def test_convolution_with_a_dead_group(device: torch.device) -> None:
    layer = nn.Conv2d(4, 8, 3, groups=4, padding=1).to(device)
    x = torch.randn(6, 4, 5, 5).to(device)
    x[:, 2] = 0
    for preset in ("fast", "best"):
        result = optimize_layer(layer, x, preset=preset, **FEW)
        assert_sound(layer, result, x)
        assert result.report.notes == ("9 of 36 inputs are always 0: their weights are free",)


def test_free_weights_stay_beside_their_values(device: torch.device) -> None:
    """Damping keeps even them beside their weights: other data may bring them to life."""
    layer, x = nn.Linear(COLS, ROWS).to(device), changed(dead)(correlated(device))
    result = optimize_layer(layer, x, preset="fast", bits=4, scale="mse")
    away = (result.weight_q - layer.weight.detach()).abs() / result.scale
    assert float(away[:, [3, 7]].max()) <= 1 + 1e-4


@pytest.mark.parametrize("objective", ["gram", "sampled"])
@pytest.mark.parametrize("value", [1e60, 1e25], ids=["beyond-float32", "squares-beyond"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_values_too_large_for_float32(objective: str, value: float, asymmetric: bool) -> None:
    layer, x = nn.Linear(6, 4, dtype=torch.float64), torch.randn(8, 6, dtype=torch.float64)
    targets = torch.randn(8, 4, dtype=torch.float64) if asymmetric else None
    with pytest.raises(ValueError, match=r"^inputs.* of Linear.* must be so small that float32"):
        optimize_layer(layer, x * value, targets, objective=objective, steps=2)
    if asymmetric:
        with pytest.raises(ValueError, match=r"^inputs and targets of Linear.* must be so small"):
            optimize_layer(layer, x, value * targets, objective=objective, steps=2)
