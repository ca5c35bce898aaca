"""optimize_layer, for every kind of layer and both objectives: losses by their definition."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_data import WatchedStream
from torch import Tensor, nn
from torch.func import functional_call

from adaround_ext import AdaRoundConfig, LayerResult, choice, optimize_layer
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes
from adaround_ext.layers import matrix_layer
from adaround_ext.reference import dequantize

pytestmark = pytest.mark.usefixtures("one_thread")
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(24, 16), (300, 24)),
    "sequences": (lambda: nn.Linear(24, 16, bias=False), (20, 15, 24)),
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1, stride=2), (20, 3, 8, 8)),
    "depthwise": (lambda: nn.Conv2d(6, 12, 3, groups=6), (20, 6, 8, 8)),
    "transposed": (lambda: nn.ConvTranspose1d(8, 6, 6, groups=2, stride=2), (20, 8, 12)),
}
every_layer = pytest.mark.parametrize("name", LAYERS)
both_objectives = pytest.mark.parametrize("objective", ["gram", "sampled"])
QUICK: dict[str, Any] = {"steps": 120, "learning_rate": 0.1, "reg_weight": 1.0}


def make(name: str, device: torch.device | str = "cpu") -> tuple[nn.Module, Tensor]:
    """(layer, inputs that are correlated between features and neighbours, with an offset)."""
    kind, shape = LAYERS[name]
    channels = 1 if len(shape) > 2 and name != "sequences" else len(shape) - 1
    x = torch.randn(shape).movedim(channels, -1)
    mix = torch.randn(shape[channels], shape[channels]) + 0.3
    x = (x @ mix + 0.5).movedim(-1, channels)
    for dim in range(channels + 1, x.dim()):
        x = x + x.roll(1, dim) + x.roll(2, dim)
    return kind().to(device), x.to(device)


def row_losses(
    layer: nn.Module,
    weight_q: Tensor,
    x: Tensor,
    targets: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """The loss of each output channel by its definition, float64."""
    exact, x = copy.deepcopy(layer).double(), x.double()
    activation = activation or nn.Identity()
    with torch.no_grad():
        got = activation(functional_call(exact, {"weight": weight_q.double()}, (x,)))
        wanted = activation(exact(x) if targets is None else targets.double())
    channels = -1 if isinstance(layer, nn.Linear) else 1
    return (got - wanted).square().movedim(channels, 0).flatten(1).mean(1)


def stored(layer: nn.Module, codes: Tensor, grid: QuantGrid | LayerResult) -> Tensor:
    """scale (codes - zero_point) in the shape and dtype of the layer's weight."""
    matrix = dequantize(codes, grid.scale, grid.zero_point, torch.float32)
    return matrix_layer(layer).weight_from_matrix(matrix).to(layer.get_parameter("weight").dtype)


def nearest(layer: nn.Module, **settings: Any) -> Tensor:
    """The weight rounded to nearest on the grid that optimize_layer takes."""
    weight = matrix_layer(layer).weight_matrix().float()
    grid = make_grid(weight, AdaRoundConfig(**settings))
    return stored(layer, nearest_codes(weight, grid), grid)


def assert_no_row_is_worse(one: Tensor, other: Tensor) -> None:
    assert bool((one <= other * (1 + 1e-4) + 1e-6 * other.mean()).all())


@every_layer
@both_objectives
@pytest.mark.parametrize("bits", [2, 4])
def test_better_than_nearest(device: torch.device, name: str, objective: str, bits: int) -> None:
    layer, x = make(name, device)
    result = optimize_layer(layer, x, bits=bits, objective=objective, **QUICK)
    losses = row_losses(layer, result.weight_q, x)
    before = row_losses(layer, nearest(layer, bits=bits), x)
    assert_no_row_is_worse(losses, before)
    assert float(losses.sum()) < 0.9 * float(before.sum())
    assert result.report.losses["final"] == pytest.approx(float(losses.sum()), rel=1e-3)
    assert result.report.losses["nearest"] == pytest.approx(float(before.sum()), rel=1e-3)
    assert result.report.objective == objective


