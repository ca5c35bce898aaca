"""The streamed statistics: the same bits however the data comes, and what they count."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import optimize_layer
from adaround_ext.layers.inputs import batches
from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.linalg.products import fixed_bmm
from adaround_ext.statistics import segment
from adaround_ext.statistics.moments import GramStatistics

# name: (layer, shape of the inputs, a cut of them). The cuts end within, at and beyond the fixed
# batches of 8192 tokens or 32 samples; some of these then start at addresses that are not aligned.
CASES: dict[str, tuple[nn.Module, tuple[int, ...], list[int]]] = {
    "few-rows": (nn.Linear(64, 10), (500, 64), [123, 377]),  # a product that MKL cuts by threads
    "tokens": (nn.Linear(7, 5), (20000, 7), [101, 19000, 899]),
    "sequences": (nn.Linear(24, 16), (40, 300, 24), [1, 38, 1]),
    "wide": (nn.Linear(400, 3), (300, 400), [7] * 42 + [6]),  # more than two blocks of columns
    "conv": (nn.Conv2d(3, 8, 3, padding=1), (75, 3, 9, 7), [5, 69, 1]),
    "depthwise": (nn.Conv2d(4, 8, 3, groups=4, stride=2), (75, 4, 9, 7), [40, 35]),
    "transposed": (nn.ConvTranspose1d(3, 4, 3, stride=2), (75, 3, 9), [25, 25, 25]),
}
MOMENTS = ("covariance", "mean", "mismatch", "mismatch_mean", "mismatch_energy")
pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
asymmetric = pytest.mark.parametrize("targets", [False, True], ids=["symmetric", "asymmetric"])


def make(name: str, device: torch.device) -> tuple[nn.Module, Tensor, Tensor]:
    """(layer, inputs, targets) of a case."""
    layer, shape, _ = CASES[name]
    layer = copy.deepcopy(layer).to(device)
    x = torch.randn(shape).to(device)
    return layer, x, layer(x).detach() + 0.1


def collect(
    layers: nn.Module | list[nn.Module],
    inputs: Tensor | list[Tensor],
    targets: Tensor | list[Tensor] | tuple[Tensor, ...] | None = None,
    positions: int | None = None,
    seed: int = 0,
) -> GramStatistics:
    views = [matrix_layer(layer) for layer in (layers if isinstance(layers, list) else [layers])]
    statistics = GramStatistics(views, positions, seed)
    with torch.no_grad():
        statistics.collect(batches(views, "the layer", inputs, targets))
    return statistics


def assert_same_bits(one: GramStatistics, other: GramStatistics) -> None:
    assert one.count == other.count
    for field in MOMENTS:
        assert torch.equal(getattr(one, field), getattr(other, field)), field


@asymmetric
@pytest.mark.parametrize("name", CASES)
def test_same_bits_however_the_data_is_cut(device: torch.device, name: str, targets: bool) -> None:
    layer, x, y = make(name, device)
    sizes = CASES[name][2]
    assert sum(sizes) == len(x)
    parts = list(y.split(sizes)) if targets else None
    got = collect(layer, list(x.split(sizes)), parts)
    assert_same_bits(got, collect(layer, x, y if targets else None))


@asymmetric
@pytest.mark.parametrize("name", CASES)
def test_same_bits_for_one_thread_and_two(device: torch.device, name: str, targets: bool) -> None:
    layer, x, y = make(name, device)
    got = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        got.append(collect(layer, x, y if targets else None))
    assert_same_bits(*got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["sequences", "conv"])
def test_other_dtypes_of_inputs_and_targets(
    device: torch.device, name: str, dtype: torch.dtype
) -> None:
    layer, x, y = make(name, device)
    x, y = x.to(dtype), y.to(dtype)
    got = collect(layer, x, y)
    assert {getattr(got, field).dtype for field in MOMENTS} == {torch.float64}
    expected = collect(layer, x.float(), y.float())
    if device.type == "cuda" and dtype.itemsize == 2:  # then TF32 is precise enough
        torch.testing.assert_close(got.covariance, expected.covariance, rtol=1e-3, atol=1e-3)
    else:
        assert_same_bits(got, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("segments", [[0, 0, 0], [0, 1, 1]])
def test_inputs_in_the_place_of_targets(
    device: torch.device, segments: list[int], bias: bool
) -> None:
    """The same moments from the inputs whose outputs are wanted as from those outputs."""
    layers = [nn.Linear(21, rows, bias=bias).to(device) for rows in (40, 9)]
    x = (torch.randn(450, 21) @ torch.randn(21, 21) + 3).to(device)
    wanted = x + 0.1 * torch.randn(450, 21).to(device) - 0.05
    views = [matrix_layer(layer) for layer in layers]
    from_outputs = GramStatistics(views, None, 0)
    from_inputs = GramStatistics(views, None, 0, from_inputs=True)
    with torch.no_grad():
        for segment, own, y in zip(segments, x.split(150), wanted.split(150), strict=True):
            from_outputs.add(own, tuple(layer(y) for layer in layers), segment)
            from_inputs.add(own, (y,), segment)
        from_outputs.finish()
        from_inputs.finish()
    assert from_inputs.has_targets
    for field in MOMENTS:
        got, expected = getattr(from_inputs, field), getattr(from_outputs, field)
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_inputs_in_the_place_of_targets_that_do_not_come(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x, _ = make("tokens", device)
    expected = collect(layer, x)
    view = matrix_layer(layer)
    statistics = GramStatistics([view], None, 0, from_inputs=True)
    monkeypatch.setattr(
        "adaround_ext.statistics.moments.fixed_bmm", None
    )  # nothing is to be multiplied
    with torch.no_grad():
        statistics.collect(batches([view], "the layer", x, None))
    assert_same_bits(statistics, expected)
    assert not statistics.has_targets


@pytest.mark.parametrize("name", ["plain", "grouped"])
@asymmetric
@pytest.mark.parametrize("positions", [None, 5])
def test_layers_that_share_inputs(
    device: torch.device, positions: int | None, targets: bool, name: str
) -> None:
    """One pass; each layer's rows are as if it were alone, its positions and groups included."""
    channels, groups = (4, 2) if name == "grouped" else (3, 1)
    layers: list[nn.Module] = [
        nn.Conv2d(channels, rows, 3, groups=groups).to(device) for rows in (2, 4)
    ]
    x = torch.randn(70, channels, 8, 8).to(device)
    x[32:] += 1  # the first batch does not have the mean of all
    wanted = tuple(
        (layer(x) * factor).detach() for layer, factor in zip(layers, (2, 3), strict=True)
    )
    both = collect(layers, x, wanted if targets else None, positions)
    for layer, y, rows in zip(layers, wanted, (slice(0, 2), slice(2, 6)), strict=True):
        alone = collect(layer, x, y if targets else None, positions)
        assert_same_bits(both.rows(rows), alone)


