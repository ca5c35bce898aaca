"""What an op must have done with valid arguments: the reference's results, or what must hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaround_ext import reference
from tests.fuzz import op_contract
from tests.fuzz.op_arguments import QUANTIZERS, SEARCHES, WRITTEN, Arguments, OpCase
from tests.fuzz.tensor_changes import LAYOUTS
from tests.fuzz.verdict import require

_MOST_COMPARED = 32  # steps and sweeps of a search, which the oracle does in Python
_LEAST = 1e-43  # some steps of float32's denormals, whose relative error is large
_MOST_BETA = 64.0  # the relative error of a power grows with the exponent


def check_outputs(op: str, given: Arguments, results: list[Tensor]) -> None:
    """Shapes, dtypes and devices, on the meta device too."""
    expected = op_contract.outputs(op, given)
    require(len(results) == len(expected), f"{len(results)} results, not {len(expected)}")
    (device,) = op_contract.devices(given)
    for result, (shape, dtype) in zip(results, expected, strict=True):
        got = (list(result.shape), result.dtype, result.device.type)
        require(got == (shape, dtype, device), f"result {got}, not {(shape, dtype, device)}")


def check_values(case: OpCase, before: Arguments, after: Arguments, results: list[Tensor]) -> None:
    """Against the reference where it is exact or near; codes lie within the range in any case."""
    op = case.op
    if op in ("hard_quantize", "gptq"):
        _check_within(results[0], before)
    with torch.no_grad():
        if op in SEARCHES:
            _check_search(case, before, after)
        elif op == "gptq":
            if case.plain or _only_layouts(case):
                _require_equal("codes", results[0], _gptq(before))
        elif op in QUANTIZERS:
            _CHECKS[op](before, after, results)
        elif op == "packed_linear":
            _check_linear(before, results[0])
        else:
            _require_equal("result", results[0], getattr(reference, op)(*before.values()))


def _only_layouts(case: OpCase) -> bool:
    return not case.aliases and all(name in LAYOUTS for _, name in case.changes)


def _require_equal(name: str, got: Tensor, expected: Tensor) -> None:
    nan = got.isnan() & expected.isnan()
    wrong = int(((got != expected) & ~nan).sum())
    require(not wrong, f"{name}: {wrong} of {got.numel()} values are not the reference's")


def _require_near(
    name: str, got: Tensor, expected: Tensor, tolerance: Tensor, where: Tensor
) -> None:
    """Elements ``where``, as far as the reference's are numbers."""
    got, expected = got.double(), expected.double()
    # A value that the dtype just cannot hold may be its largest in one and infinite in the other.
    counts = where & expected.isfinite() & tolerance.isfinite()
    counts &= expected.abs() < 0.99 * torch.finfo(torch.float16).max
    tolerance = tolerance + _LEAST
    error = (got - expected).abs()
    wrong = counts & ~(error <= tolerance)
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist())
        text = f"{name}{list(at)} is {float(got[at])}, not {float(expected[at])}"
        require(False, f"{text} within {float(tolerance[at]):.3g}; {int(wrong.sum())} such")


def _check_within(codes: Tensor, given: Arguments) -> None:
    if codes.numel():
        low, high = (int(value) for value in codes.aminmax())
        inside = given["qmin"] <= low and high <= given["qmax"]
        require(inside, f"codes in [{low}, {high}] beyond [{given['qmin']}, {given['qmax']}]")


class _Grid:
    """The arguments of a quantizer in the arithmetic's dtype, every element beside its grid."""

    def __init__(self, given: Arguments) -> None:
        self.v = given["v"].detach()
        self.dtype = self.v.dtype
        self.weight = given["weight"].detach().to(self.dtype)
        self.grid = (given["scale"].detach(), given["zero_point"], given["qmin"], given["qmax"])
        shape = self.weight.shape
        if self.weight.numel():
            self.s = reference.expand_grid(self.grid[0], *shape)
            self.z = reference.expand_grid(self.grid[1], *shape)
        else:
            self.s, self.z = self.weight, self.weight
        self.eps = torch.finfo(self.dtype).eps
        h = reference.rectified_sigmoid(self.v)
        self.u = 2 * h - 1
        self.code = torch.floor(self.weight / self.s) + self.z + h
        # Where the last bit decides whether the clamp, or h's clip, is open.
        stretched = torch.sigmoid(self.v) * (reference.ZETA - reference.GAMMA) + reference.GAMMA
        edges = [stretched, stretched - 1, self.code - self.grid[2], self.code - self.grid[3]]
        self.smooth = torch.stack([edge.abs() > 1e-4 for edge in edges]).all(0)
        self.finite = torch.stack([t.isfinite() for t in (self.weight, self.v, self.s)]).all(0)

    def weight_tolerance(self, expected: Tensor, dtype: torch.dtype) -> Tensor:
        """A few roundings of a code, of its distance from the zero point, and of the storage."""
        steps = 4.0 * self.eps * (self.z.double().abs() + 260)
        storage = torch.finfo(dtype)
        return self.s.double().abs() * steps + expected.double().abs() * storage.eps + storage.tiny

    def reg_grad_tolerance(self, beta: float) -> Tensor:
        """Of d reg / d h, which jumps at u = 0 where beta is 1."""
        near = self.u.abs() < 1e-2
        tolerance = torch.full_like(self.u, 16 * self.eps * beta * beta, dtype=torch.float64)
        return tolerance.masked_fill(near, torch.inf) if beta < 2 else tolerance


