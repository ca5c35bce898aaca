"""The quantization grid: ranges, scales, codes of the simple rules."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaround_ext import AdaRoundConfig, grid, optimize_layer
from adaround_ext.grid import (
    QuantGrid,
    baseline_codes,
    expand,
    make_grid,
    nearest_codes,
    next_scale,
    quant_range,
    scale_notes,
    stored_scale,
)
from adaround_ext.linalg.tiles import TileSize
from adaround_ext.reference import dequantize, expand_grid

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
both_kinds = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
every_width = pytest.mark.parametrize("bits", range(2, 9))


def build(weight: Tensor, **settings: Any) -> QuantGrid:
    return make_grid(weight, AdaRoundConfig(**settings))


def nearest_error(weight: Tensor, of: QuantGrid) -> Tensor:
    """Mean squared weight error of rounding to nearest, float64 [rows]."""
    codes = nearest_codes(weight, of)
    stored = dequantize(codes, of.scale.double(), of.zero_point, torch.float64)
    return (stored - weight.double()).square().mean(1)


@pytest.mark.parametrize("shape", [(1, 1), (5, 1), (1, 4), (5, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_expand_is_that_of_the_reference(
    device: torch.device, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    values = torch.randn(shape).mul(100).to(device, dtype)
    expanded = expand(values, 5, 12)
    assert expanded.dtype == dtype
    assert torch.equal(expanded, expand_grid(values, 5, 12))
    assert expand(values, 5, 0).shape == (5, 0)


@every_width
def test_ranges(bits: int) -> None:
    low, high = quant_range(bits, symmetric=True)
    assert (low, high) == (-(2**bits) // 2, 2**bits // 2 - 1)
    assert quant_range(bits, symmetric=False) == (0, 2**bits - 1)
    assert quant_range(bits, symmetric=True, narrow=True) == (-high, high)


@every_width
def test_narrow_range_leaves_the_lowest_code_out(bits: int) -> None:
    x = torch.randn(256, 24)
    layer = torch.nn.Linear(24, 16)
    layer.weight.data.sub_(0.3)  # most are negative: the lowest code is wanted
    lowest = -(2 ** (bits - 1))
    for narrow in (False, True):
        result = optimize_layer(layer, x, bits=bits, narrow_range=narrow, scale="mse")
        assert int(result.codes.min()) == lowest + narrow
        assert int(result.codes.max()) <= 2 ** (bits - 1) - 1


@every_width
def test_min_max_symmetric_by_hand(device: torch.device, bits: int) -> None:
    weight = torch.tensor([[-1.0, 0.5, 0.75], [0.0, 2.0, -1.0]], device=device)
    got = build(weight, bits=bits, scale="min_max")
    qmax = 2 ** (bits - 1) - 1
    assert got.scale.tolist() == torch.tensor([[1 / qmax], [2 / qmax]]).tolist()
    assert got.zero_point.tolist() == [[0], [0]]
    assert (got.qmin, got.qmax) == (-qmax - 1, qmax)


def test_min_max_asymmetric_by_hand(device: torch.device) -> None:
    # The range always holds 0: all of one sign (rows 1 and 2) starts or ends there.
    weight = torch.tensor([[-1.0, 0.5, 0.7], [2.0, 4.0, 15.0], [-15.0, -4.0, -2.0]], device=device)
    got = build(weight, bits=4, symmetric=False, scale="min_max")
    torch.testing.assert_close(got.scale.cpu(), torch.tensor([[1.7 / 15], [1.0], [1.0]]))
    assert got.zero_point.tolist() == [[9], [0], [15]]  # 9: round(1 / (1.7 / 15))
    assert nearest_codes(weight, got).tolist() == [[0, 13, 15], [2, 4, 15], [0, 11, 13]]


@both_kinds
@every_width
def test_mse_is_never_worse_than_min_max(device: torch.device, symmetric: bool, bits: int) -> None:
    weight = torch.randn(32, 96, device=device)
    weight[:8] = weight[:8] ** 3  # heavy tails
    weight[8:16] += 1  # an offset
    errors = {
        scale: nearest_error(weight, build(weight, bits=bits, symmetric=symmetric, scale=scale))
        for scale in ("mse", "min_max")
    }
    assert bool((errors["mse"] <= errors["min_max"] * (1 + 1e-5)).all())
    assert float(errors["mse"].mean()) < float(errors["min_max"].mean())


@every_width
def test_mse_is_close_to_brute_force(device: torch.device, bits: int) -> None:
    weight = torch.randn(16, 256, device=device)
    qmax = 2 ** (bits - 1) - 1
    shares = torch.linspace(0.15, 1.05, 361, device=device)
    tried = (weight.abs().amax(1, keepdim=True) / qmax * shares).view(-1, 1)
    zero_point = torch.zeros_like(tried, dtype=torch.int32)
    copies = weight.repeat_interleave(len(shares), 0)
    errors = nearest_error(copies, QuantGrid(tried, zero_point, -qmax - 1, qmax))
    best = errors.view(16, -1).amin(1)
    found = nearest_error(weight, build(weight, bits=bits, scale="mse"))
    assert float((found / best).mean()) < 1.02
    assert float((found / best).max()) < 1.1


@both_kinds
@pytest.mark.parametrize("scale", ["min_max", "mse"])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_zeros_get_scale_one(
    device: torch.device, symmetric: bool, scale: str, scale_dtype: torch.dtype
) -> None:
    weight = torch.randn(3, 8, device=device)
    weight[1] = 0
    got = build(weight, symmetric=symmetric, scale=scale, scale_dtype=scale_dtype)
    assert float(got.scale[1]) == 1
    assert bool(got.scale.isfinite().all())
    codes = nearest_codes(weight, got)
    assert codes[1].tolist() == [int(got.zero_point[1])] * 8
    assert dequantize(codes, got.scale, got.zero_point, torch.float32)[1].tolist() == [0.0] * 8


@both_kinds
@pytest.mark.parametrize(
    ("settings", "shape"),
    [
        ({"granularity": "per_tensor"}, (1, 1)),
        ({"granularity": "per_channel"}, (6, 1)),
        ({"granularity": "per_group", "group_size": 4}, (6, 3)),
        ({"granularity": "per_group", "group_size": 12}, (6, 1)),
        ({"granularity": "per_group", "group_size": 1}, (6, 12)),
    ],
    ids=str,
)
def test_granularity(
    device: torch.device, symmetric: bool, settings: dict[str, Any], shape: tuple[int, int]
) -> None:
    """Each run of weights that shares a scale has the grid that it would have alone."""
    weight = torch.randn(6, 12, device=device)
    got = build(weight, symmetric=symmetric, **settings)
    assert got.scale.shape == got.zero_point.shape == shape
    assert (got.scale.dtype, got.zero_point.dtype) == (torch.float32, torch.int32)
    assert got.scale.device == got.zero_point.device == device
    runs = weight.reshape(shape[0] * shape[1], -1)
    for i, (scale, zero_point) in enumerate(
        zip(got.scale.view(-1), got.zero_point.view(-1), strict=True)
    ):
        alone = build(runs[i : i + 1], symmetric=symmetric)
        assert (float(scale), int(zero_point)) == (float(alone.scale), int(alone.zero_point))


def test_group_size_must_divide(device: torch.device) -> None:
    for scale in ("mse", torch.ones(2, 2)):
        with pytest.raises(ValueError, match=r"^group_size must divide the layer's 12 columns.* 5"):
            build(
                torch.randn(2, 12, device=device),
                granularity="per_group",
                group_size=5,
                scale=scale,
            )


@both_kinds
@pytest.mark.parametrize(
    ("granularity", "given", "shape"),
    [
        ("per_tensor", (1, 1), (1, 1)),
        ("per_channel", (3, 1), (3, 1)),
        ("per_channel", (3,), (3, 1)),
        ("per_channel", (1, 1), (1, 1)),
        ("per_group", (3, 2), (3, 2)),
        ("per_group", (1, 2), (3, 2)),
    ],
    ids=str,
)
def test_given_scale(
    device: torch.device,
    symmetric: bool,
    granularity: str,
    given: tuple[int, ...],
    shape: tuple[int, int],
) -> None:
    weight = torch.randn(3, 8, device=device)
    scale = 0.2 + torch.rand(given)  # on the CPU, as from_dict gives it
    before = scale.clone()
    group_size = 4 if granularity == "per_group" else None
    got = build(
        weight, symmetric=symmetric, granularity=granularity, group_size=group_size, scale=scale
    )
    assert got.scale.device == device
    assert got.scale.shape == got.zero_point.shape == shape
    assert torch.equal(got.scale.cpu(), scale.view(-1, shape[1]).expand(shape))
    low = weight.view(shape[0] * shape[1], -1).amin(1).clamp(max=0).view(shape)
    wanted = torch.zeros(shape) if symmetric else (-low / got.scale).round().clamp(0, 15).cpu()
    assert torch.equal(got.zero_point.cpu(), wanted.int())
    got.scale.zero_()
    assert torch.equal(scale, before)


@pytest.mark.parametrize(
    ("granularity", "given"),
    [
        ("per_tensor", ()),
        ("per_tensor", (3, 1)),
        ("per_channel", (2, 1)),
        ("per_channel", (8,)),
        ("per_channel", (3, 2)),
        ("per_group", (3, 1)),
        ("per_group", (2, 2)),
        ("per_group", (3,)),
    ],
    ids=str,
)
def test_given_scale_of_wrong_shape(granularity: str, given: tuple[int, ...]) -> None:
    group_size = 4 if granularity == "per_group" else None
    with pytest.raises(
        ValueError, match=rf"^scale must have shape .*got {list(given)}".replace("[", r"\[")
    ):
        build(
            torch.randn(3, 8),
            granularity=granularity,
            group_size=group_size,
            scale=torch.ones(given),
        )


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf"), 1e-9, 1e6])
def test_given_scale_must_be_positive_and_finite_where_stored(value: float) -> None:
    scale = torch.tensor([[1.0], [value], [value]])
    with pytest.raises(ValueError, match=r"^scale must be positive and finite in .*float16, got 2"):
        build(torch.randn(3, 8), scale=scale, scale_dtype=torch.float16)


@both_kinds
@pytest.mark.parametrize("scale_dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", ["min_max", "mse", "given"])
def test_scales_are_stored_exactly(
    device: torch.device, symmetric: bool, scale_dtype: torch.dtype, scale: str
) -> None:
    weight = torch.randn(16, 8, device=device)
    asked = 0.1 + torch.rand(16, 1) if scale == "given" else scale
    got = build(weight, symmetric=symmetric, scale=asked, scale_dtype=scale_dtype)
    assert torch.equal(got.scale.to(scale_dtype).float(), got.scale)
    exact = build(weight, symmetric=symmetric, scale=asked)
    assert not torch.equal(got.scale, exact.scale)
    if scale != "mse":  # its search may end at another share
        torch.testing.assert_close(got.scale, exact.scale, rtol=1e-2, atol=0)


HALVES = [torch.float16, torch.bfloat16]
TINY = 2.0**-24  # float16's smallest number


@pytest.mark.parametrize(
    ("dtype", "least"),
    [
        (torch.float16, TINY),
        (torch.bfloat16, 2.0**-126),  # float32's smallest normal number, too
        (torch.float32, 2.0**-126),
    ],
    ids=str,
)
def test_scale_stays_above_zero_and_finite_where_stored(
    device: torch.device, dtype: torch.dtype, least: float
) -> None:
    most = torch.finfo(dtype).max
    for large in (torch.float32, torch.float64):
        given = torch.tensor([1e-44, least / 3, least, 1.5, most], dtype=large, device=device)
        kept = stored_scale(given, dtype)
        assert (kept.dtype, kept.tolist()) == (torch.float32, [least, least, least, 1.5, most])
    more = torch.tensor([3.5e38, 1e300, torch.inf], dtype=torch.float64, device=device)
    assert stored_scale(more, dtype).tolist() == [most] * 3


def test_scales_below_the_smallest_normal_number(device: torch.device) -> None:
    """Rounded to float16 as every other."""
    count = 1 << 10
    wanted = TINY * torch.arange(1, count, dtype=torch.float64, device=device)
    for by in (0.51, 0.75, 1.0, 1.25, 1.49):
        near = wanted + (by - 1) * TINY
        assert torch.equal(stored_scale(near, torch.float16).double(), wanted)
        weight = 7 * near.float()[:, None] * torch.tensor([[1.0, -0.3]], device=device)
        got = build(weight, scale="min_max", scale_dtype=torch.float16)
        assert torch.equal(got.scale[:, 0].double(), wanted)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_next_scale(device: torch.device, dtype: torch.dtype) -> None:
    """Of every number that a scale can be, in order."""
    bits = torch.arange(1, 1 << 15, dtype=torch.int16).view(dtype).float()
    numbers = bits[bits.isfinite() & (bits >= torch.finfo(torch.float32).smallest_normal)]
    numbers = numbers.to(device)
    up, down = (next_scale(numbers, dtype, way) for way in (True, False))
    assert torch.equal(up[:-1], numbers[1:]) and torch.equal(down[1:], numbers[:-1])
    assert (up[-1], down[0]) == (numbers[-1], numbers[0])


def test_next_scale_of_float32(device: torch.device) -> None:
    scale = torch.tensor([1.0, 1e-30], device=device)
    for way, end in ((True, torch.inf), (False, 0.0)):
        towards = torch.full_like(scale, end)
        assert torch.equal(next_scale(scale, torch.float32, way), scale.nextafter(towards))


def test_a_scale_that_was_rounded_down_clips_less(device: torch.device) -> None:
    """1.4 of float16's smallest number is 1: the largest weights would be clipped by 2/7."""
    weight = torch.linspace(-127 * 1.4 * TINY, 127 * 1.4 * TINY, 64, device=device)[None]
    errors = {}
    for scale in ("min_max", "mse", "gram"):
        got = build(weight, bits=8, scale=scale, scale_dtype=torch.float16)
        assert float(got.scale) == (TINY if scale == "min_max" else 2 * TINY)
        errors[scale] = float(nearest_error(weight, got))
    assert errors["mse"] == errors["gram"] < 0.01 * errors["min_max"]