@every_layer
def test_refinement_never_hurts(device: torch.device, name: str) -> None:
    layer, x = make(name, device)
    losses = {}
    for refine in (False, True):
        result = optimize_layer(layer, x, bits=3, refine=refine, **QUICK)
        losses[refine] = row_losses(layer, result.weight_q, x)
        assert refine or result.report.losses["final"] <= result.report.losses["hard"]
    assert_no_row_is_worse(losses[True], losses[False])
    assert float(losses[True].sum()) < float(losses[False].sum())


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(
    "settings",
    [
        {"symmetric": False},
        {"granularity": "per_tensor", "bits": 8},
        {"granularity": "per_group", "group_size": 3, "scale_dtype": torch.float16},
    ],
    ids=str,
)
def test_result_is_consistent(
    device: torch.device, name: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    layer, x = make(name, device)
    layer.to(dtype)
    result = optimize_layer(layer, x.to(dtype), steps=30, **settings)
    weight = layer.get_parameter("weight")
    assert (result.weight_q.dtype, result.weight_q.shape) == (dtype, weight.shape)
    assert result.weight_q.device == result.codes.device == result.scale.device == device
    assert result.weight_q.is_contiguous()
    assert not result.weight_q.requires_grad
    view = matrix_layer(layer)
    assert result.codes.shape == (view.rows, view.cols)
    assert result.codes.dtype == (torch.int8 if settings.get("symmetric", True) else torch.uint8)
    assert (result.scale.dtype, result.zero_point.dtype) == (torch.float32, torch.int32)
    assert result.bias is None
    assert torch.equal(result.weight_q, stored(layer, result.codes, result))
    wanted = make_grid(view.weight_matrix().float(), AdaRoundConfig(**settings))
    assert torch.equal(result.scale, wanted.scale)
    assert torch.equal(result.zero_point, wanted.zero_point)
    before = row_losses(layer, nearest(layer, **settings), x.to(dtype))
    assert_no_row_is_worse(row_losses(layer, result.weight_q, x.to(dtype)), before)
    result.apply_(layer)
    assert torch.equal(layer.get_parameter("weight"), result.weight_q)


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_steps_is_nearest(device: torch.device, symmetric: bool) -> None:
    """Ties included: weights half-way between two codes."""
    layer, x = make("linear", device)
    settings: dict[str, Any] = {"symmetric": symmetric, "scale": torch.full((16, 1), 0.125)}
    with torch.no_grad():
        layer.weight.mul_(32).round_().div_(16)  # multiples of half a step
    result = optimize_layer(layer, x, steps=0, refine=False, **settings)
    assert torch.equal(result.weight_q, nearest(layer, **settings))
    assert (result.report.steps, result.report.flipped) == (0, 0)
    assert result.report.losses["hard"] == result.report.losses["nearest"]
    assert optimize_layer(layer, x, steps=0, **settings).report.flipped > 0


@every_layer
@both_objectives
def test_same_seed_same_codes(device: torch.device, name: str, objective: str) -> None:
    layer, x = make(name, device)
    torch.manual_seed(1)
    first = optimize_layer(layer, x, objective=objective, **QUICK)
    torch.manual_seed(2)
    again = optimize_layer(layer, list(x.split(7)), objective=objective, **QUICK)
    assert torch.equal(first.codes, again.codes)
    assert first.report.losses == again.report.losses
    other = optimize_layer(layer, x, objective=objective, seed=5, **QUICK)
    assert torch.equal(first.codes, other.codes) == (objective == "gram")


# MKL's own product of 5 to 11 rows depends on the threads.
@pytest.mark.parametrize("rows", [3, 6, 10, 16, 100])
def test_same_codes_for_one_thread_and_two(device: torch.device, rows: int) -> None:
    x = (torch.randn(1000, 512) @ torch.randn(512, 512)).to(device)
    got = []
    layers = [nn.Linear(512, rows, device=device) for _ in range(4)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got.append([optimize_layer(layer, x, objective="gram", **QUICK) for layer in layers])
    for one, two in zip(*got, strict=True):
        assert torch.equal(one.codes, two.codes)
        assert one.report.losses == two.report.losses


@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Conv2d(3, 4, 3), (32, 3, 8, 8)), (nn.Linear(3, 4), (16, 512, 3))],
    ids=["conv", "linear"],
)
def test_gram_objective_streams(layer: nn.Module, shape: tuple[int, ...]) -> None:
    source = WatchedStream(20, *shape)
    report = optimize_layer(layer, source, steps=1).report
    assert report.objective == "gram"
    assert "stream" in report.reason
    assert source.most <= 3


def test_auto_weighs_the_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "_ALWAYS_FINE", 0.0)
    layer, x = make("conv")
    for may_cost, objective in ((1e30, "gram"), (1e-30, "sampled")):
        monkeypatch.setattr(choice, "_GRAM_MAY_COST", may_cost)
        report = optimize_layer(layer, x, steps=1).report
        assert report.objective == objective
        assert "flop" in report.reason
        assert optimize_layer(layer, x, steps=1, objective="gram").report.reason == "as set"


