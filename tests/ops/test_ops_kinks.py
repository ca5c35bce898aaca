"""What the ops do exactly on the kinks of AdaRound's functions, on CPU, CUDA and in the reference.

With weight = qmin = 0 and scale 1, weight_q is h(V) itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from adaround_ext import ops, reference
from tests.support.helpers import (
    CLIP_EDGE,
    DTYPES,
    GRIDS,
    arithmetic_dtype,
    instruction_set,  # noqa: F401  a fixture
    make_sample,
    skip_unsupported,
)

pytestmark = pytest.mark.usefixtures("instruction_set")

# (weight, v, qmin, qmax, beta) -> (weight_q, d weight_q / d v, d reg / d v) on a grid of scale 1
Derivatives = Callable[[Tensor, Tensor, int, int, float], tuple[Tensor, Tensor, Tensor]]


def _grid(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.ones(1, 1, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)


def op(weight: Tensor, v: Tensor, qmin: int, qmax: int, beta: float) -> tuple[Tensor, ...]:
    weight_q, dweight_q, _, dreg = ops.soft_quantize_with_grad(
        weight, v, *_grid(v.device), qmin, qmax, beta
    )
    return weight_q, dweight_q, dreg


def op_backward(weight: Tensor, v: Tensor, qmin: int, qmax: int, beta: float) -> tuple[Tensor, ...]:
    args = (weight, v, *_grid(v.device), qmin, qmax, beta)
    ones, zeros, one = torch.ones_like(weight), torch.zeros_like(weight), v.new_ones(())
    backward = torch.ops.adaround_ext._soft_quantize_backward
    return (
        ops.soft_quantize(*args)[0],
        backward(ones, 0 * one, *args),
        backward(zeros, one, *args),
    )


def eager(weight: Tensor, v: Tensor, qmin: int, qmax: int, beta: float) -> tuple[Tensor, ...]:
    leaf = v.clone().requires_grad_()
    weight_q, reg = reference.soft_quantize(weight, leaf, *_grid(v.device), qmin, qmax, beta)
    (dweight_q,) = torch.autograd.grad(weight_q.sum(), leaf, retain_graph=True)
    (dreg,) = torch.autograd.grad(reg, leaf)
    return weight_q.detach(), dweight_q, dreg


each = pytest.mark.parametrize("derivatives", [op, op_backward, eager])
closed_clamp = pytest.mark.skipif(
    torch.__version__ >= (2, 14), reason="torch's clamp has no derivative at its limits since 2.14"
)
each_closed = pytest.mark.parametrize(
    "derivatives", [op, op_backward, pytest.param(eager, marks=closed_clamp)]
)


def around(value: float, device: torch.device) -> Tensor:
    """The 1001 consecutive float32 numbers around ``value``, ascending."""
    bits = torch.tensor(abs(value)).view(torch.int32) + torch.arange(-500, 501)
    numbers = bits.to(torch.int32).view(torch.float32) * math.copysign(1, value)
    return numbers.sort().values.view(1, -1).to(device)


@each_closed
def test_upper_clip_of_h_is_inclusive(device: torch.device, derivatives: Derivatives) -> None:
    v = around(CLIP_EDGE, device)
    weight_q, dweight_q, _ = derivatives(torch.zeros_like(v), v, 0, 7, 2.0)
    assert float(weight_q.max()) == 1
    assert (dweight_q[weight_q < 1] > 0.09).all()
    # h reaches 1 exactly for some V, with the derivative of the inside; beyond there is none.
    at_edge = (weight_q == 1) & (dweight_q > 0)
    beyond = dweight_q == 0
    assert at_edge.any()
    assert beyond.any()
    assert (weight_q[beyond] == 1).all()
    assert v[at_edge].max() <= v[beyond].min() + 1e-5


@each
def test_lower_clip_of_h(device: torch.device, derivatives: Derivatives) -> None:
    v = around(-CLIP_EDGE, device)
    weight_q, dweight_q, _ = derivatives(torch.zeros_like(v), v, 0, 7, 2.0)
    assert float(weight_q.min()) == 0
    assert (dweight_q[weight_q > 0] > 0.09).all()
    assert (weight_q[dweight_q == 0] == 0).all()
    assert (dweight_q == 0).any()


def edge_v(device: torch.device, derivatives: Derivatives) -> tuple[Tensor, Tensor]:
    """V where h is exactly 1 and still has a derivative, and V a little below."""
    v = around(CLIP_EDGE, device)
    weight_q, dweight_q, _ = derivatives(torch.zeros_like(v), v, 0, 7, 2.0)
    at_edge = v[(weight_q == 1) & (dweight_q > 0)][-1:].view(1, 1)
    return at_edge, v[:, :1]


@each_closed
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_clamp_of_the_grid_is_inclusive(
    device: torch.device, dtype: torch.dtype, derivatives: Derivatives
) -> None:
    at_edge, inside = edge_v(device, derivatives)
    one = torch.ones(1, 1, device=device, dtype=dtype)
    # code = floor(w) + h against [0, 7]
    assert float(derivatives(-0.5 * one, at_edge, 0, 7, 2.0)[1]) > 0.09  # -1 + 1 = qmin
    assert float(derivatives(-0.5 * one, inside, 0, 7, 2.0)[1]) == 0  # just below qmin
    assert float(derivatives(6.5 * one, at_edge, 0, 7, 2.0)[1]) > 0.09  # 6 + 1 = qmax
    assert float(derivatives(7.5 * one, 0 * at_edge, 0, 7, 2.0)[1]) == 0  # 7 + 1/2
    assert float(derivatives(-1.5 * one, 0 * at_edge, 0, 7, 2.0)[1]) == 0  # -2 + 1/2


@each
@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0, 3.0, 20.0])
def test_regularizer_has_no_gradient_at_one_half(
    device: torch.device, beta: float, derivatives: Derivatives
) -> None:
    v = torch.tensor([[0.0, -0.0, 1e-3, -1e-3]], device=device)
    weight_q, dweight_q, dreg = derivatives(torch.zeros_like(v), v, 0, 7, beta)
    assert torch.equal(weight_q[0, :2], torch.full_like(v[0, :2], 0.5))
    assert (dweight_q > 0.29).all()  # 1.2 / 4
    assert torch.equal(dreg[0, :2], torch.zeros_like(v[0, :2]))
    assert dreg[0, 2] <= 0 <= dreg[0, 3]  # downhill is away from 1/2


def test_regularizer_at_the_clip(device: torch.device) -> None:
    v = torch.tensor([[-9.0, 9.0, 0.0]], device=device)
    for beta in (1.0, 2.0, 20.0):
        _, reg = ops.soft_quantize(torch.zeros_like(v), v, *_grid(device), 0, 7, beta)
        assert float(reg) == 1  # 0, 0 and 1


@pytest.mark.parametrize("dtype", DTYPES)
def test_hard_decision_goes_up_from_zero(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    wide = arithmetic_dtype(dtype)
    tiny = torch.finfo(wide).tiny
    v = torch.tensor([[0.0, -0.0, tiny, -tiny, 5, -5]], device=device, dtype=wide)
    scale, zero_point = _grid(device)
    weight = torch.full_like(v, 2.5, dtype=dtype)
    codes = ops.hard_quantize(weight, v, scale.to(wide), zero_point, -8, 7)
    assert codes.tolist() == [[3, 3, 3, 2, 3, 2]]
    weight = torch.tensor([[100.0, -100.0, 7, 7, -8, -9]], device=device, dtype=dtype)
    codes = ops.hard_quantize(weight, v, scale.to(wide), zero_point, -8, 7)
    assert codes.tolist() == [[7, -8, 7, 7, -7, -8]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_weights_on_grid_lines(
    device: torch.device, dtype: torch.dtype, grid: tuple[int, bool, str, int]
) -> None:
    skip_unsupported(device, dtype)
    sample = make_sample(device, 7, 60, dtype=dtype, grid=grid)
    s = reference.expand_grid(sample.scale, 7, 60)
    z = reference.expand_grid(sample.zero_point, 7, 60)
    steps = torch.randint(sample.qmin - 2, sample.qmax + 3, (7, 60), device=device) - z
    weight = (s * steps).to(dtype)  # w / s is an integer or an ulp beside it
    check_start_is_nearest(weight, sample.scale, sample.zero_point, sample.qmin, sample.qmax)


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_go_to_even_codes(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    weight = (torch.arange(-24, 25, device=device) / 8).view(1, -1).to(dtype)  # every half step
    scale = torch.full((1, 1), 0.25, device=device, dtype=arithmetic_dtype(dtype))
    zero_point = torch.zeros(1, 1, dtype=torch.int32, device=device)
    codes = check_start_is_nearest(weight, scale, zero_point, -8, 7)
    assert codes[0, 23:30].tolist() == [0, 0, 0, 1, 2, 2, 2]  # -1/2, 0, 1/2, ..., 5/2


def check_start_is_nearest(
    weight: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    """The first hard decision is torch.round, and every V may still move."""
    v = reference.initial_v(weight, scale)
    assert v.dtype == scale.dtype
    codes = ops.hard_quantize(weight, v, scale, zero_point, qmin, qmax)
    s = reference.expand_grid(scale, *weight.shape)
    z = reference.expand_grid(zero_point, *weight.shape)
    nearest = ((weight / s).round() + z).clamp(qmin, qmax)
    assert torch.equal(codes, nearest.to(codes.dtype))
    below = (weight / s).floor() + z
    _, dweight_q, _, _ = ops.soft_quantize_with_grad(weight, v, scale, zero_point, qmin, qmax, 2.0)
    assert (dweight_q[(below >= qmin) & (below < qmax)] > 0).all()
    return codes


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7FC00001, 0x7FC001FF, 0xFFC00000, 0xFFC000FF])
def test_nan_in_v_is_not_hidden(device: torch.device, bits: int) -> None:
    sample = make_sample(device, 3, 40)
    clean, _ = ops.soft_quantize(*sample.args, 4.0)
    sample.v.view(torch.int32)[1, 17] = bits - (bits >> 31 << 32)  # NaN with a payload and a sign
    for weight_q, reg in (
        ops.soft_quantize(*sample.args, 4.0),
        ops.soft_quantize_with_grad(*sample.args, 4.0)[::2],
    ):
        assert weight_q[1, 17].isnan()
        assert reg.isnan()
        weight_q[1, 17] = clean[1, 17]
        torch.testing.assert_close(weight_q, clean, rtol=0, atol=1e-6)


def test_nan_gives_the_lowest_code(device: torch.device) -> None:
    """No integer is NaN: what a conversion made of it would depend on the device."""
    weight = torch.full((3, 40), torch.nan, device=device)
    scale = torch.ones(1, 1, device=device)
    zero_point = torch.zeros(1, 1, dtype=torch.int32, device=device)
    codes = ops.hard_quantize(weight, torch.zeros_like(weight), scale, zero_point, 3, 7)
    assert (codes == 3).all()
    feedback = torch.zeros(1, 40, 40, device=device)
    order = torch.arange(40, device=device)[None]
    assert (ops.gptq(weight, feedback, order, scale, zero_point, -8, -3) == -8).all()
