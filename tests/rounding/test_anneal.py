"""The loop against the same loop in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, reference
from adaround_ext.grid import QuantGrid, make_grid
from adaround_ext.layers.inputs import batches
from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.presets import settings
from adaround_ext.rounding.anneal import anneal, initial_v, schedule_table
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.rounding.sampled_objective import SampledObjective
from adaround_ext.statistics.moments import GramStatistics

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]


def objective_of(
    kind: str,
    view: MatrixLayer,
    x: Tensor,
    normalize: bool,
    dtype: torch.dtype = torch.float32,
) -> GramObjective | SampledObjective:
    weight = view.weight_matrix()
    if kind == "sampled":
        y = view.forward(x, view.weight, view.bias)
        return SampledObjective(view, weight, x, y, torch.relu, 8, normalize, seed=0)
    statistics = GramStatistics([view], positions=None, seed=0)
    statistics.collect(batches([view], "the layer", x, None))
    return GramObjective(weight, statistics, normalize=normalize, dtype=dtype)


def reference_loop(
    weight: Tensor, grid: QuantGrid, objective: GramObjective | SampledObjective, table: Tensor,
    scale_free: bool,
) -> Tensor:  # fmt: skip
    """V after as many steps as ``table`` has rows."""
    dtype = objective.dtype
    v = reference.initial_v(weight, grid.scale)
    args = (grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    moments = torch.zeros_like(v), torch.zeros_like(v)
    soft, _ = reference.soft_quantize(weight, v, *args, 2.0)
    for step in range(len(table)):
        grad = objective.gradient((soft - weight if objective.as_error else soft).to(dtype))
        count = torch.tensor([step])
        reference.rounding_step_(
            v, *moments, soft, grad.float(), weight, *args, table, count, False, scale_free
        )
    return v


@pytest.mark.parametrize("group_size", [None, 4])
def test_initial_v_is_that_of_the_reference(device: torch.device, group_size: int | None) -> None:
    weight = torch.randn(16, 24, device=device)
    grid = make_grid(weight, AdaRoundConfig(symmetric=False, group_size=group_size, scale="mse"))
    s = reference.expand_grid(grid.scale, 16, 24)
    weight[0] = s[0] * torch.arange(-12, 12, device=device)  # on the grid
    weight[1] = s[1] * (torch.arange(-12, 12, device=device) + 0.5)  # ties
    v = initial_v(weight, grid)
    expected = reference.initial_v(weight.double(), grid.scale.double())
    doubled = 2 * weight / s
    apart = (doubled - doubled.round()).abs() > 1e-3  # elsewhere the dtype decides
    torch.testing.assert_close(v.double()[apart], expected[apart], rtol=1e-2, atol=1e-3)
    assert torch.equal(v, reference.initial_v(weight, grid.scale))
    assert torch.equal((v >= 0).float() + (weight / s).floor(), (weight / s).round())


@pytest.mark.parametrize("kind", ["gram", "sampled"])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
@pytest.mark.parametrize("scale_free", [True, False], ids=["scale-free", "paper"])
@pytest.mark.parametrize("steps", [0, 1, 12])
def test_loop(
    device: torch.device, kind: str, symmetric: bool, scale_free: bool, steps: int
) -> None:
    view = matrix_layer(nn.Linear(24, 16).to(device))
    x = (torch.randn(100, 24) @ torch.randn(24, 24)).to(device)
    weight = view.weight_matrix()
    # Every row clips weights, or it would start without an error: Adam makes full steps of noise.
    scale = 0.6 * weight.abs().amax(1, keepdim=True) / 7
    config = AdaRoundConfig(
        symmetric=symmetric, scale=scale, scale_free=scale_free, beta=(8.0, 3.0), warmup=0.3,
        steps=steps, learning_rate=0.02, reg_weight=0.1,
    )  # fmt: skip
    grid = make_grid(weight, config)
    with torch.no_grad():
        objective = objective_of(kind, view, x, scale_free)
        got = anneal(weight, grid, objective, settings(config, kind, weight.shape[1]), config).v
        table = schedule_table(steps, 0.02, 0.1, config.beta, config.warmup)
        objective = objective_of(kind, view, x, scale_free)  # its draws from the start again
        wanted = reference_loop(weight, grid, objective, table, scale_free)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(got, reference.initial_v(weight, grid.scale)) == (steps == 0)


def test_bfloat16_products_go_the_same_way(device: torch.device) -> None:
    """Rounding errors of the products, not another loop: most decisions are the same."""
    view = matrix_layer(nn.Linear(24, 16).to(device))
    x = (torch.randn(100, 24) @ torch.randn(24, 24)).to(device)
    weight = view.weight_matrix()
    config = AdaRoundConfig(bits=3, starts=("adaround",), steps=200, learning_rate=0.05)
    grid = make_grid(weight, config)
    args = (grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    losses, ups = {}, {}
    for dtype in (torch.float32, torch.bfloat16):
        objective = objective_of("gram", view, x, True, dtype)
        assert objective.gradient(torch.zeros_like(weight, dtype=dtype)).dtype == dtype
        v = anneal(weight, grid, objective, settings(config, "gram", weight.shape[1]), config).v
        assert v.dtype == torch.float32
        codes = reference.hard_quantize(weight, v, *args)
        stored = reference.dequantize(codes, grid.scale, grid.zero_point, torch.float32)
        losses[dtype], ups[dtype] = objective.row_losses(stored).sum(), v >= 0
    assert float((ups[torch.float32] == ups[torch.bfloat16]).double().mean()) > 0.9
    assert float(losses[torch.bfloat16]) < 1.2 * float(losses[torch.float32])
