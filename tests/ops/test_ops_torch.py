"""The ops as citizens of PyTorch: opcheck, gradients, torch.compile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaround_ext import ops
from tests.support.helpers import (
    GRIDS,
    Sample,
    make_sample,
    schedule_row,
    skip_unsupported,
    transposed,
)

OPS = torch.ops.adaround_ext


def step_arguments(sample: Sample, dtype: torch.dtype) -> tuple[Any, ...]:
    v, weight = sample.v, sample.weight
    device = v.device
    return (
        v.clone(),
        torch.zeros_like(v),
        torch.zeros_like(v),
        torch.empty_like(weight, dtype=dtype),
        torch.randn_like(v).to(dtype),
        *(weight, sample.scale, sample.zero_point, sample.qmin, sample.qmax),
        torch.tensor([schedule_row(1), schedule_row(2, 8.0, 0.01)], device=device),
        torch.zeros(1, dtype=torch.int64, device=device),
        True,
        False,
    )


def opcheck_arguments(name: str, sample: Sample) -> tuple[Any, ...]:
    weight = sample.weight
    if name == "soft_quantize":
        leaf = sample.v.clone().requires_grad_()
        return (weight, leaf, *sample.args[2:], 4.0)
    if name == "soft_quantize_with_grad":
        return (*sample.args, 4.0)
    if name == "_soft_quantize_backward":
        return (torch.randn_like(weight), sample.v.new_ones(()), *sample.args, 4.0)
    if name == "rounding_step_":
        return step_arguments(sample, torch.bfloat16)
    codes = ops.hard_quantize(*sample.args)
    if name == "hard_quantize":
        return sample.args
    if name == "dequantize":
        return codes, sample.scale, sample.zero_point, torch.bfloat16
    cols = weight.shape[1]
    gram = torch.eye(cols, device=weight.device).expand(2, cols, cols)
    if name == "gptq":
        order = torch.arange(cols, device=weight.device).expand(2, cols)
        return weight, gram, order, *sample.args[2:]
    settings = {"refine_": (3,), "tabu_search_": (3, 0)}[name]
    return (
        codes,
        torch.randn_like(sample.v),
        gram,
        sample.scale,
        sample.qmin,
        sample.qmax,
        *settings,
    )


@pytest.mark.parametrize(
    "name",
    [
        "soft_quantize",
        "_soft_quantize_backward",
        "soft_quantize_with_grad",
        "rounding_step_",
        "hard_quantize",
        "dequantize",
        "refine_",
        "tabu_search_",
        "gptq",
    ],
)
def test_opcheck(device: torch.device, name: str) -> None:
    grid = (4, False, "each", 3)
    sample = make_sample(device, 4, 12, grid=grid)
    torch.library.opcheck(getattr(OPS, name).default, opcheck_arguments(name, sample))


@pytest.mark.parametrize(
    "grid", [GRIDS[i].values[0] for i in (0, 4, 6)], ids=["tensor", "group", "8-bit"]
)
@pytest.mark.parametrize("beta", [1.0, 2.0, 5.0])
def test_gradcheck(device: torch.device, grid: tuple[int, bool, str, int], beta: float) -> None:
    skip_unsupported(device, torch.float64)
    sample = make_sample(device, 3, 24, dtype=torch.float64, grid=grid)

    def of_v(v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.soft_quantize(sample.weight, v, *sample.args[2:], beta)

    assert torch.autograd.gradcheck(of_v, sample.v.clone().requires_grad_())


@pytest.mark.parametrize("used", ["weight_q", "reg", "both"])
def test_backward_of_either_output(device: torch.device, used: str) -> None:
    sample = make_sample(device, 4, 33)
    _, dweight_q, _, dreg = ops.soft_quantize_with_grad(*sample.args, 3.0)
    leaf = sample.v.clone().requires_grad_()
    weight_q, reg = ops.soft_quantize(sample.weight, leaf, *sample.args[2:], 3.0)
    loss, expected = torch.zeros((), device=device), torch.zeros_like(leaf)
    if used != "reg":
        loss, expected = (
            loss + weight_q.sum(),
            expected + dweight_q,
        )  # an expanded gradient comes in
    if used != "weight_q":
        loss, expected = loss + 0.5 * reg, expected + 0.5 * dreg
    loss.backward()
    torch.testing.assert_close(leaf.grad, expected)


def test_only_v_gets_a_gradient(device: torch.device) -> None:
    sample = make_sample(device, 4, 33)
    weight, v, scale = (t.clone().requires_grad_() for t in sample.args[:3])
    weight_q, reg = ops.soft_quantize(weight, v, scale, *sample.args[3:], 3.0)
    (weight_q.sum() + reg).backward()
    assert v.grad is not None
    assert weight.grad is None
    assert scale.grad is None


def test_a_second_derivative_is_refused(device: torch.device) -> None:
    sample = make_sample(device, 4, 33)
    v = sample.v.clone().requires_grad_()
    weight_q, reg = ops.soft_quantize(sample.weight, v, *sample.args[2:], 3.0)
    (grad_v,) = torch.autograd.grad(weight_q.square().sum() + reg, v, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiated once, not twice"):
        grad_v.sum().backward()


def test_compiled_soft_quantize(device: torch.device) -> None:
    sample = make_sample(device, 4, 33)
    noncontiguous = transposed(sample.weight)

    def forward(weight: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return ops.soft_quantize(weight, v, *sample.args[2:], 3.0)

    results = []
    for function in (forward, torch.compile(forward, fullgraph=True)):
        v = sample.v.clone().requires_grad_()
        weight_q, reg = function(noncontiguous, v)
        (grad_v,) = torch.autograd.grad(
            (weight_q, reg), v, (sample.weight, torch.full_like(reg, 0.5))
        )
        results.append((weight_q.detach(), reg.detach(), grad_v))
    for plain, compiled in zip(*results, strict=True):
        assert torch.equal(plain, compiled)


def test_compiled_rounding_step(device: torch.device) -> None:
    sample = make_sample(device, 4, 33)
    plain = step_arguments(sample, torch.float32)
    compiled = tuple(a.clone() if isinstance(a, Tensor) else a for a in plain)
    step = torch.compile(ops.rounding_step_, fullgraph=True, backend="aot_eager")
    for _ in range(2):  # the counter advances between the calls
        ops.rounding_step_(*plain)
        step(*compiled)
    assert int(compiled[11]) == 2
    for a, b in zip(plain, compiled, strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_fake_kernels_give_shapes_and_dtypes(device: torch.device) -> None:
    sample = make_sample(device, 4, 33, dtype=torch.bfloat16, grid=(3, False, "each", 1))
    meta = [t.to("meta") for t in sample.args[:4]]
    weight_q, reg = ops.soft_quantize(*meta, 0, 7, 2.0)
    assert (weight_q.shape, weight_q.dtype) == ((4, 33), torch.bfloat16)
    assert (reg.shape, reg.dtype) == ((), torch.float32)
    assert ops.hard_quantize(*meta, 0, 7).dtype == torch.uint8
    assert ops.hard_quantize(*meta, -4, 3).dtype == torch.int8
    gram, order = meta[0].new_empty(1, 33, 33), meta[0].new_empty(1, 33, dtype=torch.int64)
    codes = ops.gptq(meta[0], gram, order, *meta[2:], 0, 7)
    assert (codes.shape, codes.dtype) == ((4, 33), torch.uint8)
    with pytest.raises(RuntimeError, match="residual must have the shape of codes"):
        ops.tabu_search_(codes, meta[1][:2], gram, meta[2], 0, 7, 3, 0)
    with pytest.raises(RuntimeError, match="v must have the shape of weight"):
        ops.soft_quantize(meta[0], meta[1][:2], *meta[2:], 0, 7, 2.0)