@both_objectives
@pytest.mark.parametrize("name", ["linear", "conv", "depthwise"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_layers_that_share_inputs(
    device: torch.device, name: str, objective: str, asymmetric: bool
) -> None:
    layer, x = make(name, device)
    layers = [layer, *(make(name, device)[0] for _ in range(2))]
    targets = [item(x).detach() * 1.2**i for i, item in enumerate(layers)] if asymmetric else None
    settings: dict[str, Any] = {"bits": 3, "objective": objective, **QUICK}
    results = optimize_layer(layers, x, None if targets is None else tuple(targets), **settings)
    assert isinstance(results, list)
    for i, item in enumerate(layers):
        y = None if targets is None else targets[i]
        alone = optimize_layer(item, x, y, **settings)
        assert torch.equal(results[i].scale, alone.scale)
        assert results[i].report.energy == pytest.approx(alone.report.energy, rel=1e-5)
        losses = (results[i].report.losses, alone.report.losses)
        assert losses[0]["nearest"] == pytest.approx(losses[1]["nearest"], rel=1e-5)
        assert losses[0]["final"] == pytest.approx(losses[1]["final"], rel=0.02)
        got = row_losses(item, results[i].weight_q, x, y)
        assert results[i].report.losses["final"] == pytest.approx(float(got.sum()), rel=1e-3)


@both_objectives
@pytest.mark.parametrize("name", ["linear", "sequences", "conv"])
def test_targets_recover_what_the_inputs_lost(
    device: torch.device, name: str, objective: str
) -> None:
    layer, x = make(name, device)
    targets = layer(x).detach()
    lossy = 0.8 * x.round()  # what a badly quantized layer before this one might give
    aware, unaware = (
        optimize_layer(layer, lossy, y, bits=3, objective=objective, **QUICK)
        for y in (targets, None)
    )
    losses = [row_losses(layer, r.weight_q, lossy, targets) for r in (aware, unaware)]
    assert float(losses[0].sum()) < 0.6 * float(losses[1].sum())
    assert aware.report.losses["final"] == pytest.approx(float(losses[0].sum()), rel=1e-3)
    assert_no_row_is_worse(losses[0], row_losses(layer, nearest(layer, bits=3), lossy, targets))


@every_layer
@pytest.mark.parametrize("activation", ["relu", nn.GELU()], ids=str)
def test_activation_is_part_of_the_loss(
    device: torch.device, name: str, activation: str | nn.Module
) -> None:
    layer, x = make(name, device)
    result = optimize_layer(layer, x, bits=3, activation=activation, **QUICK)
    function = torch.relu if isinstance(activation, str) else activation
    losses = row_losses(layer, result.weight_q, x, activation=function)
    before = row_losses(layer, nearest(layer, bits=3), x, activation=function)
    assert_no_row_is_worse(losses, before)
    assert float(losses.sum()) < 0.9 * float(before.sum())
    assert result.report.losses["final"] == pytest.approx(float(losses.sum()), rel=1e-3)
    assert result.report.objective == "sampled"
    assert "activation" in result.report.reason


@every_layer
@both_objectives
def test_scale_free(device: torch.device, name: str, objective: str) -> None:
    """Other units of the inputs and weights, by powers of two, change no code."""
    layer, x = make(name, device)
    layer.bias = None
    first = optimize_layer(layer, x, bits=3, objective=objective, **QUICK)
    layer.weight.data.mul_(4)
    second = optimize_layer(layer, 8 * x, bits=3, objective=objective, **QUICK)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale * 4, second.scale)
    assert second.report.losses["final"] == pytest.approx(1024 * first.report.losses["final"])


def test_report(device: torch.device) -> None:
    layer, x = make("conv", device)
    report = (result := optimize_layer(layer, x, bits=3, **QUICK)).report
    moved = result.weight_q != nearest(layer, bits=3)
    assert report.flipped == pytest.approx(float(moved.double().mean()))
    at = matrix_layer(layer).weight_matrix() / result.scale
    clipped = float(((at < -4) | (at > 3)).double().mean())
    assert 0 < report.clipped == pytest.approx(clipped)
    used = (report.bits, report.steps, report.learning_rate, report.reg_weight)
    assert used == (3, *QUICK.values())
    assert report.seconds["total"] == pytest.approx(sum(report.seconds.values()) / 2)
    layer.bias = None
    energy = row_losses(layer, 0 * layer.weight, x).sum()
    assert report.energy == pytest.approx(float(energy), rel=1e-4)
    assert report.losses["nearest"] < min(report.losses["floor"], report.losses["ceil"])
    assert report.losses["final"] < report.losses["nearest"] < report.losses["stochastic"]