def test_sampled_positions(device: torch.device) -> None:
    layer = nn.Conv2d(3, 4, 3, padding=1).to(device)
    x = torch.randn(100, 3, 6, 6).cumsum(-1).to(device)
    full = collect(layer, x)
    drawn = [collect(layer, x, positions=9, seed=seed) for seed in range(16)]
    assert (full.count, drawn[0].count) == (100 * 36, 100 * 9)
    assert_same_bits(drawn[0], collect(layer, list(x.split(37)), positions=9))
    assert not torch.equal(drawn[0].gram(), drawn[1].gram())
    error = [float((one.gram() - full.gram()).norm() / full.gram().norm()) for one in drawn]
    assert max(error) < 0.2
    mean = torch.stack([one.gram() for one in drawn]).mean(0)
    # Unbiased: 16 draws together err about 4 times less than one.
    assert float((mean - full.gram()).norm() / full.gram().norm()) < 0.5 * sum(error) / 16
    assert_same_bits(full, collect(layer, x, positions=36))  # no more than there are


def test_every_batch_draws_its_own_positions(device: torch.device) -> None:
    """For several layers too, which share one draw in each batch."""
    layers: list[nn.Module] = [nn.Conv1d(1, 1, 1, bias=False).to(device) for _ in range(2)]
    x = torch.arange(64.0, device=device).expand(32, 1, 64)  # 32 samples are one batch
    once, often = (float(collect(layers, [x] * n, positions=1).gram()) for n in (1, 8))
    assert abs(once - often) > 1e-3 * once


