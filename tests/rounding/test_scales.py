"""The search for scales and the refit in closed form, on problems that can be solved directly."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, optimize_layer, reference
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes, stored_scale
from adaround_ext.layers.inputs import batches
from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.rounding import scales
from adaround_ext.rounding.gptq import GptqFactor
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.scales import refit_scales, search_scales
from adaround_ext.rounding.search import descend
from adaround_ext.rounding.solution import Solution, per_scale
from adaround_ext.statistics.moments import GramStatistics

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
GRANULARITIES: dict[str, dict[str, Any]] = {
    "channel": {"granularity": "per_channel"},
    "group": {"granularity": "per_group", "group_size": 4},
    "tensor": {"granularity": "per_tensor"},
}
every_granularity = pytest.mark.parametrize("name", GRANULARITIES)
both_kinds = pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])


class Case:
    """A layer's objective, its starting grid with a row of scales a row, and who owns them."""

    def __init__(self, device: torch.device, groups: int = 1, **settings: Any) -> None:
        self.config = AdaRoundConfig(**{"bits": 3, **settings})
        layer = nn.Conv1d(12 * groups, 10, 1, groups=groups).to(device)
        self.x = torch.randn(100, 12 * groups, 1).to(device)
        self.x = self.x + self.x.roll(1, 1) + 0.7 * self.x.roll(2, 1) + 0.5
        y = (layer(self.x) + 0.1 * torch.randn(100, 10, 1).to(device)).detach()
        view: MatrixLayer = matrix_layer(layer)
        statistics = GramStatistics([view], positions=None, seed=0)
        with torch.no_grad():
            statistics.collect(batches([view], "the layer", self.x, y))
        self.weight = view.weight_matrix()
        self.objective = GramObjective(self.weight, statistics, centred=True, damping=0.05)
        base = make_grid(self.objective.target, self.config)
        rows = len(self.weight)
        shared = len(base.scale) != rows
        self.rows_per_scale = [rows] if shared else None
        self.grid = QuantGrid(
            base.scale.expand(rows, -1).clone(),
            base.zero_point.expand(rows, -1).clone(),
            base.qmin,
            base.qmax,
        )

    def nearest(self) -> Solution:
        codes = nearest_codes(self.objective.target, self.grid)
        return Solution.of(codes, self.grid, self.objective)

    def search(self, candidates: int = 7) -> Solution:
        factor = GptqFactor.make(self.objective.gram)
        return search_scales(
            self.objective, self.grid, factor, self.rows_per_scale, candidates, self.config
        )

    def solved(self) -> Solution:
        """What the search gives for the starting grid alone, without a refit."""
        codes = GptqFactor.make(self.objective.gram).codes(self.objective.target, self.grid)
        solution = Solution.of(codes, self.grid, self.objective)
        return descend(solution, self.objective) if self.config.refine else solution

    def totals(self, solution: Solution) -> Tensor:
        """What must not rise: losses of rows, or of all that share a scale."""
        return per_scale(solution.losses, self.rows_per_scale)


def least_squares_loss(case: Case, codes: Tensor) -> Tensor:
    """The damped loss [rows or 1] that the best scales for these codes leave, by lstsq.

    With G + d I = L L^T a row's loss is |sum_g f_g (c_g - z_g) L - t L|^2 over its scales f.
    """
    gram = case.objective.gram.double()
    half = torch.linalg.cholesky(gram).repeat_interleave(len(codes) // len(gram), 0)
    half = case.objective.unit.sqrt()[:, None, None] * half  # losses are in the data's units
    rows, cols = codes.shape
    n_groups = case.grid.scale.shape[1]
    zero = reference.expand_grid(case.grid.zero_point, rows, cols)
    whole = (codes.double() - zero).view(rows, n_groups, -1)
    parts = torch.zeros(rows, n_groups, cols, dtype=torch.float64, device=codes.device)
    size = cols // n_groups
    for group in range(n_groups):
        own = slice(group * size, (group + 1) * size)
        parts[:, group, own] = whole[:, group]
    left = (parts @ half).mT  # [rows, cols, n_groups]
    right = (case.objective.target.double()[:, None] @ half).mT
    if case.rows_per_scale is not None:
        left, right = left.reshape(1, -1, n_groups), right.reshape(1, -1, 1)
    best = torch.linalg.lstsq(left.cpu(), right.cpu(), driver="gelsd").solution
    return (left.cpu() @ best - right.cpu()).square().sum((1, 2)).to(codes.device)


@every_granularity
@both_kinds
@pytest.mark.parametrize("groups", [1, 5])
def test_refit_is_the_least_squares_solution(
    device: torch.device, name: str, symmetric: bool, groups: int
) -> None:
    case = Case(device, groups, symmetric=symmetric, refine=False, **GRANULARITIES[name])
    before = case.nearest()
    after = refit_scales(before, case.objective, case.rows_per_scale, case.config)
    assert torch.equal(after.codes, before.codes)
    assert torch.equal(after.grid.zero_point, before.grid.zero_point)
    wanted = least_squares_loss(case, before.codes)
    got = after.losses if case.rows_per_scale is None else after.losses.sum(0, keepdim=True)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-6)
    assert float(after.losses.sum()) < float(before.losses.sum())
    if case.rows_per_scale is not None:
        assert len(after.grid.scale.unique()) == 1


