"""The loop against the same loop in plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, reference
from adaround_ext.anneal import anneal
from adaround_ext.choice import Settings
from adaround_ext.data import batches
from adaround_ext.grid import QuantGrid, make_grid
from adaround_ext.layers import MatrixLayer, matrix_layer
from adaround_ext.objective import GramObjective, SampledObjective
from adaround_ext.schedule import schedule_table
from adaround_ext.statistics import GramStatistics

pytestmark = pytest.mark.usefixtures("one_thread")


def objective_of(
    kind: str, view: MatrixLayer, x: Tensor, normalize: bool
) -> GramObjective | SampledObjective:
    weight = view.weight_matrix()
    if kind == "sampled":
        y = view.forward(x, view.weight, view.bias)
        return SampledObjective(view, weight, x, y, torch.relu, 8, normalize, seed=0)
    statistics = GramStatistics([view], positions=None, seed=0)
    statistics.collect(batches([view], "the layer", x, None))
    return GramObjective(weight, statistics, normalize)


def reference_loop(
    weight: Tensor, grid: QuantGrid, objective: GramObjective | SampledObjective, table: Tensor,
    scale_free: bool,
) -> Tensor:  # fmt: skip
    """V after as many steps as ``table`` has rows."""
    v = reference.initial_v(weight, grid.scale)
    args = (grid.scale, grid.zero_point, grid.qmin, grid.qmax)
    moments = torch.zeros_like(v), torch.zeros_like(v)
    soft, _ = reference.soft_quantize(weight, v, *args, 2.0)
    for step in range(len(table)):
        grad = objective.gradient(soft - weight if objective.as_error else soft)
        count = torch.tensor([step])
        reference.rounding_step_(
            v, *moments, soft, grad, weight, *args, table, count, False, scale_free
        )
    return v


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
        symmetric=symmetric, scale=scale, scale_free=scale_free, beta=(8.0, 3.0), warmup=0.3
    )
    grid = make_grid(weight, config)
    with torch.no_grad():
        objective = objective_of(kind, view, x, scale_free)
        got = anneal(weight, grid, objective, Settings(steps, 0.02, 0.1), config)
        table = schedule_table(steps, 0.02, 0.1, config.beta, config.warmup)
        objective = objective_of(kind, view, x, scale_free)  # its draws from the start again
        wanted = reference_loop(weight, grid, objective, table, scale_free)
    torch.testing.assert_close(got, wanted, rtol=1e-3, atol=1e-4)
    assert torch.equal(got, reference.initial_v(weight, grid.scale)) == (steps == 0)
