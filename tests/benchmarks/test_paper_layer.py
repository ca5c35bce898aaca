"""The experiments on one layer: their mathematics, and each at a tiny size."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext.grid import nearest_codes

pytest.importorskip("sklearn")  # the digits
pytest.importorskip("matplotlib")
from benchmarks.paper import adaround, objectives, pages, schemes, taylor, workload
from benchmarks.paper.experiment import Claim, Experiment, Values
from benchmarks.paper.hessian import Expansion, expansion, gram, local
from benchmarks.paper.qubo import Qubo, cross_entropy_method, search, stochastic
from benchmarks.paper.workload import Images, Layer, Scorer

pytestmark = pytest.mark.usefixtures("one_thread")


# The mathematics


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.relu = nn.ReLU()
        self.last = nn.Linear(4 * 9, 5)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.last(self.relu(self.conv(x)).flatten(1))
        return y


@pytest.fixture
def layer() -> Layer:
    torch.manual_seed(0)
    return Layer(Small().double().requires_grad_(False), "conv")


@pytest.fixture
def data() -> Images:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(20, 2, 3, 3, generator=generator, dtype=torch.float64)
    return Images(images, torch.randint(5, (20,), generator=generator))


@pytest.fixture
def task(layer: Layer, data: Images) -> Expansion:
    return expansion(layer, data)


def _loss(layer: Layer, data: Images, weight: Tensor) -> Tensor:
    return F.cross_entropy(layer.logits(weight.view_as(layer.weight), data.images), data.labels)


def test_hessian_is_that_of_autograd(layer: Layer, data: Images, task: Expansion) -> None:
    flat = layer.weight.flatten().requires_grad_()
    (gradient,) = torch.autograd.grad(_loss(layer, data, flat), flat)
    torch.testing.assert_close(task.gradient, gradient)
    hessian = torch.autograd.functional.hessian(lambda w: _loss(layer, data, w), flat)
    torch.testing.assert_close(task.hessian, hessian)


def test_forms_are_the_changes_of_loss_and_outputs(
    layer: Layer, data: Images, task: Expansion
) -> None:
    change = 1e-4 * torch.randn(layer.weight.shape, dtype=torch.float64)
    flat = change.view(1, -1)
    up, down, same = (_loss(layer, data, layer.weight + k * change) for k in (1, -1, 0))
    expected = float(task.quadratic(flat))
    assert float(up + down - 2 * same) / 2 == pytest.approx(expected, rel=1e-4)
    assert float(up - down) / 2 == pytest.approx(float(flat @ task.gradient), rel=1e-4)

    outputs = F.conv2d(data.images, change.view_as(layer.matrix.weight), padding=1)
    found = float(local(gram(layer, data.images), flat))
    assert found == pytest.approx(float(outputs.square().sum()) / len(outputs))


def test_parts_of_the_quadratic_form(layer: Layer, task: Expansion) -> None:
    rows, cols = layer.weight.shape
    one_weight = torch.zeros(1, rows * cols, dtype=torch.float64)
    one_weight[0, cols + 3] = 0.1
    one_row = torch.zeros(rows, cols, dtype=torch.float64)
    one_row[2] = torch.linspace(-1, 1, cols)
    full, within, alone = task.quadratic, task.within_rows, task.diagonal
    torch.testing.assert_close(alone(one_weight), full(one_weight))
    torch.testing.assert_close(within(one_row.view(1, -1), rows), full(one_row.view(1, -1)))
    assert not torch.isclose(alone(one_row.view(1, -1)), full(one_row.view(1, -1)), rtol=0.1)
    parts = torch.stack([row[None] * (torch.arange(rows) == i)[:, None] for i, row in
                         enumerate(torch.randn(rows, cols, dtype=torch.float64))])  # fmt: skip
    total = within(parts.sum(0).view(1, -1), rows)
    torch.testing.assert_close(total, full(parts.flatten(1)).sum()[None])


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 8, generator=torch.Generator().manual_seed(2))


@pytest.fixture
def qubo(weight: Tensor) -> Qubo:
    x = torch.randn(12, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return Qubo.of(weight, _grid(weight), x.T @ x)


def _grid(weight: Tensor):
    layer = nn.Linear(*reversed(weight.shape))
    with torch.no_grad():
        layer.weight.copy_(weight)
    return Layer(layer, "").grid(2)


def _least(qubo: Qubo) -> Tensor:
    rows, n = qubo.down.shape
    every = torch.tensor(list(itertools.product((False, True), repeat=n)))
    return qubo.values(every[:, None].expand(-1, rows, n)).amin(0)


def test_solvers_find_the_least(qubo: Qubo, weight: Tensor) -> None:
    start = qubo.nearest(weight, _grid(weight))
    least, at_start = _least(qubo), qubo.values(start)
    assert (least < at_start).any()
    found = search(qubo, stochastic(qubo, start, 8, 0), 300, 0)
    torch.testing.assert_close(qubo.values(found), least)
    drawn = cross_entropy_method(qubo, 0, samples=300)
    assert (qubo.values(drawn) <= at_start).all()
    torch.testing.assert_close(qubo.values(drawn).sum(), least.sum(), rtol=0.05, atol=0.0)


def test_the_cross_entropy_method_ends_when_it_is_certain(
    qubo: Qubo, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (qubo.above == qubo.below).any()  # of which it cannot become certain by drawing
    draws: list[Tensor] = []
    values = Qubo.values
    monkeypatch.setattr(Qubo, "values", lambda self, b: draws.append(b) or values(self, b))
    cross_entropy_method(qubo, 0, samples=300)
    assert len(draws) < 60


def test_codes_of_a_qubo(qubo: Qubo, weight: Tensor) -> None:
    grid = _grid(weight)
    start = qubo.nearest(weight, grid)
    assert torch.equal(qubo.codes(start), nearest_codes(weight, grid))
    assert (qubo.above == qubo.below).any()  # beyond the grid's ends there is no choice
    error = grid.scale * qubo.codes(start) - weight
    expected = ((error.double() @ qubo.gram) * error).sum(1)
    torch.testing.assert_close(qubo.values(start), expected)


def test_a_single_row_joins_all_weights(layer: Layer, task: Expansion) -> None:
    grid = Layer(layer.model.float(), "conv").grid(3)
    one = layer.weight.float().view(1, -1)
    qubo = Qubo.of(one, grid, task.hessian)
    start = qubo.nearest(one, grid)
    found = search(qubo, stochastic(qubo, start, 4, 0), 500, 0)
    change = grid.scale * qubo.codes(found) - one
    torch.testing.assert_close(2 * task.quadratic(change), qubo.values(found), rtol=1e-4, atol=0.0)
    assert qubo.values(found) < 0.8 * qubo.values(start)


# The experiments


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaround, "PAPER", dataclasses.replace(adaround.PAPER, steps=60))
    monkeypatch.setattr(workload, "CALIBRATION_IMAGES", 128)


def _shown(experiment: Experiment, values: Values, folder: Path) -> list[Claim]:
    """All that follows from the values; a picture is the same twice."""
    from benchmarks.paper import pictures

    values = json.loads(json.dumps(values))
    for table in experiment.tables(values):
        assert {len(row) for row in table.rows} == {len(table.header)}
        assert pages.markdown(table, "en") != pages.markdown(table, "zh")
    for name in ("a.svg", "b.svg"):
        pictures.save(experiment, values, folder / name)
    assert (folder / "a.svg").read_bytes() == (folder / "b.svg").read_bytes()
    return experiment.claims(values)


def test_schemes(tmp_path: Path) -> None:
    run = schemes.run("separable", 3, 0, draws=4, shifts=0, epochs=3)
    scores = run["scores"]
    assert list(scores) == ["full", "nearest", "ceil", "floor", "paper", "fast", "balanced", "best",
                            "stochastic", "stochastic best"]  # fmt: skip
    assert scores["full"]["error"] == 0 < scores["balanced"]["error"] < scores["nearest"]["error"]
    assert scores["paper"]["error"] < scores["nearest"]["error"]
    assert min(scores[name]["error"] for name in ("ceil", "floor")) > scores["nearest"]["error"]
    assert len(set(run["stochastic_losses"])) == 4
    assert scores["stochastic best"]["accuracy"] == max(run["stochastic_accuracies"])
    claims = _shown(schemes.EXPERIMENT, {"draws": 4, "runs": [run]}, tmp_path)
    lost, above, _, _ = claims
    expected = max(scores[name]["accuracy"] for name in ("ceil", "floor"))
    assert lost.effects == [pytest.approx(1 - expected / scores["nearest"]["accuracy"])]
    better = [one > scores["nearest"]["accuracy"] for one in run["stochastic_accuracies"]]
    assert above.effects == [sum(better) / 4]


def test_taylor(tmp_path: Path) -> None:
    run = taylor.run(4, 0, draws=12, epochs=3)
    points = run["points"]
    assert {len(values) for values in points.values()} == {12}
    assert run["correlations"]["gradient"]["spearman_loss"] > 0.6
    assert all(run["nearest"]["diagonal"] < value for value in points["diagonal"])
    ratios = [q / loss for q, loss in zip(points["gradient"], points["loss"], strict=True)]
    assert 0.5 < sorted(ratios)[6] < 2  # the expansion has the loss's size, not only its order
    run["bits"] = taylor.CLAIMED
    values = {"draws": 12, "network": "separable", "runs": [run]}
    monotone, _ = _shown(taylor.EXPERIMENT, values, tmp_path)
    assert monotone.effects == [-run["correlations"]["quadratic"]["spearman_accuracy"]]


def test_correlations() -> None:
    x = torch.arange(5.0)
    found = taylor.correlations(x, x**3, -x)
    assert found["spearman_loss"] == pytest.approx(1)
    assert 0.8 < found["pearson_loss"] < 0.99
    assert found["spearman_accuracy"] == pytest.approx(-1)


def test_objectives(tmp_path: Path) -> None:
    problem = objectives.Problem("conv", 3, samples=100, starts=4, steps=300)
    run = objectives.run(problem, 0, shifts=0, epochs=3)
    methods = run["methods"]
    assert list(methods) == list(objectives.METHODS)
    nearest = methods.pop("nearest")
    for name, found in methods.items():
        objective = "task" if name.startswith("task") else "local"
        assert found[objective] < 0.9 * nearest[objective]
    # No row has a better choice of two codes than our search finds, nor the relaxation's.
    others = [found["local"] for name, found in methods.items() if name != "local search"]
    assert methods["local search"]["local"] <= min(others) * (1 + 1e-6)
    assert methods["task both"]["task"] <= methods["task cem"]["task"]
    run["methods"]["nearest"] = nearest
    values = {"network": "separable", "problems": [dataclasses.asdict(problem)], "runs": [run]}
    _shown(objectives.EXPERIMENT, values, tmp_path)


def test_scorer(layer: Layer, data: Images) -> None:
    score: Scorer = layer.scorer(data)
    kept = score(layer.weight)
    assert kept.error == 0 and kept.loss == pytest.approx(float(_loss(layer, data, layer.weight)))
    other = score(-layer.weight)
    assert other.error > 0.1 and other.loss != kept.loss
    assert torch.equal(layer.matrix.weight_matrix(), layer.weight)  # the model stays as it is
