"""The quantization ops against the reference in float64: values, layouts, sizes, same bits."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from adaround_ext import ops, reference
from tests.support.helpers import (
    DTYPES,
    GRIDS,
    SIZES,
    Sample,
    assert_near_oracle,
    instruction_set,  # noqa: F401  a fixture
    make_sample,
    reg_eps,
    skip_unsupported,
    strided,
    threads,
    transposed,
    unaligned,
    weight_eps,
)

pytestmark = pytest.mark.usefixtures("instruction_set")

LAYOUTS = {"unaligned": unaligned, "transposed": transposed, "strided": strided}


def differentiate(sample: Sample, beta: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What soft_quantize_with_grad returns, from the reference by autograd."""
    v = sample.v.clone().requires_grad_()
    args = (sample.weight, v, sample.scale, sample.zero_point, sample.qmin, sample.qmax)
    weight_q, reg = reference.soft_quantize(*args, beta)
    (dweight_q,) = torch.autograd.grad(weight_q.sum(), v, retain_graph=True)
    (dreg,) = torch.autograd.grad(reg, v)
    return weight_q.detach().to(sample.weight.dtype), dweight_q, reg.detach(), dreg


def check_soft_quantize(sample: Sample, beta: float) -> None:
    """All three soft ops against the oracle."""
    exact = differentiate(sample.double(), beta)
    eager = differentiate(sample, beta)
    numel = max(sample.weight.numel(), 1)
    scale = float(sample.scale.max()) if sample.scale.numel() else 0.0
    eps = {
        "weight_q": weight_eps(sample),
        "dweight_q_dv": 4 * torch.finfo(sample.v.dtype).eps * scale,
        "reg": numel * reg_eps(beta, sample.v.dtype),
        "dreg_dv": reg_eps(beta, sample.v.dtype),
    }
    # Not the same bits as each other: the compiler may fuse a product and a sum in one only.
    weight_q, reg = ops.soft_quantize(*sample.args, beta)
    assert_near_oracle(weight_q, eager[0], exact[0], eps["weight_q"], "weight_q")
    assert_near_oracle(reg, eager[2], exact[2], eps["reg"], "reg")
    got = ops.soft_quantize_with_grad(*sample.args, beta)
    for i, name in enumerate(eps):
        assert got[i].dtype == eager[i].dtype
        assert_near_oracle(got[i], eager[i], exact[i], eps[name], name)

    grad_weight_q, grad_reg = torch.randn_like(sample.weight), torch.randn_like(reg)
    grad_v = torch.ops.adaround_ext._soft_quantize_backward(
        grad_weight_q, grad_reg, *sample.args, beta
    )
    assert grad_v.dtype == sample.v.dtype
    outer = float(grad_weight_q.abs().max()) if sample.weight.numel() else 0.0
    assert_near_oracle(
        grad_v,
        grad_weight_q * eager[1] + grad_reg * eager[3],
        grad_weight_q * exact[1] + grad_reg * exact[3],
        outer * eps["dweight_q_dv"] + abs(float(grad_reg)) * eps["dreg_dv"],
        "grad_v",
    )


def check_hard_quantize(sample: Sample) -> None:
    """hard_quantize and dequantize, with nothing transcendental in them, agree in every bit."""
    codes = ops.hard_quantize(*sample.args)
    assert codes.dtype == (torch.int8 if sample.qmin < 0 else torch.uint8)
    assert torch.equal(codes, reference.hard_quantize(*sample.args))
    assert torch.equal(codes, reference.hard_quantize(*sample.double().args))
    arguments = (codes, sample.scale, sample.zero_point, sample.weight.dtype)
    back = ops.dequantize(*arguments)
    assert back.dtype == sample.weight.dtype
    assert torch.equal(back, reference.dequantize(*arguments))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_sizes(device: torch.device, dtype: torch.dtype, rows: int, cols: int) -> None:
    skip_unsupported(device, dtype)
    sample = make_sample(device, rows, cols, dtype=dtype)
    check_soft_quantize(sample, beta=4.0)
    check_hard_quantize(sample)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grid", GRIDS)
