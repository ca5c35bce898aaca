"""Small tasks at once have the results that they have one after the other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, LayerResult, optimize_layer, quantize_
from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.linalg.tiles import TileSize
from adaround_ext.model import solve_units
from adaround_ext.rounding import gram_problem, stacked
from adaround_ext.rounding.gram_problem import GramProblem, gram_problems
from adaround_ext.rounding.solution import Quadratic
from adaround_ext.rounding.solve import solve
from adaround_ext.statistics.moments import GramStatistics
from tests.support.problems import every_layer, make_layer

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {"preset": "fast"},
    "balanced": {},
    "asymmetric": {"symmetric": False, "bits": 2},
    "groups": {"granularity": "per_group", "group_size": 3},
    "tensor": {"granularity": "per_tensor"},
    "unrefined": {"refine": False},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS.keys())
FEW: dict[str, Any] = {"steps": 20, "search_steps": 40, "bits": 3}


def solved_with(
    monkeypatch: pytest.MonkeyPatch, weights: int, layer: nn.Module, x: Tensor, **settings: Any
) -> LayerResult:
    """The result where as many weights are worked on at once."""
    monkeypatch.setattr(stacked, "WEIGHTS_AT_ONCE", TileSize(weights, weights))
    return optimize_layer(layer, x, **{**FEW, **settings})


def assert_same_losses(one: LayerResult, other: LayerResult) -> None:
    """Up to the last bits of a product, which may decide between codes that are as good."""
    for loss, tolerance in (("nearest", 1e-4), ("final", 0.1)):
        expected = pytest.approx(other.report.losses[loss], rel=tolerance)
        assert one.report.losses[loss] == expected, loss


@every_setting
@every_layer
def test_the_results_are_those_of_one_after_the_other(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, name: str, settings: dict[str, Any]
) -> None:
    layer, x = make_layer(name, device)
    own = layer.weight.numel()
    alone = solved_with(monkeypatch, 1, layer, x, **settings)
    for weights in (2 * own, 4 * own + 1, 10**9):
        result = solved_with(monkeypatch, weights, layer, x, **settings)
        if device.type == "cpu" and matrix_layer(layer).groups == 1:
            for field in ("codes", "scale", "zero_point", "weight_q"):
                assert torch.equal(getattr(result, field), getattr(alone, field)), field
        assert_same_losses(result, alone)


@pytest.mark.parametrize("groups", [1, 3])
def test_put_together_and_taken_apart(device: torch.device, groups: int) -> None:
    gram = torch.eye(5).expand(groups, 5, 5).contiguous().to(device)
    quadratic = Quadratic(gram, torch.randn(6, 5).to(device))
    three = stacked.StackedProblem(quadratic, None, 3)
    values = [torch.randn(6, 2).to(device) for _ in range(3)]
    joined = three._join(values)
    for one, other in zip(values, three._split(joined), strict=True):
        assert torch.equal(one, other)
    rows = joined.view(groups, 3, 6 // groups, 2)
    assert torch.equal(rows[-1, 1, -1], values[1][-1])
    assert torch.equal(three.quadratic.grouped(joined)[-1, -1], values[-1][-1])


def test_as_many_as_there_is_room_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stacked, "WEIGHTS_AT_ONCE", TileSize(cpu=100, cuda=1))
    quadratic = Quadratic(torch.eye(5)[None], torch.randn(6, 5))
    sizes = [len(part) for part, _ in stacked.stacks(range(8), quadratic)]
    assert sizes == [3, 3, 2]
    monkeypatch.setattr(stacked, "WEIGHTS_AT_ONCE", TileSize(cpu=1, cuda=1))
    assert [len(part) for part, _ in stacked.stacks(range(2), quadratic)] == [1, 1]


def posed(name: str, device: torch.device, config: AdaRoundConfig, targets: bool) -> GramProblem:
    layer, x = make_layer(name, device)
    view = matrix_layer(layer)
    statistics = GramStatistics([view], None, 0)
    y = layer(x) * 1.1 + 0.1
    with torch.no_grad():
        statistics.add(view.samples(x), (view.output_samples(y),) if targets else None)
        statistics.finish()
        (problem,) = gram_problems([view], statistics, config, "as set", 1.0)
    return problem


@every_setting
@every_layer
def test_alike_problems_as_one(device: torch.device, name: str, settings: dict[str, Any]) -> None:
    """One of them has targets, which the others lack."""
    config = AdaRoundConfig(**{**FEW, **settings})
    problems = [posed(name, device, config, targets=index == 1) for index in range(3)]
    results = solve(problems, config)
    assert len(results) == 3
    for problem, result in zip(problems, results, strict=True):
        (alone,) = solve([problem], config)
        assert result.report.samples == alone.report.samples
        assert result.report.seconds["statistics"] == pytest.approx(3.0, abs=0.5)
        assert_same_losses(result, alone)
        assert result.report.energy == pytest.approx(alone.report.energy, rel=1e-4)
        if result.bias is not None:
            assert result.bias.shape == alone.bias.shape


def test_alike_layers_of_a_model(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU those of one shape are one problem, where their inputs are known at once."""
    model = nn.Sequential(*[nn.Linear(8, n) for n in (8, 8, 12)], nn.Linear(12, 8), nn.Linear(8, 8))
    model = model.to(device)
    calls = []

    def counted(problems: Any, *args: Any) -> Any:
        calls.append(len(problems))
        return solve(problems, *args)

    monkeypatch.setattr(solve_units, "solve", counted)
    settings: dict[str, Any] = {"preset": "fast", "mode": "parallel", "progress": False}
    report = quantize_(model, [torch.randn(50, 8).to(device)], **settings)
    assert [entry.name for entry in report.layers] == ["0", "1", "2", "3", "4"]
    assert calls == ([3, 1, 1] if device.type == "cuda" else [1] * 5)


@pytest.mark.parametrize("targets", [False, True])
def test_rows_in_parts(
    device: torch.device, targets: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Large problems are solved some rows after the other, to the same result."""
    layers = [nn.Linear(48, rows).to(device) for rows in (50, 30)]
    x = torch.randn(600, 48).to(device)
    y = tuple((layer(x) * 1.1).detach() for layer in layers) if targets else None
    settings: dict[str, Any] = {"steps": 20, "search_steps": 20, "bits": 3}
    whole = optimize_layer(layers, x, y, **settings)
    calls: list[int] = []
    solve_rows = GramProblem._solve_rows

    def counted(problem: GramProblem, config: AdaRoundConfig) -> Any:
        calls.append(len(problem.weight))
        return solve_rows(problem, config)

    monkeypatch.setattr(GramProblem, "_solve_rows", counted)
    monkeypatch.setattr(gram_problem, "MAX_WEIGHTS", 48 * 35)  # 32 rows: whole tiles of products
    parts = optimize_layer(layers, x, y, **settings)
    assert calls == [32, 32, 16]
    for one, other in zip(whole, parts, strict=True):
        if device.type == "cpu":
            assert torch.equal(one.codes, other.codes) and torch.equal(one.scale, other.scale)
        for name, loss in one.report.losses.items():
            if name != "stochastic" or device.type == "cpu":  # a GPU draws by the number of rows
                rel = 1e-6 if device.type == "cpu" else 0.05
                assert other.report.losses[name] == pytest.approx(loss, rel=rel)
        seconds = dict(other.report.seconds)
        assert seconds.pop("total") == pytest.approx(sum(seconds.values()))
