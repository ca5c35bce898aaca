"""rounding_step_ against the reference in float64 and against torch.optim.Adam."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from adaround_ext import ops, reference
from tests.support.helpers import (
    GRIDS,
    SIZES,
    Sample,
    assert_near_oracle,
    instruction_set,  # noqa: F401  a fixture
    make_sample,
    schedule_row,
    skip_unsupported,
    strided,
    threads,
    transposed,
    unaligned,
    weight_eps,
)

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("instruction_set")]

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
DTYPE_PAIRS = [  # of weight, and of grad and weight_q
    pytest.param((F32, F32), id="f32"),
    pytest.param((BF16, BF16), id="bf16"),
    pytest.param((F16, F16), id="f16"),
    pytest.param((F32, BF16), id="f32-bf16"),
    pytest.param((BF16, F32), id="bf16-f32"),
    pytest.param((F16, BF16), id="f16-bf16"),
    pytest.param((F64, F64), id="f64"),
]
MUTATED = ("v", "exp_avg", "exp_avg_sq", "weight_q")


def make_call(
    sample: Sample, dtype: torch.dtype, row: list[float], *, as_error: bool, normalize: bool
) -> dict[str, object]:
    """Arguments of rounding_step_ in the middle of an optimisation."""
    v = sample.v
    return {
        "v": v.clone(),
        "exp_avg": 0.1 * torch.randn_like(v),
        "exp_avg_sq": 0.01 * torch.rand_like(v) + 1e-3,
        "weight_q": torch.full_like(v, torch.nan, dtype=dtype),
        "grad": torch.randn_like(v).to(dtype),
        "weight": sample.weight,
        "scale": sample.scale,
        "zero_point": sample.zero_point,
        "qmin": sample.qmin,
        "qmax": sample.qmax,
        "schedule": torch.tensor([row], device=v.device),
        "step": torch.zeros(1, dtype=torch.int64, device=v.device),
        "as_error": as_error,
        "normalize": normalize,
    }


def run(module: ModuleType, call: dict[str, object], *, double: bool = False) -> dict[str, Tensor]:
    """What the step leaves in the mutated arguments; those of ``call`` stay as they were."""
    args = dict(call)
    for name, value in call.items():
        if name in MUTATED or name == "step":
            args[name] = value.clone()
    if double:
        for name in (*MUTATED, "grad", "weight", "scale"):
            args[name] = args[name].double()
    module.rounding_step_(*args.values())
    return {name: args[name] for name in (*MUTATED, "step")}


def check_step(sample: Sample, dtype: torch.dtype, row: list[float], **flags: bool) -> None:
    call = make_call(sample, dtype, row, **flags)
    got, eager = run(ops, call), run(reference, call)
    exact = run(reference, call, double=True)
    assert int(got["step"]) == 1
    finfo = torch.finfo(sample.v.dtype)
    for name in MUTATED:
        assert got[name].dtype == call[name].dtype
        # A few roundings of the largest number; beta and reg_weight keep the gradient below it.
        eps = 4 * finfo.eps * float(exact[name].abs().max()) if exact[name].numel() else 0.0
        if name == "weight_q":
            eps = weight_eps(sample, dtype)
        assert_near_oracle(got[name], eager[name], exact[name], eps, name)


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
@pytest.mark.parametrize(("rows", "cols"), SIZES)
def test_sizes(
    device: torch.device, dtypes: tuple[torch.dtype, torch.dtype], rows: int, cols: int
) -> None:
    skip_unsupported(device, dtypes[0])
    sample = make_sample(device, rows, cols, dtype=dtypes[0])
    check_step(sample, dtypes[1], schedule_row(9, 4.0, 0.02), as_error=False, normalize=False)


@pytest.mark.parametrize("as_error", [False, True], ids=["weight_q", "error"])
@pytest.mark.parametrize("normalize", [False, True], ids=["plain", "normalized"])
@pytest.mark.parametrize("beta_reg", [(2.0, 0.0), (1.0, 0.5), (2.0, 0.01), (20.0, 0.01)])
@pytest.mark.parametrize("dtype", [F32, BF16, F64], ids=["f32", "bf16", "f64"])
def test_flags(
    device: torch.device,
    dtype: torch.dtype,
    beta_reg: tuple[float, float],
    normalize: bool,
    as_error: bool,
) -> None:
    skip_unsupported(device, dtype)
    sample = make_sample(device, 5, 60, dtype=dtype, grid=(4, False, "each", 3))
    check_step(sample, dtype, schedule_row(2, *beta_reg), as_error=as_error, normalize=normalize)


@pytest.mark.parametrize("grid", GRIDS)
def test_grids(device: torch.device, grid: tuple[int, bool, str, int]) -> None:
    sample = make_sample(device, 11, 60, grid=grid)
    check_step(sample, F32, schedule_row(1, 8.0, 0.01), as_error=True, normalize=True)


@pytest.mark.parametrize("dtype", [F32, F64], ids=["f32", "f64"])
def test_adam_matches_torch(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    sample = make_sample(device, 4, 70, dtype=dtype)
    steps = 50
    call = make_call(sample, dtype, [], as_error=False, normalize=False)
    rows = [schedule_row(t, 20 - 0.3 * t, 0.02) for t in range(1, steps + 1)]
    call["schedule"] = torch.tensor(rows, device=device)
    call["exp_avg"].zero_()
    call["exp_avg_sq"].zero_()
    param = sample.v.clone().requires_grad_()
    adam = torch.optim.Adam([param], lr=1e-2)
    for t in range(steps):
        grad = torch.randn_like(sample.weight)
        now = (sample.weight, call["v"].clone(), *sample.args[2:])
        beta, reg_weight = call["schedule"][t, :2].tolist()
        grad_reg = sample.v.new_tensor(reg_weight)
        param.grad = torch.ops.adaround_ext._soft_quantize_backward(grad, grad_reg, *now, beta)
        adam.step()
        call["grad"] = grad
        ops.rounding_step_(*call.values())
    assert int(call["step"]) == steps
    assert (call["v"] - sample.v).abs().max() > 0.05  # it did move
    # float64: the schedule's bias corrections are float32; float32: roundings of v in 50 steps.
    torch.testing.assert_close(call["v"], param.detach(), rtol=0, atol=5e-6)
    state = adam.state[param]
    tight = {"rtol": 1e-4, "atol": 1e-7} if dtype == F32 else {"rtol": 1e-11, "atol": 1e-14}
    torch.testing.assert_close(call["exp_avg"], state["exp_avg"], **tight)
    torch.testing.assert_close(call["exp_avg_sq"], state["exp_avg_sq"], **tight)


def test_weight_q_is_soft_quantize_of_the_new_v(device: torch.device) -> None:
    sample = make_sample(device, 7, 90)
    row = schedule_row(3, 4.0, 0.01)
    call = make_call(sample, F32, row, as_error=False, normalize=False)
    got = run(ops, call)
    soft, _ = ops.soft_quantize(sample.weight, got["v"], *sample.args[2:], 4.0)
    torch.testing.assert_close(got["weight_q"], soft, rtol=0, atol=weight_eps(sample))
    errors = run(ops, {**call, "as_error": True})
    assert torch.equal(errors["v"], got["v"])
    # Errors are differences of numbers of the weight's size.
    torch.testing.assert_close(
        errors["weight_q"], soft - sample.weight, rtol=0, atol=2 * weight_eps(sample)
    )


def test_error_is_rounded_once_in_bfloat16(device: torch.device) -> None:
    sample = make_sample(device, 7, 90, grid=(8, True, "each", 1))
    call = make_call(sample, BF16, schedule_row(3), as_error=True, normalize=False)
    exact = run(reference, call, double=True)["weight_q"]
    inside = exact.abs() < 2 * sample.scale  # not those beyond the grid
    error = (run(ops, call)["weight_q"].double() - exact).abs()
    # Were weight_q rounded first, the error would be off by half a bfloat16 step of the weight.
    half_step = torch.finfo(BF16).eps / 2
    assert (error <= half_step * exact.abs() + weight_eps(sample, F32))[inside].all()


def test_no_regularizer_while_its_weight_is_zero(device: torch.device) -> None:
    sample = make_sample(device, 5, 60)
    call = make_call(sample, F32, schedule_row(4, 2.0, 0.0), as_error=False, normalize=False)
    other = {**call, "schedule": torch.tensor([schedule_row(4, 20.0, 0.0)], device=device)}
    got, same = run(ops, call), run(ops, other)
    assert all(torch.equal(got[name], same[name]) for name in got)
    zeros = torch.zeros_like(sample.v)
    still = {**call, "grad": zeros, "exp_avg": zeros, "exp_avg_sq": zeros.clone()}
    assert torch.equal(run(ops, still)["v"], sample.v)
    pulled = {**still, "schedule": torch.tensor([schedule_row(4, 2.0, 0.01)], device=device)}
    assert not torch.equal(run(ops, pulled)["v"], sample.v)


def test_normalize_divides_the_gradient_by_the_squared_scale(device: torch.device) -> None:
    sample = make_sample(device, 5, 60, grid=(4, True, "each", 3))
    row = schedule_row(1, 2.0, 0.3)
    call = make_call(sample, F32, row, as_error=False, normalize=True)
    by_hand = {**call, "grad": call["grad"] / reference.expand_grid(sample.scale, 5, 60).square()}
    by_hand["normalize"] = False
    for name, expected in run(ops, by_hand).items():
        torch.testing.assert_close(run(ops, call)[name], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("start", "used"), [(0, 0), (2, 2), (3, 2), (1000, 2), (-5, 0)])
def test_the_schedule_row_is_kept_in_range(device: torch.device, start: int, used: int) -> None:
    sample = make_sample(device, 3, 40)
    rows = [schedule_row(t, 2.0 + t, 0.01 * t) for t in (1, 2, 3)]
    call = make_call(sample, F32, [], as_error=False, normalize=False)
    call["schedule"] = torch.tensor(rows, device=device)
    call["step"] = torch.tensor([start], device=device)
    got = run(ops, call)
    assert int(got["step"]) == start + 1
    alone = {**call, "schedule": torch.tensor([rows[used]], device=device)}
    expected = run(ops, {**alone, "step": torch.zeros_like(call["step"])})
    assert all(torch.equal(got[name], expected[name]) for name in MUTATED)


def test_the_last_step_of_all_stays(device: torch.device) -> None:
    call = make_call(make_sample(device), F32, schedule_row(1), as_error=False, normalize=False)
    call["step"] = torch.tensor([2**63 - 1], device=device)
    assert int(run(ops, call)["step"]) == 2**63 - 1


@pytest.mark.parametrize("read", [unaligned, transposed, strided])
@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_layouts_give_the_same_bits(
    device: torch.device,
    dtypes: tuple[torch.dtype, torch.dtype],
    read: Callable[[Tensor], Tensor],
) -> None:
    skip_unsupported(device, dtypes[0])
    sample = make_sample(device, 9, 132, dtype=dtypes[0], grid=(4, False, "each", 3))
    call = make_call(sample, dtypes[1], schedule_row(2, 4.0, 0.01), as_error=True, normalize=True)
    expected = run(ops, call)
    moved = dict(call)
    for name in ("grad", "weight", "scale", "zero_point", "schedule"):
        moved[name] = read(call[name])
    for name in MUTATED:
        moved[name] = unaligned(call[name])
    ops.rounding_step_(*moved.values())
    for name, tensor in expected.items():
        assert torch.equal(moved[name], tensor), name


@pytest.mark.parametrize("dtypes", DTYPE_PAIRS)
def test_same_bits_for_any_number_of_threads(
    device: torch.device, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    skip_unsupported(device, dtypes[0])
    sample = make_sample(device, 9, 5001, dtype=dtypes[0], grid=(4, False, "each", 3))
    call = make_call(sample, dtypes[1], schedule_row(2, 4.0, 0.01), as_error=False, normalize=True)
    with threads(1):
        one, again = run(ops, call), run(ops, call)
    with threads(2):
        two = run(ops, call)
    for name in one:
        assert torch.equal(one[name], again[name])
        assert torch.equal(one[name], two[name])


def test_nan_stays_where_it_came_in(device: torch.device) -> None:
    sample = make_sample(device, 3, 40)
    for name in ("v", "grad", "exp_avg"):
        call = make_call(sample, F32, schedule_row(2, 4.0, 0.01), as_error=False, normalize=False)
        call["weight"] = 0.5 * sample.scale.expand(3, 40)  # the clamp is open
        call["v"][1, 17] = 0.3
        clean = run(ops, call)
        call[name][1, 17] = torch.nan
        got = run(ops, call)
        for out in ("v", "weight_q"):
            assert got[out][1, 17].isnan()
            got[out][1, 17] = clean[out][1, 17]
            assert torch.equal(got[out], clean[out])
