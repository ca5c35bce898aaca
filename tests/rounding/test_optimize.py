"""optimize_layer, for every kind of layer and both objectives: losses by their definition."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, optimize_layer
from adaround_ext.grid import make_grid
from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.rounding import optimize
from tests.layers.test_inputs import WatchedStream
from tests.support.problems import (
    assert_no_row_is_worse,
    every_layer,
    losses_like,
    make_layer,
    nearest,
    nearest_on_grid,
    result_losses,
    row_losses,
    stored,
)

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
both_objectives = pytest.mark.parametrize("objective", ["gram", "sampled"])
# Of AdaRound itself; presets and other starts: test_presets.py.
QUICK: dict[str, Any] = {"steps": 120, "learning_rate": 0.1, "reg_weight": 1.0}
QUICK_GRAM: dict[str, Any] = {"starts": ("adaround",), "search_steps": 50, "scale_candidates": 3}


@every_layer
@both_objectives
@pytest.mark.parametrize("bits", [2, 4])
def test_better_than_nearest(device: torch.device, name: str, objective: str, bits: int) -> None:
    layer, x = make_layer(name, device)
    result = optimize_layer(layer, x, bits=bits, objective=objective, **QUICK, **QUICK_GRAM)
    losses = result_losses(layer, result, x)
    scale = "mse" if objective == "sampled" else "gram"
    before = losses_like(layer, result, nearest(layer, bits=bits, scale=scale), x)
    assert_no_row_is_worse(losses, before)
    assert (result.bias is None) == (layer.bias is None or objective == "sampled")
    assert float(losses.sum()) < 0.9 * float(before.sum())
    assert result.report.losses["final"] == pytest.approx(float(losses.sum()), rel=1e-3)
    assert result.report.losses["nearest"] == pytest.approx(float(before.sum()), rel=1e-3)
    assert result.report.objective == objective


@every_layer
def test_refinement_never_hurts(device: torch.device, name: str) -> None:
    """On one grid and undamped, where the descent lowers the loss that is reported."""
    layer, x = make_layer(name, device)
    losses = {}
    settings = {**QUICK, **QUICK_GRAM, "bits": 3, "scale": "mse", "damping": 0.0}
    for refine in (False, True):
        result = optimize_layer(layer, x, refine=refine, **settings)
        losses[refine] = result_losses(layer, result, x)
        assert refine or result.report.losses["final"] <= result.report.losses["hard"]
    assert_no_row_is_worse(losses[True], losses[False])
    assert float(losses[True].sum()) < float(losses[False].sum())


@every_layer
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("scale", ["gram", "mse"])
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
    device: torch.device, name: str, dtype: torch.dtype, settings: dict[str, Any], scale: str
) -> None:
    layer, x = make_layer(name, device)
    layer, x, settings = layer.to(dtype), x.to(dtype), {**settings, "scale": scale}
    result = optimize_layer(layer, x, steps=30, **QUICK_GRAM, **settings)
    weight = layer.get_parameter("weight")
    assert (result.weight_q.dtype, result.weight_q.shape) == (dtype, weight.shape)
    assert result.weight_q.device == result.codes.device == result.scale.device == device
    assert result.weight_q.is_contiguous()
    assert not result.weight_q.requires_grad
    view = matrix_layer(layer)
    assert result.codes.shape == (view.rows, view.cols)
    assert result.codes.dtype == (torch.int8 if settings.get("symmetric", True) else torch.uint8)
    assert (result.scale.dtype, result.zero_point.dtype) == (torch.float32, torch.int32)
    assert (result.bias is None) == (layer.bias is None)
    assert torch.equal(result.weight_q, stored(layer, result.codes, result))
    wanted = make_grid(view.weight_matrix().float(), AdaRoundConfig(**settings))
    assert result.scale.shape == result.zero_point.shape == wanted.scale.shape
    scale_dtype = settings.get("scale_dtype", torch.float32)
    assert torch.equal(result.scale, result.scale.to(scale_dtype).float())
    if scale == "mse":
        assert torch.equal(result.scale, wanted.scale)
        assert torch.equal(result.zero_point, wanted.zero_point)
    losses = result_losses(layer, result, x)
    for rounded in (nearest_on_grid(layer, result), nearest(layer, **settings)):
        before = losses_like(layer, result, rounded, x)
        if len(result.scale) == view.rows:
            assert_no_row_is_worse(losses, before)
        assert float(losses.sum()) <= float(before.sum()) * (1 + 1e-4)
    result.apply_(layer)
    assert torch.equal(layer.get_parameter("weight"), result.weight_q)
    assert result.bias is None or torch.equal(layer.get_parameter("bias"), result.bias)


@pytest.mark.parametrize("symmetric", [True, False])
def test_no_steps_is_nearest(device: torch.device, symmetric: bool) -> None:
    """Ties included: weights half-way between two codes."""
    layer, x = make_layer("linear", device)
    settings: dict[str, Any] = {"symmetric": symmetric, "scale": torch.full((16, 1), 0.125)}
    with torch.no_grad():
        layer.weight.mul_(32).round_().div_(16)  # multiples of half a step
    settings |= {"steps": 0, "starts": ("adaround",)}
    result = optimize_layer(layer, x, refine=False, **settings)
    assert torch.equal(result.weight_q, nearest(layer, **settings))
    assert (result.report.steps, result.report.flipped) == (0, 0)
    hard, rel = result.report.losses["hard"], 1e-3 if device.type == "cuda" else 0  # TF32 there
    assert hard == pytest.approx(result.report.losses["nearest"], rel=rel)
    assert optimize_layer(layer, x, **settings).report.flipped > 0


@every_layer
@both_objectives
def test_same_seed_same_codes(device: torch.device, name: str, objective: str) -> None:
    layer, x = make_layer(name, device)
    torch.manual_seed(1)
    first = optimize_layer(layer, x, objective=objective, **QUICK, **QUICK_GRAM)
    torch.manual_seed(2)
    again = optimize_layer(layer, list(x.split(7)), objective=objective, **QUICK, **QUICK_GRAM)
    assert torch.equal(first.codes, again.codes)
    assert first.report.losses == again.report.losses
    other = optimize_layer(layer, x, objective=objective, seed=5, **QUICK, **QUICK_GRAM)
    drawn = first.report.losses["soft"] != other.report.losses["soft"]
    assert drawn == (objective == "sampled")


@every_layer
def test_without_search_nothing_is_drawn(device: torch.device, name: str) -> None:
    layer, x = make_layer(name, device)
    settings = {**QUICK, **QUICK_GRAM, "search_steps": 0}
    one, other = (optimize_layer(layer, x, seed=seed, **settings) for seed in (0, 5))
    assert torch.equal(one.codes, other.codes)


# MKL's own product of 5 to 11 rows depends on the threads.
@pytest.mark.parametrize("rows", [3, 6, 10, 16, 100])
def test_same_codes_for_one_thread_and_two(device: torch.device, rows: int) -> None:
    x = (torch.randn(1000, 512) @ torch.randn(512, 512)).to(device)
    got = []
    layers = [nn.Linear(512, rows, device=device) for _ in range(4)]
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got.append(
            [optimize_layer(layer, x, objective="gram", **QUICK, **QUICK_GRAM) for layer in layers]
        )
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
    assert source.most <= 3


class Taken(Exception):
    """The objective that was about to be collected for."""


@pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
@pytest.mark.parametrize(
    ("cols", "shape"),
    [
        (1536, (10_178, 1536)),
        (1536, (262_144, 1536)),
        (4096, (65_536, 4096)),
        (14_336, (512, 14_336)),
        (14_336, (16, 2048, 14_336)),
        (14_336, (14_336,)),
    ],
    ids=str,
)
def test_no_price_leaves_the_exact_objective(
    monkeypatch: pytest.MonkeyPatch, preset: str, cols: int, shape: tuple[int, ...]
) -> None:
    """Sampling is for activation functions, and for those who ask for it."""

    def take(name: str) -> Callable[..., Any]:
        def problems(*_: object) -> Any:
            raise Taken(name)

        return problems

    for name in ("gram", "sampled"):
        monkeypatch.setattr(optimize, f"_{name}_problems", take(name))
    layer = nn.Linear(cols, 64)
    x = torch.zeros(()).expand(shape)  # takes no memory
    for settings, objective in (
        ({}, "gram"),
        ({"objective": "sampled"}, "sampled"),
        ({"activation": "gelu"}, "sampled"),
    ):
        with pytest.raises(Taken, match=f"^{objective}$"):
            optimize_layer(layer, x, preset=preset, **settings)


def test_the_reason_for_the_objective() -> None:
    layer, x = make_layer("conv")
    for settings, objective, reason in (
        ({}, "gram", "no activation function, so the Gram form is exact"),
        ({"activation": "relu"}, "sampled", "the activation function is part of the loss"),
        ({"objective": "gram"}, "gram", "as set"),
        ({"objective": "sampled"}, "sampled", "as set"),
    ):
        report = optimize_layer(layer, x, steps=1, **settings).report
        assert (report.objective, report.reason) == (objective, reason)


SHAPES: dict[str, Callable[[Tensor], Any]] = {
    "sequences": lambda x: x.view(20, 30, -1),
    "few-long-sequences": lambda x: x.view(2, 300, -1),
    "four-dimensions": lambda x: x.view(4, 5, 30, -1),
    "one-sequence": lambda x: x[None],
    "batches": lambda x: list(x.split(70)),
    "batches-of-sequences": lambda x: list(x.view(20, 30, -1).split(3)),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "settings",
    [
        {"preset": "fast"},
        {"preset": "balanced"},
        {"preset": "best"},
        {"preset": "best", "granularity": "per_group", "group_size": 8, "symmetric": False},
        {"bias": "create"},
        {"positions": 5},
        {"activation": "relu"},
        {"objective": "sampled"},
    ],
    ids=str,
)
@pytest.mark.parametrize("asymmetric", [False, True])
def test_the_shape_of_the_inputs_changes_nothing(
    device: torch.device, shape: str, settings: dict[str, Any], asymmetric: bool
) -> None:
    """Codes, bias, search and certificate: tokens are tokens, however they are stacked."""
    torch.manual_seed(0)
    layer = nn.Linear(16, 8).to(device)
    x = torch.randn(600, 16).to(device).cumsum(1)
    y = layer(1.1 * x).detach() if asymmetric else None
    few = {"steps": 30, "search_steps": 40, "bits": 3, **settings}
    flat = optimize_layer(layer, x, y, **few)
    change = SHAPES[shape]
    other = optimize_layer(layer, change(x), None if y is None else change(y), **few)
    assert torch.equal(flat.codes, other.codes)
    assert torch.equal(flat.scale, other.scale)
    assert (flat.bias is None) == (other.bias is None)
    if flat.bias is not None:
        assert torch.equal(flat.bias, other.bias)
    one, two = flat.report, other.report
    assert (one.objective, one.reason, one.notes) == (two.objective, two.reason, two.notes)
    assert (one.losses, one.improvable_rows) == (two.losses, two.improvable_rows)


@both_objectives
@pytest.mark.parametrize("name", ["linear", "conv", "depthwise"])
@pytest.mark.parametrize("asymmetric", [False, True])
def test_layers_that_share_inputs(
    device: torch.device, name: str, objective: str, asymmetric: bool
) -> None:
    layer, x = make_layer(name, device)
    layers = [layer, *(make_layer(name, device)[0] for _ in range(2))]
    targets = [item(x).detach() * 1.2**i for i, item in enumerate(layers)] if asymmetric else None
    settings: dict[str, Any] = {"bits": 3, "objective": objective, **QUICK, **QUICK_GRAM}
    results = optimize_layer(layers, x, None if targets is None else tuple(targets), **settings)
    assert isinstance(results, list)
    for i, item in enumerate(layers):
        y = None if targets is None else targets[i]
        alone = optimize_layer(item, x, y, **settings)
        if device.type == "cpu":  # on CUDA a product of fewer rows may be another
            assert torch.equal(results[i].scale, alone.scale)
        assert results[i].report.energy == pytest.approx(alone.report.energy, rel=1e-5)
        losses = (results[i].report.losses, alone.report.losses)
        assert losses[0]["nearest"] == pytest.approx(losses[1]["nearest"], rel=1e-5)
        assert losses[0]["final"] == pytest.approx(losses[1]["final"], rel=0.02)
        got = result_losses(item, results[i], x, y)
        assert results[i].report.losses["final"] == pytest.approx(float(got.sum()), rel=1e-3)


@both_objectives
@pytest.mark.parametrize("name", ["linear", "sequences", "conv"])
def test_targets_recover_what_the_inputs_lost(
    device: torch.device, name: str, objective: str
) -> None:
    layer, x = make_layer(name, device)
    targets = layer(x).detach()
    lossy = 0.8 * x.round()  # what a badly quantized layer before this one might give
    aware, unaware = (
        optimize_layer(layer, lossy, y, bits=3, objective=objective, **QUICK, **QUICK_GRAM)
        for y in (targets, None)
    )
    losses = [result_losses(layer, r, lossy, targets) for r in (aware, unaware)]
    assert float(losses[0].sum()) < 0.6 * float(losses[1].sum())
    assert aware.report.losses["final"] == pytest.approx(float(losses[0].sum()), rel=1e-3)
    rounded = nearest_on_grid(layer, aware)
    assert_no_row_is_worse(losses[0], losses_like(layer, aware, rounded, lossy, targets))


@every_layer
@pytest.mark.parametrize("activation", ["relu", nn.GELU()], ids=str)
def test_activation_is_part_of_the_loss(
    device: torch.device, name: str, activation: str | nn.Module
) -> None:
    layer, x = make_layer(name, device)
    result = optimize_layer(layer, x, bits=3, activation=activation, **QUICK, **QUICK_GRAM)
    function = torch.relu if isinstance(activation, str) else activation
    losses = row_losses(layer, result.weight_q, x, activation=function)
    wanted = nearest(layer, bits=3, scale="mse")
    before = row_losses(layer, wanted, x, activation=function)
    assert_no_row_is_worse(losses, before)
    assert float(losses.sum()) < 0.9 * float(before.sum())
    assert result.report.losses["final"] == pytest.approx(float(losses.sum()), rel=1e-3)
    assert result.report.objective == "sampled"
    assert "activation" in result.report.reason


@every_layer
@both_objectives
def test_scale_free(device: torch.device, name: str, objective: str) -> None:
    """Other units of the inputs and weights, by powers of two, change no code."""
    layer, x = make_layer(name, device)
    layer.bias = None
    first = optimize_layer(layer, x, bits=3, objective=objective, **QUICK, **QUICK_GRAM)
    layer.weight.data.mul_(4)
    second = optimize_layer(layer, 8 * x, bits=3, objective=objective, **QUICK, **QUICK_GRAM)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale * 4, second.scale)
    assert second.report.losses["final"] == pytest.approx(1024 * first.report.losses["final"])


def test_report(device: torch.device) -> None:
    layer, x = make_layer("conv", device)
    result = optimize_layer(layer, x, bits=3, **QUICK, **QUICK_GRAM)
    report = result.report
    moved = result.weight_q != nearest_on_grid(layer, result)
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
