"""The relaxations that the paper compares, and the walk that puts them on every layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import AdaRoundConfig, reference
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes
from adaround_ext.ops import dequantize
from adaround_ext.reference import GAMMA, ZETA, ReferenceConfig
from benchmarks.paper import relaxed, walk
from benchmarks.paper.relaxed import AnnealedSigmoid, RectifiedSigmoid, Sigmoid, StraightThrough

UP_OR_DOWN = (RectifiedSigmoid, Sigmoid, AnnealedSigmoid)
KINDS = (*UP_OR_DOWN, StraightThrough)
CONFIG = AdaRoundConfig(bits=3, granularity="per_tensor", scale="mse")


@pytest.fixture
def weight() -> Tensor:
    return torch.randn(6, 10, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def grid(weight: Tensor) -> QuantGrid:
    return make_grid(weight, CONFIG)


def inputs(samples: int = 64) -> Tensor:
    """Correlated, so that decisions depend on each other."""
    generator = torch.Generator().manual_seed(1)
    mixing = torch.randn(10, 10, generator=generator)
    return torch.randn(samples, 10, generator=generator) @ mixing


def derivatives(v: Tensor, scale: Tensor, inside: Tensor) -> dict[type, Tensor]:
    """d weight_q / d v by hand, where the codes lie inside the grid."""
    sigmoid = torch.sigmoid(v)
    slope = sigmoid * (1 - sigmoid)
    h = sigmoid * (ZETA - GAMMA) + GAMMA
    rectified = torch.where((h > 0) & (h < 1), (ZETA - GAMMA) * slope, 0.0)
    cold = torch.sigmoid(v / AnnealedSigmoid.last_temperature)
    annealed = cold * (1 - cold) / AnnealedSigmoid.last_temperature
    found = {
        RectifiedSigmoid: rectified,
        Sigmoid: slope,
        AnnealedSigmoid: annealed,
        StraightThrough: torch.ones_like(v),
    }
    return {kind: scale * value * inside for kind, value in found.items()}


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_by_hand(kind: type[relaxed.Relaxation], weight: Tensor, grid: QuantGrid) -> None:
    relaxation = kind(weight.double(), grid)
    v = relaxation.v
    with torch.no_grad():
        if kind is not StraightThrough:
            v.copy_(torch.linspace(-4, 4, v.numel()).view_as(v))
    (found,) = torch.autograd.grad(relaxation.weight_q(1.0).sum(), v)
    if isinstance(relaxation, StraightThrough):
        codes = v.round()
    else:
        codes = relaxation.below + relaxation.h(1.0)
    inside = (codes > grid.qmin) & (codes < grid.qmax)
    expected = derivatives(v.detach(), relaxation.scale, inside)[kind]
    edge = (codes == grid.qmin) | (codes == grid.qmax)
    torch.testing.assert_close(found[~edge], expected[~edge].double(), rtol=1e-9, atol=1e-12)
    assert int((found != 0).sum()) > 10
    assert bool((found[(codes < grid.qmin) | (codes > grid.qmax)] == 0).all())


@pytest.mark.parametrize("kind", UP_OR_DOWN)
def test_starts_at_the_weight(
    kind: type[relaxed.UpOrDown], weight: Tensor, grid: QuantGrid
) -> None:
    inside = (weight / grid.scale > grid.qmin) & (weight / grid.scale < grid.qmax)
    assert int(inside.sum()) > 40
    found = kind(weight, grid).weight_q(0.0)
    torch.testing.assert_close(found[inside], weight[inside], rtol=0, atol=2e-4)


def test_straight_through_starts_at_nearest_and_may_go_far(weight: Tensor, grid: QuantGrid) -> None:
    relaxation = StraightThrough(weight, grid)
    assert torch.equal(relaxation.codes(), nearest_codes(weight, grid).float())
    with torch.no_grad():
        relaxation.v += 2
    moved = (nearest_codes(weight, grid).float() + 2).clamp(max=grid.qmax)
    assert torch.equal(relaxation.codes(), moved)
    torch.testing.assert_close(relaxation.weight_q(0.5), moved * grid.scale)


@pytest.mark.parametrize("kind", KINDS)
def test_codes_are_whole_and_in_the_grid(
    kind: type[relaxed.Relaxation], weight: Tensor, grid: QuantGrid
) -> None:
    x, nearest = inputs(), nearest_codes(weight, grid)
    settings = ReferenceConfig(steps=300, learning_rate=3e-2)
    codes = relaxed.fit(kind(weight, grid), x, F.linear(x, weight), F.linear, settings).codes
    assert torch.equal(codes, codes.round())
    assert grid.qmin <= int(codes.min()) and int(codes.max()) <= grid.qmax
    assert not torch.equal(codes, nearest.float())
    if kind is not StraightThrough:
        below = torch.floor(weight / grid.scale)
        both = torch.stack([below, below + 1]).clamp(grid.qmin, grid.qmax)
        assert bool((codes == both).any(0).all())
        assert loss(codes, weight, grid) < 0.9 * loss(nearest, weight, grid)


def loss(codes: Tensor, weight: Tensor, grid: QuantGrid) -> float:
    error = dequantize(codes.to(torch.int8), grid.scale, grid.zero_point) - weight
    return float(F.linear(inputs(), error).square().sum())


def test_rectified_sigmoid_is_the_reference(weight: Tensor, grid: QuantGrid) -> None:
    x = inputs()
    settings = ReferenceConfig(steps=60, learning_rate=3e-2, seed=3)
    relaxation = RectifiedSigmoid(weight, grid)
    found = relaxed.fit(relaxation, x, F.linear(x, weight), F.linear, settings)
    expected = reference.optimize(
        weight, grid.scale, grid.zero_point, grid.qmin, grid.qmax, x, F.linear(x, weight), F.linear,
        settings,
    )  # fmt: skip
    assert torch.equal(found.codes, expected.float())
    assert not torch.equal(found.codes, nearest_codes(weight, grid).float())


def test_an_annealed_sigmoid_hardens(weight: Tensor, grid: QuantGrid) -> None:
    relaxation = AnnealedSigmoid(weight, grid)
    distances = [
        float((relaxation.h(p) - relaxation.h(p).round()).abs().mean().detach())
        for p in (0, 0.5, 1)
    ]
    assert distances[0] > distances[1] > distances[2]
    assert relaxation.regularizer(2.0) is None
    assert Sigmoid(weight, grid).regularizer(2.0) is not None


def model_and_images() -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(16, 3)
    )
    return model.eval(), torch.rand(20, 1, 6, 6)


def test_a_walk_that_changes_nothing() -> None:
    model, images = model_and_images()
    before = model(images)
    tasks: list[walk.LayerTask] = []

    def solve(task: walk.LayerTask) -> tuple[Tensor, None]:
        tasks.append(task)
        return task.weight, None

    walk.quantize_each_(model, images, CONFIG, solve)
    assert torch.equal(model(images), before)
    assert [task.name for task in tasks] == ["0", "2", "4"]
    assert [task.config.activation for task in tasks] == ["relu", None, None]
    for task in tasks:
        expected = task.activated(task.targets)
        torch.testing.assert_close(task.forward(task.inputs, task.weight), expected)


def test_inputs_and_targets_of_a_walk() -> None:
    model, images = model_and_images()
    exact = model[:2](images)
    outputs = model[2](exact)
    seen: dict[str, walk.LayerTask] = {}

    def halved(task: walk.LayerTask) -> tuple[Tensor, Tensor | None]:
        seen[task.name] = task
        return task.weight / 2, task.matrix.bias

    walk.quantize_each_(model, images, CONFIG, halved)
    assert not torch.equal(seen["2"].inputs, exact)
    assert torch.equal(seen["2"].inputs, model[:2](images))
    torch.testing.assert_close(seen["2"].targets, outputs)


def test_only_the_first_layer_changes() -> None:
    model, images = model_and_images()
    others = [model[2].weight.clone(), model[4].weight.clone()]
    first = model[0].weight.detach().clone()

    def up(task: walk.LayerTask, grid: QuantGrid) -> Tensor:
        return torch.full_like(task.weight, grid.qmax)

    walk.quantize_each_(model, images, CONFIG, walk.rounded(up), only_first=True)
    assert torch.equal(model[2].weight, others[0]) and torch.equal(model[4].weight, others[1])
    scale = make_grid(first.flatten(1), CONFIG).scale
    torch.testing.assert_close(model[0].weight, torch.full_like(first, 3 * float(scale)))