def test_grids(device: torch.device, dtype: torch.dtype, grid: tuple[int, bool, str, int]) -> None:
    skip_unsupported(device, dtype)
    sample = make_sample(device, 27, 60, dtype=dtype, grid=grid)  # two chunks, cut within a row
    check_soft_quantize(sample, beta=2.0)
    check_hard_quantize(sample)


@pytest.mark.parametrize("beta", [1.0, 1.5, 2.0, 8.0, 20.0])
def test_betas(device: torch.device, beta: float) -> None:
    check_soft_quantize(make_sample(device, 16, 64), beta)


def test_far_v_saturates(device: torch.device) -> None:
    v = torch.tensor([[-torch.inf, -1e30, -100, -3, 3, 100, 1e30, torch.inf]], device=device)
    one = torch.ones(1, 1, device=device)
    zero = torch.zeros(1, 1, dtype=torch.int32, device=device)
    got = ops.soft_quantize_with_grad(torch.full_like(v, 0.5), v, one, zero, -8, 7, 3.0)
    expected = (v > 0).float()
    assert torch.equal(got[0], expected)
    assert torch.equal(got[1], torch.zeros_like(v))
    assert got[2] == 0
    assert torch.equal(got[3], torch.zeros_like(v))


def test_every_code_dequantizes(device: torch.device) -> None:
    scale = torch.full((1, 1), 0.3, device=device)
    for codes in (torch.arange(-128, 128, dtype=torch.int8), torch.arange(256, dtype=torch.uint8)):
        zero_point = torch.full((1, 1), 7, dtype=torch.int32, device=device)
        got = ops.dequantize(codes.view(1, -1).to(device), scale, zero_point)
        assert torch.equal(got, (codes.to(device).float() - 7).view(1, -1) * 0.3)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
@pytest.mark.parametrize("dtype", DTYPES)
def test_layouts_give_the_same_bits(
    device: torch.device, dtype: torch.dtype, layout: object
) -> None:
    skip_unsupported(device, dtype)
    sample = make_sample(device, 9, 132, dtype=dtype, grid=(4, False, "each", 3))
    moved = Sample(*(layout(t) for t in sample.args[:4]), sample.qmin, sample.qmax)
    for got, expected in zip(all_results(moved), all_results(sample), strict=True):
        assert got.is_contiguous()
        assert torch.equal(got, expected)


def test_expanded_arguments(device: torch.device) -> None:
    sample = make_sample(device, 5, 33, grid=(4, False, "one", 1))
    stretched = Sample(
        sample.weight[:1].expand(5, 33),
        sample.v[:, :1].expand(5, 33),
        sample.scale.expand(5, 3),
        sample.zero_point.expand(5, 3),
        sample.qmin,
        sample.qmax,
    )
    plain = Sample(*(t.contiguous() for t in stretched.args[:4]), sample.qmin, sample.qmax)
    for got, expected in zip(all_results(stretched), all_results(plain), strict=True):
        assert torch.equal(got, expected)


def all_results(sample: Sample) -> Iterator[Tensor]:
    """Every output of every functional op on one sample."""
    yield from ops.soft_quantize(*sample.args, 3.0)
    yield from ops.soft_quantize_with_grad(*sample.args, 3.0)
    grad = sample.weight * 0.7  # keeps the sample's strides where they are dense
    yield torch.ops.adaround_ext._soft_quantize_backward(
        grad, sample.v.new_tensor(0.3), *sample.args, 3.0
    )
    codes = ops.hard_quantize(*sample.args)
    yield codes
    yield ops.dequantize(codes, sample.scale, sample.zero_point, sample.weight.dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    sample = make_sample(device, 9, 5001, dtype=dtype, grid=(4, False, "each", 3))  # 44 chunks
    with threads(1):
        one, again = list(all_results(sample)), list(all_results(sample))
    with threads(2):
        two = list(all_results(sample))
    for first, second, threaded in zip(one, again, two, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, threaded)


def test_arguments_are_not_changed(device: torch.device) -> None:
    sample = make_sample(device)
    before = [t.clone() for t in sample.args[:4]]
    list(all_results(sample))
    for tensor, copy in zip(sample.args[:4], before, strict=True):
        assert torch.equal(tensor, copy)