@asymmetric
@pytest.mark.parametrize("name", ["tokens", "wide"])
def test_moments(device: torch.device, name: str, targets: bool) -> None:
    """Targets that are 0.1 more than the outputs: e = 0.1 everywhere."""
    layer, x, y = make(name, device)
    got = collect(layer, x, y if targets else None)
    assert (got.has_targets, got.count) == (targets, len(x))
    x = x.double()
    mean = x.mean(0)
    torch.testing.assert_close(got.gram()[0], x.mT @ x / len(x), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(got.mean[0], mean, rtol=1e-6, atol=1e-7)
    centred = (x - mean).mT @ (x - mean) / len(x)
    torch.testing.assert_close(got.covariance[0], centred, rtol=1e-5, atol=1e-6)
    missed = 0.1 if targets else 0.0
    plain = (missed * mean).expand_as(got.mismatch)
    torch.testing.assert_close(got.plain_mismatch(), plain, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(got.mismatch, torch.zeros_like(plain), rtol=0, atol=1e-6)
    for moment, power in ((got.mismatch_mean, 1), (got.mismatch_energy, 2)):
        wanted = torch.full_like(moment, missed**power)
        torch.testing.assert_close(moment, wanted, rtol=1e-4, atol=0)


def test_mismatch_that_follows_the_inputs(device: torch.device) -> None:
    """e = a x_0 + b: E[e (x - mean)^T] is a times a row of the covariance, group by group."""
    layer = nn.Conv1d(4, 6, 1, groups=2).to(device)
    x = torch.randn(80, 4, 9).to(device) + torch.arange(4.0, device=device)[:, None]
    x[40:] *= 2
    gains = torch.arange(1.0, 7.0, device=device)
    first = x[:, [0, 2]].repeat_interleave(3, 1)  # of the group of each row
    got = collect(layer, x, (layer(x) + gains[:, None] * first + 0.5).detach())
    rows = gains.double()[:, None] * got.covariance[:, 0].repeat_interleave(3, 0)
    torch.testing.assert_close(got.mismatch, rows, rtol=1e-4, atol=1e-4)
    rows = gains.double() * got.mean[:, 0].repeat_interleave(3, 0) + 0.5
    torch.testing.assert_close(got.mismatch_mean, rows, rtol=1e-4, atol=1e-4)


def test_a_large_offset_leaves_the_covariance(device: torch.device) -> None:
    """E[x x^T] - mean mean^T in float32 would have nothing left of it."""
    x = torch.randn(500, 7, dtype=torch.float64).to(device) + 1000
    got = collect(nn.Linear(7, 5).to(device), list(x.float().split(100)))
    x = x.float().double()
    centred = (x - x.mean(0)).mT @ (x - x.mean(0)) / len(x)
    torch.testing.assert_close(got.covariance[0], centred, rtol=1e-4, atol=1e-5)


def test_notes(device: torch.device) -> None:
    layer, x = nn.Linear(8, 3).to(device), torch.randn(50, 8).to(device)
    assert collect(layer, x).notes() == ()
    (few,) = collect(layer, x[:5]).notes()
    assert "5 positions for 8 columns" in few
    x[:, 2] = 0
    x[:, 5] = 3  # constant is not dead
    (dead,) = collect(layer, x).notes()
    assert "1 of 8 inputs" in dead
    x[:, 3] *= 1e6
    _, loud = collect(layer, x).notes()
    assert loud.startswith("1 inputs")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@asymmetric
def test_as_many_digits_as_the_data_have(
    device: torch.device, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, targets: bool
) -> None:
    seen = set()

    def watched(*given: Tensor) -> Tensor:
        seen.add(torch.get_float32_matmul_precision())
        return fixed_bmm(*given)

    monkeypatch.setattr(segment, "fixed_bmm", watched)
    layer = nn.Linear(16, 4).to(device, dtype)
    x = torch.randn(50, 16).to(device, dtype)
    y = layer(1.1 * x).detach() if targets else None
    result = optimize_layer(layer, x, y, preset="fast")
    short = device.type == "cuda" and dtype != torch.float32
    assert seen == {"high" if short else "highest"}
    assert result.report.losses["final"] <= result.report.losses["nearest"]