@every_granularity
@both_kinds
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("refine", [True, False])
def test_refit_never_raises_the_loss(
    device: torch.device, name: str, symmetric: bool, scale_dtype: torch.dtype, refine: bool
) -> None:
    """Not where scales are rounded either, nor from a refitted solution."""
    settings = GRANULARITIES[name] | {"scale_dtype": scale_dtype, "refine": refine}
    case = Case(device, symmetric=symmetric, **settings)
    solution = case.nearest()
    for _ in range(3):
        refitted = refit_scales(solution, case.objective, case.rows_per_scale, case.config)
        assert bool((case.totals(refitted) <= case.totals(solution)).all())
        fresh = Solution.of(refitted.codes, refitted.grid, case.objective)
        torch.testing.assert_close(refitted.losses, fresh.losses, rtol=1e-4, atol=1e-7)
        scale = refitted.grid.scale
        assert torch.equal(scale, scale.to(scale_dtype).float())
        solution = refitted


def test_refit_of_codes_that_are_all_zero(device: torch.device) -> None:
    """A group of zeros has no best scale: it keeps its own, and the others find theirs."""
    case = Case(device, refine=False, **GRANULARITIES["group"])
    codes = case.nearest().codes
    codes[2, 4:8] = 0
    codes[3] = 0
    before = Solution.of(codes, case.grid, case.objective)
    after = refit_scales(before, case.objective, case.rows_per_scale, case.config)
    assert bool(after.grid.scale.isfinite().all())
    assert torch.equal(after.grid.scale[3], case.grid.scale[3])
    assert float(after.grid.scale[2, 1]) == float(case.grid.scale[2, 1])
    assert not torch.equal(after.grid.scale[2], case.grid.scale[2])
    assert bool((after.losses <= before.losses).all())


@every_granularity
@both_kinds
@pytest.mark.parametrize("refine", [True, False])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.float16])
def test_search_is_never_worse_than_the_starting_grid(
    device: torch.device, name: str, symmetric: bool, refine: bool, scale_dtype: torch.dtype
) -> None:
    settings = GRANULARITIES[name] | {"refine": refine, "scale_dtype": scale_dtype}
    case = Case(device, symmetric=symmetric, **settings)
    found, start = case.search(), case.solved()
    assert bool((case.totals(found) <= case.totals(start)).all())
    assert float(found.losses.sum()) < float(start.losses.sum())
    fresh = Solution.of(found.codes, found.grid, case.objective)
    torch.testing.assert_close(found.losses, fresh.losses, rtol=1e-4, atol=1e-7)
    torch.testing.assert_close(found.residual, fresh.residual, rtol=1e-3, atol=1e-5)
    grid = found.grid
    assert grid.scale.shape == grid.zero_point.shape == case.grid.scale.shape
    assert torch.equal(grid.scale, grid.scale.to(scale_dtype).float())
    assert bool(((grid.scale > 0) & grid.scale.isfinite()).all())
    assert grid.zero_point.dtype == torch.int32
    assert grid.qmin <= int(grid.zero_point.min()) <= int(grid.zero_point.max()) <= grid.qmax
    assert not symmetric or not grid.zero_point.any()
    assert grid.qmin <= int(found.codes.min()) <= int(found.codes.max()) <= grid.qmax
    if case.rows_per_scale is not None:
        assert len(grid.scale.unique()) == len(grid.zero_point.unique()) == 1


@both_kinds
def test_more_candidates_find_no_worse_in_total(device: torch.device, symmetric: bool) -> None:
    case = Case(device, symmetric=symmetric)
    few, many = (case.search(candidates) for candidates in (1, 33))
    assert float(many.losses.sum()) < float(few.losses.sum())