def _empty(given: Arguments) -> bool:
    return given["weight"].numel() == 0  # type: ignore[no-any-return]


def _check_soft_results(
    given: Arguments, weight_q: Tensor, reg: Tensor, grid: _Grid, beta: float
) -> None:
    expected, expected_reg = reference.soft_quantize(grid.weight, grid.v, *grid.grid, beta)
    dtype = given["weight"].dtype
    tolerance = grid.weight_tolerance(expected, dtype)
    _require_near("weight_q", weight_q, expected.to(dtype), tolerance, grid.finite)
    # Each term, and a sum in float64, which rounds every partial sum of equal terms alike.
    allowed = grid.eps * 8 * (beta + 1) + torch.finfo(torch.float64).eps * abs(float(expected_reg))
    allowed *= grid.v.numel()
    everywhere = torch.ones_like(expected_reg, dtype=torch.bool)
    _require_near("reg", reg, expected_reg, torch.tensor(allowed).double(), everywhere)
    if bool(grid.v.isfinite().all()):
        require(bool(reg.isfinite()), f"reg is {float(reg)} though every v is finite")


def _check_soft(given: Arguments, after: Arguments, results: list[Tensor]) -> None:
    if not _empty(given) and given["beta"] <= _MOST_BETA:
        _check_soft_results(given, *results, _Grid(given), given["beta"])


def _check_soft_with_grad(given: Arguments, after: Arguments, results: list[Tensor]) -> None:
    beta = given["beta"]
    if _empty(given) or beta > _MOST_BETA:
        return
    grid = _Grid(given)
    weight_q, dweight_q, reg, dreg = results
    _check_soft_results(given, weight_q, reg, grid, beta)
    one = torch.ones_like(grid.weight)
    expected, expected_reg = _gradients(grid, one, torch.ones(()), beta)
    where = grid.smooth & grid.finite
    _require_near("dweight_q_dv", dweight_q, expected, 16 * grid.eps * grid.s.abs().double(), where)
    _require_near("dreg_dv", dreg, expected_reg, grid.reg_grad_tolerance(beta), where)


def _check_backward(given: Arguments, after: Arguments, results: list[Tensor]) -> None:
    beta = given["beta"]
    if _empty(given) or beta > _MOST_BETA:
        return
    grid = _Grid(given)
    grad, grad_reg = given["grad_weight_q"].to(grid.dtype), given["grad_reg"].reshape(())
    expected = sum(_gradients(grid, grad, grad_reg, beta))
    tolerance = 16 * grid.eps * (grad * grid.s).abs().double()
    tolerance = tolerance + grad_reg.abs().double() * grid.reg_grad_tolerance(beta)
    # Beyond the dtype's range the chain rule multiplies infinity by the 0 of a clip.
    bounded = ((grad * grid.s).abs() + 4 * beta * grad_reg.abs()).isfinite()
    where = grid.smooth & grid.finite & bounded
    _require_near("grad_v", results[0], expected, tolerance, where)


