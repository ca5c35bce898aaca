"""Ranges of activations: known distributions, squared errors, and how the data is cut."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from adaround_ext.activations.histogram import Histogram
from adaround_ext.activations.quantizer import ActivationConfig, ActivationQuantizer
from adaround_ext.activations.ranges import RangeObserver

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]


def observed(*batches: Tensor, **settings: Any) -> tuple[float, float]:
    observer = RangeObserver(ActivationConfig(**settings), "here")
    for batch in batches:
        observer.observe(batch)
    return observer.range()


def squared_error(x: Tensor, ends: tuple[float, float], **settings: Any) -> float:
    quantizer = ActivationQuantizer(ActivationConfig(**settings))
    quantizer.set_range(*ends)
    return float((quantizer(x).double() - x.double()).square().sum())


def samples(name: str) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    normal = torch.randn(40_000, generator=generator)
    even = torch.rand(40_000, generator=generator)
    return {
        "normal": normal,
        "uniform": even * 3 - 1,
        "relu": normal.relu(),
        "relu6": (normal * 5).clamp(0, 6),
        "hardtanh": normal.clamp(-1, 1),
        "gelu": functional.gelu(normal * 2),
        "laplace": (even - 0.5).sign() * -(1 - 2 * (even - 0.5).abs()).clamp(min=1e-6).log(),
        "lognormal": (normal * 2).exp(),
        "negative": -even,
        "outlier": torch.cat([normal, torch.tensor([300.0])]),
        "constant": torch.full((100,), 0.3),
        "negative constant": torch.full((100,), -7.0),
        "two values": (even > 0.5).float() * 0.7,
        "three values": (even * 3).floor() - 1,
        "tiny": normal * 1e-40,
        "huge": normal * 1e37,
    }[name]


NAMES = [
    "normal", "uniform", "relu", "relu6", "hardtanh", "gelu", "laplace", "lognormal", "negative",
    "outlier", "constant", "negative constant", "two values", "three values", "tiny", "huge",
]  # fmt: skip


def test_min_max_is_exact() -> None:
    x = samples("gelu")
    assert observed(x, ranges="min_max") == (float(x.min()), float(x.max()))
    batches = x[torch.randperm(len(x))].split(1234)
    assert observed(*batches, ranges="min_max") == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bits", [3, 4, 8, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_is_never_worse_than_min_max(name: str, bits: int, symmetric: bool) -> None:
    x = samples(name)
    grid: dict[str, Any] = {"bits": bits, "symmetric": symmetric}
    full = squared_error(x, observed(x, ranges="min_max", **grid), **grid)
    best = squared_error(x, observed(x, ranges="mse", **grid), **grid)
    assert best <= full


@pytest.mark.parametrize("name", ["normal", "relu", "gelu", "laplace", "lognormal", "uniform"])
@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("symmetric", [False, True])
def test_mse_finds_the_least_error(name: str, bits: int, symmetric: bool) -> None:
    """No range of a fine grid around it, tried on the values themselves, is better by 1 %."""
    x = samples(name)
    grid: dict[str, Any] = {"bits": bits, "symmetric": symmetric}
    low, high = observed(x, **grid)
    error = squared_error(x, (low, high), **grid)
    shares = [0.7, 0.85, 0.95, 1.05, 1.2, 1.5]
    pairs = [(a, a) for a in shares] + [(1.0, a) for a in shares] + [(a, 1.0) for a in shares]
    for a, b in pairs:
        assert error <= 1.01 * squared_error(x, (low * a, high * b), **grid)


def test_mse_of_a_normal_distribution() -> None:
    """The optimal step of a uniform quantizer of 16 levels is 0.3352 (Max, 1960, table II)."""
    x = torch.randn(400_000, generator=torch.Generator().manual_seed(0))
    low, high = observed(x, bits=4, symmetric=False)
    assert (high - low) / 15 == pytest.approx(0.3352, rel=0.03)
    error = squared_error(x, (low, high), bits=4) / len(x)
    assert error == pytest.approx(0.01154, rel=0.05)  # of levels that need not include 0


def test_uniform_values_need_the_whole_range() -> None:
    x = torch.linspace(0, 1, 100_001)
    low, high = observed(x, bits=8)
    assert low == 0.0
    assert high == pytest.approx(1.0, abs=0.004)
    step = high / 255
    error = squared_error(x, (low, high)) / len(x)
    assert error == pytest.approx(step**2 / 12, rel=0.02)


def test_one_sided_values_use_every_code() -> None:
    for ranges in ("mse", "min_max", "percentile"):
        quantizer = ActivationQuantizer(ActivationConfig(bits=4, ranges=ranges))
        for x, zero_point in ((samples("relu"), 0), (-samples("relu"), 15)):
            quantizer.set_range(*observed(x, bits=4, ranges=ranges))
            assert int(quantizer.zero_point) == zero_point


@pytest.mark.parametrize("percentile", [50.0, 90.0, 99.0, 99.9])
def test_percentile(percentile: float) -> None:
    """Between the neighbours in the sorted values of where the share is reached."""
    x = samples("laplace")
    share = percentile / 100
    width = float(x.abs().max()) / 4096

    def reached(values: Tensor, share: float, bound: float) -> bool:
        rank = round(share * len(values))
        around = values.sort().values[rank - 2 : rank + 2]
        return float(around[0]) - width <= bound <= float(around[-1]) + width

    low, high = observed(x, ranges="percentile", percentile=percentile)
    assert reached(x, (1 - share) / 2, low)
    assert reached(x, (1 + share) / 2, high)
    low, high = observed(x, ranges="percentile", percentile=percentile, symmetric=True)
    assert low == -high
    assert reached(x.abs(), share, high)


def test_percentile_of_all_is_min_max() -> None:
    for name in NAMES:
        x = samples(name)
        expected = observed(x, ranges="min_max")
        assert observed(x, ranges="percentile", percentile=100) == expected
        size = max(-expected[0], expected[1])
        symmetric = observed(x, ranges="percentile", percentile=100, symmetric=True)
        assert symmetric == (-size, size)


def test_percentile_clips_outliers() -> None:
    x = torch.cat([torch.linspace(-1, 1, 9999), torch.tensor([50.0])])
    low, high = observed(x, ranges="percentile", percentile=99.9)
    assert (low, high) == pytest.approx((-1, 1), abs=50 / 4096)


def test_percentile_in_a_heap() -> None:
    """Most are 0 and 0.7 is the greatest: both are exact."""
    x = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.7])
    assert observed(x, ranges="percentile", percentile=50.0) == (0.0, 0.0)
    low, high = observed(x, ranges="percentile", percentile=99.0)
    assert (low, high) == (0.0, float(x[4]))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ranges", ["mse", "percentile", "min_max"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_cut_into_batches_does_not_matter(
    device: torch.device, name: str, ranges: str, symmetric: bool
) -> None:
    x = samples(name)
    settings: dict[str, Any] = {"bits": 4, "ranges": ranges, "symmetric": symmetric}
    whole = observed(x.to(device), **settings)
    generator = torch.Generator().manual_seed(3)
    shuffled = x[torch.randperm(len(x), generator=generator)]
    for data in (shuffled, x[x.abs().argsort()]):  # the latter widens the bins often
        batches = [torch.zeros(0), *data.split(777)]
        assert observed(*(batch.to(device) for batch in batches), **settings) == whole


def test_histogram_counts_by_hand() -> None:
    histogram = Histogram()
    for values in ([0.25, 0.25, -0.5], [0.0, 1.5, 1.5], [1.0, -0.5, 0.0, 1.5]):
        x = torch.tensor(values)
        histogram.add(x, min(values), max(values))
    assert (histogram.low, histogram.high) == (-0.5, 1.5)
    edges, counts, heaps, heights = histogram.bins_and_heaps()
    assert dict(zip(heaps.tolist(), heights.tolist(), strict=True)) == {0.0: 2, -0.5: 2, 1.5: 3}
    filled = counts.nonzero()[:, 0]
    assert edges[filled].tolist() == [0.25, 1.0]
    assert counts[filled].tolist() == [2.0, 1.0]
    width = edges[filled + 1] - edges[filled]
    assert width.tolist() == [2 / 8192] * 2


@pytest.mark.parametrize("ranges", ["mse", "min_max", "percentile"])
@pytest.mark.parametrize("symmetric", [False, True])
def test_degenerate_values(ranges: str, symmetric: bool) -> None:
    settings: dict[str, Any] = {"ranges": ranges, "symmetric": symmetric}
    assert observed(torch.zeros(5), torch.zeros(2), **settings) == (0.0, 0.0)
    for value in (3.0, -3.0, 1e-30, 1e30, 1e-45):
        x = torch.full((5,), value)
        quantizer = ActivationQuantizer(ActivationConfig(**settings))
        quantizer.set_range(*observed(x, torch.zeros(3), x, **settings))
        assert 0 < float(quantizer.scale) < math.inf
        if abs(value) > 1e-40:
            torch.testing.assert_close(quantizer(x), x, rtol=1e-6, atol=0)


def test_errors() -> None:
    observer = RangeObserver(ActivationConfig(), "layer1.input_quantizer")
    message = r"at layer1.input_quantizer must hold a value, got none"
    with pytest.raises(ValueError, match=message):
        observer.range()
    observer.observe(torch.zeros(0, 3))
    with pytest.raises(ValueError, match=message):
        observer.range()
    bad = torch.tensor([1.0, math.nan, math.inf, -math.inf])
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        with pytest.raises(ValueError, match=r"at layer1.input_quantizer .* got 3 NaN .* of 4"):
            observer.observe(bad.to(dtype))
    with pytest.raises(ValueError, match="finite in float32, got 1 NaN or infinite"):
        observer.observe(torch.tensor([1e300], dtype=torch.float64))
    observer.observe(torch.ones(3))  # what was refused has left nothing behind
    assert observer.range() == (1.0, 1.0)


def test_memory_does_not_grow() -> None:
    observer = RangeObserver(ActivationConfig(), "here")

    def held() -> int:
        histogram = observer._histogram
        assert histogram is not None
        return sum(v.nbytes for v in vars(histogram).values() if isinstance(v, Tensor))

    observer.observe(torch.randn(10))
    before = held()
    for scale in (1e-3, 1.0, 1e6):
        observer.observe(torch.randn(10_000) * scale)
    assert held() == before