@every_granularity
@both_kinds
def test_scales_of_a_result(device: torch.device, name: str, symmetric: bool) -> None:
    """One scale for all that share it, and better than that of least weight error."""
    layer = nn.Linear(12, 9).to(device)
    x = torch.randn(80, 12).to(device)
    x = x + 2 * x.roll(1, 1) + 1
    settings = {"preset": "fast", "bits": 3, "damping": 0.0, "scale_candidates": 9}
    settings |= GRANULARITIES[name]
    finals = {}
    for scale in ("gram", "mse"):
        result = optimize_layer(layer, x, scale=scale, symmetric=symmetric, **settings)
        shape = {"channel": (9, 1), "group": (9, 3), "tensor": (1, 1)}[name]
        assert result.scale.shape == result.zero_point.shape == shape
        finals[scale] = result.report.losses["final"]
    # A single scale for a matrix this small: which of several is best depends on a few codes.
    assert finals["gram"] < finals["mse"] * (1.05 if name == "tensor" else 1)


def coarsely_nearest(weight: Tensor, bits: int, dtype: torch.dtype, group_size: int) -> Tensor:
    """Rounded to nearest on the grid that llama.cpp stores: max |w| / qmax in ``dtype``.

    Where that is 0 nothing is left of the weights.
    """
    limit = 2 ** (bits - 1)
    groups = weight.reshape(-1, group_size)
    scale = groups.abs().amax(1, keepdim=True) / (limit - 1)
    scale = scale.clamp(max=torch.finfo(dtype).max).to(dtype).float()
    codes = (groups / scale.clamp(min=1e-30)).round().clamp(-limit, limit - 1)
    return (codes * scale).view_as(weight)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group_size", [16, 64])
@pytest.mark.parametrize("largest", [1e6, 1.0, 1e-2, 3e-4, 3e-5, 1e-5, 3e-6, 2e-7])
@pytest.mark.parametrize("cubed", [False, True])
def test_no_worse_than_nearest_whatever_the_dtype_holds(
    device: torch.device, bits: int, dtype: torch.dtype, group_size: int, largest: float,
    cubed: bool,
) -> None:  # fmt: skip
    torch.manual_seed(0)
    layer = nn.Linear(64, 24, bias=False)
    weight = torch.randn(24, 64) ** (3 if cubed else 1)
    layer.weight.data = weight * (largest / weight.abs().max())
    layer, x = layer.to(device), torch.randn(300, 64).to(device)
    result = optimize_layer(
        layer, x, bits=bits, preset="fast", granularity="per_group", group_size=group_size,
        scale_dtype=dtype,
    )  # fmt: skip
    assert torch.equal(result.scale, result.scale.to(dtype).float())
    assert bool((result.scale > 0).all())
    weight = layer.weight.detach()
    losses = [
        float((x.double() @ (rounded - weight).double().T).square().sum())
        for rounded in (result.weight_q, coarsely_nearest(weight, bits, dtype, group_size))
    ]
    assert losses[0] < losses[1]
    limits = torch.finfo(dtype)
    coarse = bool((result.scale < limits.smallest_normal).any())
    clipped = bool((result.scale == limits.max).any())
    notes = " ".join(result.report.notes)
    assert ("smallest normal" in notes, "largest number" in notes) == (coarse, clipped)
    if dtype == torch.float16:
        scale = largest / (2 ** (bits - 1) - 1)
        assert coarse or scale > limits.smallest_normal
        assert clipped == (scale > limits.max)


def test_few_digits_are_used_well(device: torch.device) -> None:
    """8 bits whose scales have two or three of them: near what float32 scales give."""
    layer = nn.Linear(64, 24, bias=False).to(device)
    layer.weight.data *= 1e-5 / layer.weight.abs().max()
    x = torch.randn(300, 64).to(device)
    errors = {
        dtype: optimize_layer(layer, x, bits=8, preset="fast", scale_dtype=dtype).report.relative
        for dtype in (torch.float16, torch.float32)
    }
    half, single = (errors[dtype]["final"] for dtype in (torch.float16, torch.float32))
    assert single < half < 5 * single < 1e-3


@both_kinds
@pytest.mark.parametrize("size", [1e-7, 1e-6, 1e-5, 1e-3, 1.0], ids=str)
def test_no_candidate_is_tried_twice_in_a_row(
    device: torch.device, symmetric: bool, size: float
) -> None:
    """Shares so near 1 that float16 has no number between."""
    config = AdaRoundConfig(scale_dtype=torch.float16, symmetric=symmetric)
    scale = stored_scale(size * torch.linspace(1, 2, 9, device=device)[:, None], torch.float16)
    zero_point = torch.full((9, 1), 0 if symmetric else 8, dtype=torch.int32, device=device)
    qmin, qmax = (-8, 7) if symmetric else (0, 15)
    grid = QuantGrid(scale, zero_point, qmin, qmax)
    smallest = 2.0**-24
    for share in (0.9999, 0.99):
        below, above = (scales._scaled(grid, s, config).scale for s in (share, 1 / share))
        assert bool(((below < scale) | (scale == smallest)).all())
        assert bool((above > scale).all())
    assert torch.equal(scales._scaled(grid, 1.0, config).scale, scale)