def _gradients(grid: _Grid, grad: Tensor, grad_reg: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """What comes to v from weight_q and from the regularizer, by autograd of the reference."""
    with torch.enable_grad():
        v = grid.v.clone().requires_grad_()
        weight_q, reg = reference.soft_quantize(grid.weight, v, *grid.grid, beta)
        (of_weight,) = torch.autograd.grad((weight_q * grad).sum(), v, retain_graph=True)
        (of_reg,) = torch.autograd.grad(reg * grad_reg.to(reg.dtype), v)
    return of_weight, of_reg


def _check_hard(given: Arguments, after: Arguments, results: list[Tensor]) -> None:
    if _empty(given):
        return
    grid = _Grid(given)
    expected = reference.hard_quantize(grid.weight, grid.v, *grid.grid)
    known = (torch.floor(grid.weight / grid.s) + grid.z).isnan().logical_not()
    _require_equal("codes", results[0][known], expected[known])


def _check_step(before: Arguments, after: Arguments, results: list[Tensor]) -> None:
    counter = int(before["step"])
    require(int(after["step"]) == min(counter + 1, 2**63 - 1), "step was not advanced by one")
    if _empty(before):
        return
    grid = _Grid(before)
    row = min(max(counter, 0), before["schedule"].shape[0] - 1)
    beta, reg_weight, rate, correction, root = before["schedule"][row].tolist()
    tame = 1 <= beta <= _MOST_BETA and correction > 1e-6 and root > 1e-6
    if not (tame and abs(reg_weight) < 1e6 and abs(rate) < 1e6):
        return
    expected = {n: t.clone() if isinstance(t, Tensor) else t for n, t in before.items()}
    expected["schedule"] = before["schedule"][row : row + 1]
    reference.rounding_step_(*expected.values())
    where = grid.smooth & grid.finite
    where &= (before["grad"].to(grid.dtype) * (grid.s.abs() + 1 / grid.s.abs())).isfinite()
    where &= grid.reg_grad_tolerance(beta).isfinite()
    for name in ("v", "exp_avg", "exp_avg_sq"):
        old, new = before[name].double(), expected[name].double()
        # exp_avg_sq of 0 and less divides rounding errors by next to nothing.
        steady = before["exp_avg_sq"] > 1e-6 if name == "v" else torch.ones_like(where)
        change = (new - old).abs() + before["grad"].double().abs() * grid.s.abs()
        tolerance = 1e-3 * change + 1e-4 * (1 + abs(reg_weight)) + 1e-6 * old.abs()
        _require_near(name, after[name], expected[name], tolerance, where & steady)
    moved = dict(before) | {"v": after["v"]}
    weight_q = reference.soft_quantize(grid.weight, after["v"], *grid.grid, 2.0)[0]
    wanted = weight_q - grid.weight if before["as_error"] else weight_q
    tolerance = _Grid(moved).weight_tolerance(weight_q, before["weight_q"].dtype)
    tolerance = tolerance + wanted.double().abs() * torch.finfo(before["weight_q"].dtype).eps
    tolerance = tolerance + 2 * grid.eps * grid.weight.double().abs()
    known = grid.finite & after["v"].isfinite()
    _require_near("weight_q", after["weight_q"], wanted, tolerance, known)


_CHECKS: dict[str, Any] = {
    "soft_quantize": _check_soft,
    "soft_quantize_with_grad": _check_soft_with_grad,
    "_soft_quantize_backward": _check_backward,
    "hard_quantize": _check_hard,
    "rounding_step_": _check_step,
}


def _check_search(case: OpCase, before: Arguments, after: Arguments) -> None:
    changed = after["codes"] != before["codes"]
    _check_within(after["codes"][changed], before)
    count = before["max_sweeps" if case.op == "refine_" else "steps"]
    if not (case.plain or _only_layouts(case)) or before["codes"].numel() == 0:
        return
    if count <= _MOST_COMPARED:
        expected = {name: before[name].clone() for name in WRITTEN[case.op]}
        getattr(reference, case.op)(*(before | expected).values())
        for name, tensor in expected.items():
            _require_equal(name, after[name], tensor)
        return
    # Whatever the way, the residual is that of the codes.
    difference = (after["codes"].double() - before["codes"].double()).to(before["scale"].dtype)
    difference = difference * reference.expand_grid(before["scale"], *changed.shape)
    gram = before["gram"]
    step = torch.bmm(difference.view(len(gram), -1, gram.shape[1]), gram).view(changed.shape)
    _require_equal("residual", after["residual"], before["residual"] + step)


def _gptq(given: Arguments) -> Tensor:
    """By the docstring's words: w_k + sum_{i<k} (w_i - w_q,i) feedback[i, k], to nearest."""
    weight, feedback, order = given["weight"], given["feedback"], given["order"]
    qmin, qmax = given["qmin"], given["qmax"]
    codes = torch.zeros(weight.shape, dtype=torch.int8 if qmin < 0 else torch.uint8)
    if weight.numel() == 0:
        return codes
    s = reference.expand_grid(given["scale"], *weight.shape)
    z = reference.expand_grid(given["zero_point"], *weight.shape)
    rows_each = len(weight) // len(order)
    for group, columns in enumerate(order):
        mine = slice(group * rows_each, (group + 1) * rows_each)
        w, s_mine, z_mine = weight[mine][:, columns], s[mine][:, columns], z[mine][:, columns]
        missed = torch.zeros_like(w)
        for k in range(len(columns)):
            wanted = w[:, k] + missed[:, :k] @ feedback[group, :k, k]
            code = ((wanted / s_mine[:, k]).round() + z_mine[:, k]).clamp(qmin, qmax)
            missed[:, k] = w[:, k] - s_mine[:, k] * (code - z_mine[:, k])
            codes[mine, columns[k]] = code.to(codes.dtype)
    return codes


def _check_linear(given: Arguments, y: Tensor) -> None:
    if y.numel() == 0:
        return
    x, packed, scale = given["x"].double(), given["packed"], given["scale"].double()
    cols, bits_, qmin = x.shape[-1], given["bits"], given["qmin"]
    codes = reference.unpack_bits(packed, bits_, cols, qmin)
    if cols:
        weight = reference.dequantize(codes, scale, given["zero_point"], torch.float64)
    else:
        weight = x.new_zeros(len(packed), 0)
    bias = None if given["bias"] is None else given["bias"].double()
    expected = torch.nn.functional.linear(x, weight, bias)
    size = torch.nn.functional.linear(x.abs(), weight.abs(), None if bias is None else bias.abs())
    # Sums in float32, in another order; the result once more in its own dtype.
    eps = torch.finfo(torch.float32).eps
    storage = torch.finfo(y.dtype)
    tolerance = (cols + 8) * eps * size + storage.eps * expected.abs() + storage.tiny
    _require_near("y", y, expected, tolerance, size < 1e30)