def test_notes_of_scales() -> None:
    normal, tiny, huge = 2.0**-14, 2.0**-15, 65504.0
    small = "{} scales are below float16's smallest normal number, where it has fewer digits"
    large = "{} scales are float16's largest number: larger weights than their grids hold are"
    for values, found in (
        ([normal, 1.0, 60000.0], []),
        ([tiny, TINY, normal], [small.format("2 of 3")]),
        ([huge, 1.0], [large.format("1 of 2") + " clipped"]),
        ([tiny, huge], [small.format("1 of 2"), large.format("1 of 2") + " clipped"]),
    ):
        assert list(scale_notes(torch.tensor([values]), torch.float16)) == found
        assert scale_notes(torch.tensor([values]), torch.bfloat16) == ()


@both_kinds
@every_width
def test_nearest_codes_by_brute_force(device: torch.device, symmetric: bool, bits: int) -> None:
    weight = torch.randn(5, 12, device=device)
    got = build(
        weight, bits=bits, symmetric=symmetric, granularity="per_group", group_size=4, scale="mse"
    )
    codes = torch.arange(got.qmin, got.qmax + 1, device=device, dtype=torch.float64)
    s, z = (expand_grid(t, 5, 12).double()[..., None] for t in (got.scale, got.zero_point))
    distance = (s * (codes - z) - weight.double()[..., None]).abs()
    found = nearest_codes(weight, got)
    assert found.dtype == (torch.int8 if symmetric else torch.uint8)
    assert torch.equal(found.long(), distance.argmin(-1) + got.qmin)


