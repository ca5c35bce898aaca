"""adaround_ext.reference against values worked out by hand from the paper."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adaround_ext import reference
from adaround_ext.reference import ReferenceConfig
from tests.support.helpers import CLIP_EDGE, schedule_row

pytestmark = pytest.mark.usefixtures("one_thread")


def test_expand_grid(device: torch.device) -> None:
    values = torch.tensor([[1, 2], [3, 4]], device=device)
    assert reference.expand_grid(values, 2, 6).tolist() == [[1, 1, 1, 2, 2, 2], [3, 3, 3, 4, 4, 4]]
    assert reference.expand_grid(values[:1], 3, 2).tolist() == [[1, 2]] * 3
    assert reference.expand_grid(values[:1, :1], 2, 3).tolist() == [[1] * 3] * 2


def test_rectified_sigmoid(device: torch.device) -> None:
    v = torch.tensor(
        [0.0, -50, 50, -CLIP_EDGE - 0.01, CLIP_EDGE + 0.01, math.log(3)], device=device
    )
    # sigmoid(log 3) = 3/4, and 3/4 * 1.2 - 0.1 = 0.8
    expected = torch.tensor([0.5, 0, 1, 0, 1, 0.8], device=device)
    torch.testing.assert_close(reference.rectified_sigmoid(v), expected)


@pytest.mark.parametrize("beta", [2.0, 7.0, 20.0])
def test_round_reg(device: torch.device, beta: float) -> None:
    assert reference.round_reg(torch.full((3, 5), 0.5, device=device), beta) == 15
    assert reference.round_reg(torch.tensor([0.0, 1.0, 1.0], device=device), beta) == 0
    # |2 * 0.75 - 1| = 1/2
    at_three_quarters = reference.round_reg(torch.tensor([0.75], device=device), beta)
    assert float(at_three_quarters) == pytest.approx(1 - 2**-beta)


def test_initial_v_inverts_h(device: torch.device) -> None:
    fraction = torch.tensor([[0.01, 0.25, 0.49, 0.51, 0.75, 0.99]], device=device)
    scale = torch.full((1, 1), 0.5, device=device)
    v = reference.initial_v(0.5 * (fraction - 3), scale)
    torch.testing.assert_close(reference.rectified_sigmoid(v), fraction, rtol=0, atol=1e-6)
    on_grid = reference.initial_v(torch.tensor([[1.5, -1.5, 0.0]], device=device), scale)
    h = reference.rectified_sigmoid(on_grid)
    torch.testing.assert_close(h, torch.full_like(h, 1e-4), rtol=0, atol=1e-6)
    ties = reference.initial_v(torch.tensor([[0.25, 0.75, -0.25, -0.75]], device=device), scale)
    assert (ties >= 0).tolist() == [[False, True, True, False]]  # to 0, 2, 0 and -2


def test_soft_quantize_by_hand(device: torch.device) -> None:
    weight = torch.tensor([[0.3, -0.7], [1.1, 9.0]], device=device)
    scale = torch.tensor([[0.5], [0.25]], device=device)
    zero_point = torch.tensor([[0], [3]], dtype=torch.int32, device=device)
    v = torch.tensor([[0.0, 50.0], [math.log(3), -50.0]], device=device)  # h = 0.5, 1, 0.8, 0
    weight_q, reg = reference.soft_quantize(weight, v, scale, zero_point, 0, 7, 2.0)
    # floors 0, -2, 4, 36; codes 0.5, -1 -> 0, 4 + 3 + 0.8 -> 7, 39 -> 7
    expected = torch.tensor([[0.25, 0.0], [1.0, 1.0]], device=device)
    torch.testing.assert_close(weight_q, expected)
    assert float(reg) == pytest.approx(1 + 0 + (1 - 0.6**2) + 0)
    assert reference.hard_quantize(weight, v, scale, zero_point, 0, 7).tolist() == [[1, 0], [7, 7]]
    codes = reference.hard_quantize(weight, v, scale, zero_point, -8, 7)
    assert codes.dtype == torch.int8
    assert codes.tolist() == [[1, -1], [7, 7]]
    back = reference.dequantize(codes, scale, zero_point, torch.bfloat16)
    assert back.dtype == torch.bfloat16
    assert back.tolist() == [[0.5, -0.5], [1.0, 1.0]]


def test_derivative_by_hand(device: torch.device) -> None:
    v = torch.tensor([[math.log(3)]], device=device, requires_grad=True)
    scale = torch.full((1, 1), 0.5, device=device)
    zero_point = torch.zeros(1, 1, dtype=torch.int32, device=device)
    weight = torch.full((1, 1), 0.3, device=device)
    weight_q, reg = reference.soft_quantize(weight, v, scale, zero_point, -8, 7, 2.0)
    (dweight_q,) = torch.autograd.grad(weight_q.sum(), v, retain_graph=True)
    (dreg,) = torch.autograd.grad(reg, v)
    slope = 1.2 * 0.75 * 0.25
    assert float(dweight_q) == pytest.approx(0.5 * slope)
    assert float(dreg) == pytest.approx(-2 * 2 * 0.6 * slope)


def test_first_step_by_hand(device: torch.device) -> None:
    # Adam's first step is the learning rate against the gradient's sign.
    v = torch.tensor([[0.0, 0.0]], device=device)
    exp_avg, exp_avg_sq = torch.zeros_like(v), torch.zeros_like(v)
    weight_q = torch.zeros_like(v)
    grad = torch.tensor([[2.0, -4.0]], device=device)
    weight = torch.full_like(v, 0.3)
    scale = torch.full((1, 1), 0.5, device=device)
    zero_point = torch.zeros(1, 1, dtype=torch.int32, device=device)
    schedule = torch.tensor([schedule_row(1, 2.0, 0.0, 0.01)], device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    reference.rounding_step_(
        *(v, exp_avg, exp_avg_sq, weight_q, grad, weight, scale, zero_point, -8, 7, schedule, step),
        as_error=True,
        normalize=False,
    )
    torch.testing.assert_close(v, torch.tensor([[-0.01, 0.01]], device=device))
    # grad s h'(0) = 2 * 0.5 * 0.3
    torch.testing.assert_close(exp_avg, torch.tensor([[0.03, -0.06]], device=device))
    torch.testing.assert_close(exp_avg_sq, torch.tensor([[0.09, 0.36]], device=device) * 1e-3)
    h = 1.2 / (1 + math.exp(0.01)) - 0.1
    assert float(weight_q[0, 0]) == pytest.approx(0.5 * h - 0.3, abs=1e-6)
    assert int(step) == 1


def test_beta_falls_along_half_a_cosine() -> None:
    beta = [reference.cosine_beta(step, 1000, (20.0, 2.0), 0.2) for step in range(1001)]
    assert beta[0] == beta[200] == 20
    assert beta[600] == pytest.approx(11)
    assert beta[1000] == pytest.approx(2)
    assert beta == sorted(beta, reverse=True)


def small_layer(device: torch.device) -> tuple[Tensor, ...]:
    """weight [6, 12], scale and zero_point for 2 bits, correlated inputs and their outputs."""
    weight = torch.randn(6, 12)
    inputs = torch.randn(256, 12) + torch.randn(256, 1)
    low, high = weight.aminmax(dim=1, keepdim=True)
    scale = (high - low) / 3
    zero_point = (-low / scale).round().int()
    return tuple(t.to(device) for t in (weight, scale, zero_point, inputs, inputs @ weight.T))


def test_optimize_beats_nearest_rounding(device: torch.device) -> None:
    weight, scale, zero_point, inputs, targets = given = small_layer(device)
    before = [t.clone() for t in given]

    def loss(codes: Tensor) -> float:
        weight_q = reference.dequantize(codes, scale, zero_point, weight.dtype)
        return float((inputs @ weight_q.T - targets).square().sum(1).mean())

    def optimized() -> Tensor:
        config = ReferenceConfig(steps=200, learning_rate=0.1, reg_weight=1.0)
        return reference.optimize(
            *(weight, scale, zero_point, 0, 3, inputs, targets), lambda x, w: x @ w.T, config
        )

    start = reference.initial_v(weight, scale)
    codes = optimized()
    nearest = reference.hard_quantize(weight, start, scale, zero_point, 0, 3)
    assert loss(codes) < 0.7 * loss(nearest)
    assert torch.equal(codes, optimized())
    assert all(torch.equal(tensor, copy) for tensor, copy in zip(given, before, strict=True))


def test_optimize_with_activation_and_channels_first(device: torch.device) -> None:
    weight, scale, zero_point, inputs, targets = small_layer(device)
    codes = reference.optimize(
        *(weight, scale, zero_point, 0, 3, inputs, targets.relu().unsqueeze(-1)),
        lambda x, w: (x @ w.T).relu().unsqueeze(-1),
        ReferenceConfig(steps=20),
        channel_dim=1,
    )
    below = (weight / scale).floor() + zero_point
    assert ((codes == below.clamp(0, 3)) | (codes == (below + 1).clamp(0, 3))).all()


def test_annealing_saturates_v(device: torch.device) -> None:
    weight, scale, zero_point, inputs, targets = small_layer(device)
    config = ReferenceConfig(steps=200, learning_rate=0.1, reg_weight=1.0)
    state = reference.Optimizer(weight, scale, zero_point, 0, 3, config)

    def undecided() -> float:
        h = reference.rectified_sigmoid(state.v.detach())
        return float(((h > 0.01) & (h < 0.99)).float().mean())

    start = undecided()
    for step in range(config.steps):
        state.step(lambda w: (inputs @ w.T - targets).square().sum(1).mean(), step)
    assert start > 0.8
    assert undecided() < 0.05


def test_warm_up_has_no_regularizer(device: torch.device) -> None:
    weight, scale, zero_point, *_ = small_layer(device)
    config = ReferenceConfig(steps=10, warmup=0.5, reg_weight=1.0)
    state = reference.Optimizer(weight, scale, zero_point, 0, 3, config)
    losses = [state.loss(lambda w: w.sum() * 0, step).item() for step in (0, 4, 5)]
    assert losses[:2] == [0, 0]
    assert losses[2] > 1
