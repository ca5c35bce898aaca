"""Same seed, same result: for any threads, cuts of the data, company and unit of the inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import LayerResult, optimize_layer
from tests.support.helpers import threads

FEW: dict[str, Any] = {"steps": 30, "search_steps": 60, "scale_candidates": 4, "bits": 3}
every_preset = pytest.mark.parametrize("preset", ["fast", "balanced", "best"])
asymmetric = pytest.mark.parametrize("targets", [False, True], ids=["symmetric", "asymmetric"])
GRIDS: dict[str, dict[str, Any]] = {
    "channel": {},
    "group": {"granularity": "per_group", "group_size": 3, "symmetric": False},
    "tensor": {"granularity": "per_tensor"},
}
every_grid = pytest.mark.parametrize("grid", GRIDS)


def assert_same(one: LayerResult, other: LayerResult) -> None:
    for name in ("codes", "scale", "zero_point", "weight_q", "bias"):
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None), name
        assert a is None or torch.equal(a, b), name
    assert one.report.losses == other.report.losses
    assert one.report.starts == other.report.starts


def make(
    device: torch.device, rows: int, cols: int, samples: int = 400
) -> tuple[nn.Module, Tensor, Tensor]:
    """(layer, correlated inputs with an offset, targets that the layer misses)."""
    layer = nn.Linear(cols, rows).to(device)
    x = (torch.randn(samples, cols) @ torch.randn(cols, cols) + 0.5).to(device)
    return layer, x, (layer(x * 1.05) + 0.1).detach()


@pytest.mark.usefixtures("one_thread")
@every_preset
@every_grid
@asymmetric
def test_twice(device: torch.device, preset: str, grid: str, targets: bool) -> None:
    layer, x, y = make(device, 13, 27)
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)  # the caller's random numbers play no part
        settings = {**FEW, **GRIDS[grid]}
        results.append(optimize_layer(layer, x, y if targets else None, preset=preset, **settings))
    assert_same(*results)


# MKL's own product of 5 to 11 rows depends on the threads; odd numbers leave blocks half full.
@every_preset
@every_grid
@asymmetric
@pytest.mark.parametrize(("rows", "cols"), [(1, 33), (10, 192), (37, 321)])
def test_one_thread_and_two(
    device: torch.device, preset: str, grid: str, targets: bool, rows: int, cols: int
) -> None:
    layer, x, y = make(device, rows, cols, samples=1000)
    results = []
    for count in (1, 2):
        with threads(count):
            settings = {**FEW, **GRIDS[grid]}
            if "group_size" in settings:
                settings["group_size"] = cols // 3
            results.append(
                optimize_layer(layer, x, y if targets else None, preset=preset, **settings)
            )
    assert_same(*results)


def test_many_groups_for_one_thread_and_two(device: torch.device) -> None:
    """The refit of scales solves a system as large as a row has groups."""
    layer, x, _ = make(device, 9, 258)
    results = []
    for count in (1, 2):
        with threads(count):
            settings = {**FEW, **GRIDS["group"]}
            results.append(optimize_layer(layer, x, preset="fast", **settings))
    assert_same(*results)


@every_preset
@pytest.mark.parametrize("kind", ["conv", "grouped", "one-input"])
@asymmetric
def test_convolutions_for_one_thread_and_two(
    device: torch.device, preset: str, kind: str, targets: bool
) -> None:
    layer = {
        "conv": lambda: nn.Conv2d(5, 9, 3, padding=1),
        "grouped": lambda: nn.Conv2d(6, 9, 3, groups=3),
        "one-input": lambda: nn.Conv2d(1, 5, 1),
    }[kind]().to(device)
    x = torch.randn(70, layer.in_channels, 24, 23).to(device) + 0.5
    y = (layer(x) * 1.1 + 0.1).detach() if targets else None
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(optimize_layer(layer, x, y, preset=preset, **FEW))
    assert_same(*results)


@pytest.mark.parametrize("products", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [3, 6, 16, 50])
def test_annealing_for_one_thread_and_two(device: torch.device, products: str, rows: int) -> None:
    layer, x, _ = make(device, rows, 257, samples=1000)
    settings = {**FEW, "starts": ("adaround",), "refine": False, "scale": "mse"}
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(optimize_layer(layer, x, products=products, **settings))
    assert_same(*results)


@pytest.mark.usefixtures("one_thread")
@every_preset
@asymmetric
def test_however_the_data_is_cut(device: torch.device, preset: str, targets: bool) -> None:
    layer, x, y = make(device, 13, 27)
    settings = {"preset": preset, **FEW}
    whole = optimize_layer(layer, x, y if targets else None, **settings)
    for sizes in ([1, 399], [150, 250], [57] * 7 + [1]):
        parts = list(y.split(sizes)) if targets else None
        assert_same(whole, optimize_layer(layer, list(x.split(sizes)), parts, **settings))


@pytest.mark.usefixtures("one_thread")
@every_preset
@every_grid
@asymmetric
def test_alone_or_with_others(device: torch.device, preset: str, grid: str, targets: bool) -> None:
    """q, k and v share their inputs: each has the codes that it would have alone."""
    layers = [nn.Linear(33, count).to(device) for count in (16, 7, 20, 1)]
    _, x, _ = make(device, 1, 33)
    wanted = tuple((layer(x) * 1.1 + 0.1).detach() for layer in layers)
    settings = {"preset": preset, **FEW, **GRIDS[grid]}
    if "group_size" in settings:
        settings["group_size"] = 11
    together = optimize_layer(layers, x, wanted if targets else None, **settings)
    for layer, y, result in zip(layers, wanted, together, strict=True):
        alone = optimize_layer(layer, x, y if targets else None, **settings)
        if device.type == "cuda":  # a product of fewer rows may be another of its library's
            losses = (own.report.losses["final"] for own in (result, alone))
            assert next(losses) == pytest.approx(next(losses), rel=0.05)
            continue
        for name in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(result, name), getattr(alone, name)), name
        torch.testing.assert_close(result.bias, alone.bias, rtol=1e-6, atol=1e-7)


@pytest.mark.usefixtures("one_thread")
@every_preset
@every_grid
@pytest.mark.parametrize("factor", [2.0**-20, 8.0, 2.0**30])
def test_the_unit_of_the_inputs_does_not_matter(
    device: torch.device, preset: str, grid: str, factor: float
) -> None:
    layer, x, _ = make(device, 13, 27)
    settings = {"preset": preset, **FEW, **GRIDS[grid]}
    first, second = (optimize_layer(layer, unit * x, **settings) for unit in (1.0, factor))
    for name in ("codes", "scale", "zero_point"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    final = first.report.losses["final"] * factor**2
    assert second.report.losses["final"] == pytest.approx(final, rel=1e-5)


@pytest.mark.usefixtures("one_thread")
@every_preset
def test_the_unit_of_the_weights_does_not_matter(device: torch.device, preset: str) -> None:
    layer, x, _ = make(device, 13, 27)
    first = optimize_layer(layer, x, preset=preset, **FEW)
    with torch.no_grad():
        layer.weight *= 2.0**10
    second = optimize_layer(layer, x, preset=preset, **FEW)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.scale * 2.0**10, second.scale)