def test_ties_go_to_even_multiples_of_the_scale(device: torch.device) -> None:
    """As torch.round(w / s): a zero point shifts the codes and nothing else."""
    weight = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5]], device=device)
    scale = torch.ones(1, 1, device=device)
    for zero_point, qmin, qmax in ((0, -8, 7), (4, 0, 15), (5, 0, 15)):
        at = torch.full((1, 1), zero_point, dtype=torch.int32, device=device)
        codes = nearest_codes(weight, QuantGrid(scale, at, qmin, qmax))
        assert (codes.int() - zero_point).tolist() == [[-2, 0, 0, 2, 2]]


@both_kinds
def test_baseline_codes(device: torch.device, symmetric: bool) -> None:
    weight = torch.randn(64, 64, device=device)
    got = build(weight, symmetric=symmetric, granularity="per_tensor", scale="min_max")
    at = weight / got.scale + got.zero_point
    codes = baseline_codes(weight, got, seed=3)
    assert torch.equal(codes["floor"].float(), at.floor().clamp(got.qmin, got.qmax))
    assert torch.equal(codes["ceil"].float(), at.ceil().clamp(got.qmin, got.qmax))
    drawn = codes["stochastic"]
    assert bool(((drawn == codes["floor"]) | (drawn == codes["ceil"])).all())
    # Each draw errs by less than one with mean 0, so 4096 of them by less than .05 on average.
    assert abs(float((drawn.float() - at).mean())) < 0.05
    assert torch.equal(drawn, baseline_codes(weight, got, seed=3)["stochastic"])
    assert not torch.equal(drawn, baseline_codes(weight, got, seed=4)["stochastic"])


