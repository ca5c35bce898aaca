"""Presets and starts: what every result promises, by raw data and stored weights."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, LayerResult, optimize_layer
from adaround_ext.presets import settings
from adaround_ext.rounding import gram_solver, search
from tests.support.problems import (
    LAYERS,
    assert_no_row_is_worse,
    losses_like,
    make_layer,
    nearest,
    nearest_on_grid,
    result_losses,
    stored,
)

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
PRESETS = ["fast", "balanced", "best"]
STARTS = ["nearest", "gptq", "adaround"]
every_preset = pytest.mark.parametrize("preset", PRESETS)
every_layer = pytest.mark.parametrize("name", LAYERS)
RULES = {"nearest", "floor", "ceil", "stochastic", "final"}
# The presets' own steps are for layers of another size.
FEW: dict[str, Any] = {"steps": 40, "search_steps": 60, "scale_candidates": 5, "bits": 3}
GRIDS: dict[str, dict[str, Any]] = {
    "channel": {},
    "channel-asymmetric": {"symmetric": False},
    "group": {"granularity": "per_group", "group_size": 3},
    "group-asymmetric": {"granularity": "per_group", "group_size": 3, "symmetric": False},
    "tensor": {"granularity": "per_tensor"},
    "tensor-asymmetric": {"granularity": "per_tensor", "symmetric": False},
}
every_grid = pytest.mark.parametrize("grid", GRIDS)


def assert_promises(
    layer: nn.Module, result: LayerResult, x: Tensor, starts: set[str], **settings: Any
) -> None:
    report = result.report
    assert bool(result.weight_q.isfinite().all())
    assert all(math.isfinite(loss) for loss in report.losses.values())
    annealed = {"soft", "hard"} if "adaround" in starts else set()
    kept = {"nearest", "final"} if report.preset == "fast" else RULES | starts
    assert set(report.losses) == kept | annealed
    assert set(report.starts) == starts
    assert sum(report.starts.values()) == pytest.approx(1)
    assert report.notes == ()
    assert 0 <= report.fallback_rows <= len(result.codes)

    losses = result_losses(layer, result, x)
    assert report.losses["final"] == pytest.approx(float(losses.sum()), rel=1e-3)
    start = losses_like(layer, result, nearest(layer, **settings), x)
    assert report.losses["nearest"] == pytest.approx(float(start.sum()), rel=1e-3)
    assert float(losses.sum()) < float(start.sum())
    assert_no_row_is_worse(losses, losses_like(layer, result, nearest_on_grid(layer, result), x))
    if len(result.scale) == len(result.codes):
        assert_no_row_is_worse(losses, start)


@every_preset
@every_layer
@every_grid
def test_preset(device: torch.device, preset: str, name: str, grid: str) -> None:
    layer, x = make_layer(name, device)
    settings = {**FEW, **GRIDS[grid]}
    result = optimize_layer(layer, x, preset=preset, **settings)
    assert result.report.preset == preset
    assert result.report.damping > 0
    assert_promises(layer, result, x, set(result.report.starts), **settings)
    # A row that went back to nearest need not be at a minimum of the damped loss.
    assert result.report.improvable_rows <= result.report.fallback_rows


@every_preset
def test_preset_as_it_is(device: torch.device, preset: str) -> None:
    layer, x = make_layer("linear", device)
    result = optimize_layer(layer, x, preset=preset, bits=3)
    assert_promises(layer, result, x, set(result.report.starts), bits=3)
    assert result.report.improvable_rows <= result.report.fallback_rows
    assert result.report.losses["final"] < 0.7 * result.report.losses["nearest"]


@pytest.mark.parametrize("start", STARTS)
@every_layer
@pytest.mark.parametrize("scale", ["gram", "mse", "min_max"])
@pytest.mark.parametrize("refine", [True, False])
def test_each_start_alone(
    device: torch.device, start: str, name: str, scale: str, refine: bool
) -> None:
    layer, x = make_layer(name, device)
    settings = {**FEW, "scale": scale, "refine": refine, "damping": 0.0}
    if start == "nearest" and scale != "gram" and not refine:
        settings["bits"] = 2
        result = optimize_layer(layer, x, starts=(start,), **settings)
        assert torch.equal(result.weight_q, nearest(layer, **settings))
        return
    result = optimize_layer(layer, x, starts=(start,), **settings)
    assert result.report.starts == {start: 1.0}
    assert_promises(layer, result, x, {start}, **settings)
    if refine:  # undamped, so that what is compared with nearest is what was descended
        assert result.report.improvable_rows <= result.report.fallback_rows


@every_layer
def test_best_of_starts_is_no_worse_than_each(device: torch.device, name: str) -> None:
    """Row by row, where the damped loss that decides is the loss that is reported."""
    layer, x = make_layer(name, device)
    settings = {**FEW, "scale": "mse", "damping": 0.0}
    both = optimize_layer(layer, x, starts=tuple(STARTS), **settings)
    assert_promises(layer, both, x, set(STARTS), **settings)
    losses = result_losses(layer, both, x)
    for start in STARTS:
        alone = optimize_layer(layer, x, starts=(start,), **settings)
        assert_no_row_is_worse(losses, result_losses(layer, alone, x))
        assert both.report.losses[start] == pytest.approx(alone.report.losses[start], rel=1e-5)
    winners = [share for share in both.report.starts.values() if share > 0]
    assert len(winners) > 1 or name == "depthwise"  # rows of 9 weights: all starts end the same


@every_layer
def test_refined_codes_are_at_a_minimum(device: torch.device, name: str) -> None:
    """The certificate, by trying each change of one code in float64 on the raw data."""
    layer, x = make_layer(name, device)
    settings = {**FEW, "damping": 0.0, "bias": "keep"}
    result = optimize_layer(layer, x, **settings)
    assert result.report.improvable_rows == 0
    losses = result_losses(layer, result, x)
    rng = torch.Generator().manual_seed(0)
    for column in torch.randperm(result.codes.shape[1], generator=rng)[:8].tolist():
        for step in (-1, 1):
            codes = result.codes.clone()
            codes[:, column] = (codes[:, column] + step).clamp(-4, 3)
            weight = stored(layer, codes, result)
            assert_no_row_is_worse(losses, losses_like(layer, result, weight, x))


@every_preset
def test_given_scales_stay(device: torch.device, preset: str) -> None:
    layer, x = make_layer("linear", device)
    for scale in (torch.full((16, 1), 0.06), torch.full((1, 1), 0.06)):
        result = optimize_layer(layer, x, preset=preset, scale=scale.to(device), **FEW)
        assert torch.equal(result.scale.cpu(), scale)
        assert_promises(layer, result, x, set(result.report.starts), scale=scale, bits=3)


@every_grid
def test_all_at_once_with_targets(device: torch.device, grid: str) -> None:
    """Lossy inputs: nearest on the grid that came out is worse in every row."""
    layer, x = make_layer("linear", device)
    targets, lossy = layer(x).detach(), 0.8 * x.round()
    result = optimize_layer(layer, lossy, targets, preset="best", **FEW, **GRIDS[grid])
    losses = result_losses(layer, result, lossy, targets)
    assert result.report.losses["final"] == pytest.approx(float(losses.sum()), rel=1e-3)
    rounded = nearest_on_grid(layer, result)
    assert_no_row_is_worse(losses, losses_like(layer, result, rounded, lossy, targets))
    assert float(losses.sum()) < result.report.losses["nearest"]


@pytest.mark.parametrize(("preset", "most"), [("fast", 0), ("balanced", 2000), ("best", 10_000)])
def test_short_rows_are_searched_for_fewer_steps(preset: Any, most: int) -> None:
    found = [settings(AdaRoundConfig(preset=preset), "gram", n) for n in (1, 64, 128, 10_000)]
    assert [own.search_steps for own in found] == [-(-most // 128), most // 2, most, most]
    given = AdaRoundConfig(preset=preset, search_steps=77)
    assert settings(given, "gram", 1).search_steps == 77


@pytest.mark.parametrize("seed", [0, 7, 2**63 - 2])
def test_each_round_searches_on_other_walks(
    device: torch.device, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same walk from where the last one ended, on the same scales, would end there again."""
    drawn: list[int] = []

    def search_all(*arguments: Any) -> Any:
        drawn.append(arguments[-1])
        return search.search_all(*arguments)

    monkeypatch.setattr(gram_solver, "search_all", search_all)
    layer, x = make_layer("linear", device)
    result = optimize_layer(layer, x, seed=seed, rounds=3, **FEW)
    assert drawn == [(seed + turn) % 2**63 for turn in range(4)]
    again = optimize_layer(layer, x, seed=seed, rounds=3, **FEW)
    assert torch.equal(result.codes, again.codes)


def test_the_report_has_the_steps_that_were_made(device: torch.device) -> None:
    layer = nn.Linear(16, 4).to(device)
    result = optimize_layer(layer, torch.randn(100, 16).to(device), steps=10)
    assert result.report.search_steps == 250