@both_kinds
@pytest.mark.parametrize("block", [1, 100, 1 << 30])
def test_block_size_does_not_matter(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, symmetric: bool, block: int
) -> None:
    weight = torch.randn(21, 30, device=device)
    wanted = build(weight, symmetric=symmetric)
    monkeypatch.setattr(grid, "WEIGHTS_PER_TILE", TileSize(block, block))
    got = build(weight, symmetric=symmetric)
    assert torch.equal(got.scale, wanted.scale)
    assert torch.equal(got.zero_point, wanted.zero_point)


@pytest.mark.parametrize("granularity", ["per_tensor", "per_channel"])
def test_joined_grids_give_the_same_codes(device: torch.device, granularity: str) -> None:
    weights = [torch.randn(rows, 8, device=device) for rows in (3, 5)]
    grids = [build(weight, granularity=granularity, symmetric=False) for weight in weights]
    joined = QuantGrid.join(grids, [3, 5])
    assert joined.scale.shape == joined.zero_point.shape == (8, 1)
    codes = nearest_codes(torch.cat(weights), joined)
    wanted = [nearest_codes(weight, own) for weight, own in zip(weights, grids, strict=True)]
    assert torch.equal(codes, torch.cat(wanted))
    assert QuantGrid.join(grids[:1], [3]) is grids[0]
