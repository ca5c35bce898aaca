"""The documented contract of the ops, written again: which arguments are valid, what comes of them.

It does not share a line with the checks in csrc, which it judges.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from tests.emulation import EMULATED
from tests.fuzz.op_arguments import PACKED, QUANTIZERS, SEARCHES, WRITTEN, Arguments

_STORAGE = (torch.float32, torch.bfloat16, torch.float16)
_MOST = 2**23  # steps and sweeps
_INTEGERS = ("qmin", "qmax", "max_sweeps", "steps", "seed", "bits", "cols")


class Invalid(Exception):
    """Arguments that an op must refuse."""


class Unsettled(Exception):
    """Arguments of which the contract says nothing: numbers that torch may convert or not."""


def must(condition: bool, rule: str) -> None:
    if not condition:
        raise Invalid(rule)


def check(op: str, given: Arguments) -> None:
    """Raises Invalid or Unsettled unless the op must take the arguments."""
    _check_kinds(given)
    checks = {"gptq": _gptq, "dequantize": _dequantize}
    if op in QUANTIZERS:
        _quantizer(op, given)
    elif op in SEARCHES:
        _search(op, given)
    elif op in PACKED:
        _packed(op, given)
    else:
        checks[op](given)
    _check_written(op, given)


def devices(given: Arguments) -> set[str]:
    """Of all tensors."""
    return {t.device.type for t in given.values() if isinstance(t, Tensor)}


def is_huge(given: Arguments) -> bool:
    """Whether an argument, laid out in memory, or a result of its rows may not fit."""
    tensors = (t for t in given.values() if isinstance(t, Tensor))
    return any(max(t.numel() * t.element_size(), *t.shape, 0) > 2**29 for t in tensors)


def outputs(op: str, given: Arguments) -> list[tuple[list[int], torch.dtype]]:
    """Shapes and dtypes of what the op returns."""
    code = torch.int8 if given.get("qmin", 0) < 0 else torch.uint8
    if op == "dequantize":
        return [(list(given["codes"].shape), given["dtype"])]
    if op in WRITTEN:
        return []
    if op == "pack_bits":
        rows, cols = given["codes"].shape
        return [([rows, -(-cols * given["bits"] // 8)], torch.uint8)]
    if op == "unpack_bits":
        return [([given["packed"].shape[0], given["cols"]], code)]
    if op == "packed_linear":
        x = given["x"]
        return [([*x.shape[:-1], given["packed"].shape[0]], x.dtype)]
    weight, shape = given["weight"], list(given["weight"].shape)
    if op in ("hard_quantize", "gptq"):
        return [(shape, code)]
    v = given["v"].dtype
    if op == "_soft_quantize_backward":
        return [(shape, v)]
    if op == "soft_quantize":
        return [(shape, weight.dtype), ([], v)]
    return [(shape, weight.dtype), (shape, v), ([], v), (shape, v)]


def _check_kinds(given: Arguments) -> None:
    flags = ("as_error", "normalize")
    numbers = (*_INTEGERS, *flags, "beta", "dtype")
    for name, value in given.items():
        if name not in numbers:
            optional = name == "bias" and value is None
            must(isinstance(value, Tensor) or optional, f"{name} is no tensor")
            must(optional or value.layout == torch.strided, f"{name} is not strided")
        elif name == "dtype":
            if not isinstance(value, torch.dtype):
                raise Unsettled(name)
        elif type(value) is not (bool if name in flags else int) and not (
            name == "beta" and type(value) in (int, float)
        ):
            raise Unsettled(name)
        elif name in _INTEGERS:
            must(-(2**63) <= value < 2**63, f"{name} is beyond 64 bits")
    must(len(devices(given)) == 1, "several devices")


def _matrix(name: str, t: Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    must(t.dtype in dtypes, f"{name} has dtype {t.dtype}")
    must(t.dim() == 2, f"{name} is no matrix")


def _same(name: str, t: Tensor, shape: torch.Size, dtype: torch.dtype) -> None:
    must(t.shape == shape, f"{name} has shape {list(t.shape)}")
    must(t.dtype == dtype, f"{name} has dtype {t.dtype}")


def _scale(scale: Tensor, rows: int, cols: int, dtype: torch.dtype) -> None:
    _matrix("scale", scale, (dtype,))
    must(scale.shape[0] in (1, rows), "scale has neither a row nor one a row")
    must(scale.shape[1] >= 1 and cols % scale.shape[1] == 0, "groups of unequal size")


def _grid(given: Arguments, rows: int, cols: int, dtype: torch.dtype) -> None:
    _scale(given["scale"], rows, cols, dtype)
    _same("zero_point", given["zero_point"], given["scale"].shape, torch.int32)


def _range(given: Arguments) -> None:
    qmin, qmax = given["qmin"], given["qmax"]
    must(qmin < qmax, "empty range")
    must(qmin >= -128 and qmax <= (127 if qmin < 0 else 255), "range beyond 8 bits")


def _per_gram(name: str, t: Tensor, rows: int, cols: int, dtype: torch.dtype) -> None:
    must(t.dim() == 3 and t.shape[0] >= 1 and rows % t.shape[0] == 0, f"{name} has other groups")
    _same(name, t, torch.Size([t.shape[0], cols, cols]), dtype)


def _quantizer(op: str, given: Arguments) -> None:
    weight = given["weight"]
    _matrix("weight", weight, (*_STORAGE, torch.float64))
    dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    _grid(given, *weight.shape, dtype)
    _range(given)
    _same("v", given["v"], weight.shape, dtype)
    if "beta" in given:
        least, most = 1.0, torch.finfo(torch.float32).max
        must(least <= given["beta"] <= most, "beta")  # NaN is not
    if op == "_soft_quantize_backward":
        _same("grad_weight_q", given["grad_weight_q"], weight.shape, weight.dtype)
        must(given["grad_reg"].dtype == dtype and given["grad_reg"].numel() == 1, "grad_reg")
    if op == "rounding_step_":
        _step(given, dtype)


def _step(given: Arguments, dtype: torch.dtype) -> None:
    shape, grad = given["weight"].shape, given["grad"]
    _same("exp_avg", given["exp_avg"], shape, dtype)
    _same("exp_avg_sq", given["exp_avg_sq"], shape, dtype)
    must(grad.dtype in ((dtype,) if dtype == torch.float64 else _STORAGE), "grad has another dtype")
    _same("grad", grad, shape, grad.dtype)
    _same("weight_q", given["weight_q"], shape, grad.dtype)
    schedule, step = given["schedule"], given["step"]
    _matrix("schedule", schedule, (torch.float32,))
    must(schedule.shape[0] >= 1 and schedule.shape[1] == 5, "schedule has another shape")
    must(step.dtype == torch.int64 and step.numel() == 1, "step is no counter")


def _dequantize(given: Arguments) -> None:
    codes, dtype = given["codes"], given["dtype"]
    _matrix("codes", codes, (torch.int8, torch.uint8))
    must(dtype in (*_STORAGE, torch.float64), "dtype")
    _grid(given, *codes.shape, torch.float64 if dtype == torch.float64 else torch.float32)


def _search(op: str, given: Arguments) -> None:
    _range(given)
    codes, residual = given["codes"], given["residual"]
    _matrix("codes", codes, (torch.int8 if given["qmin"] < 0 else torch.uint8,))
    _matrix("residual", residual, (torch.float32, torch.float64))
    _same("residual", residual, codes.shape, residual.dtype)
    _per_gram("gram", given["gram"], *codes.shape, residual.dtype)
    _scale(given["scale"], *codes.shape, residual.dtype)
    count = given["max_sweeps" if op == "refine_" else "steps"]
    must(0 <= count <= _MOST, "too many steps")
    must(given.get("seed", 0) >= 0, "negative seed")


def _gptq(given: Arguments) -> None:
    weight, feedback, order = given["weight"], given["feedback"], given["order"]
    _matrix("weight", weight, (torch.float32, torch.float64))
    rows, cols = weight.shape
    _grid(given, rows, cols, weight.dtype)
    _range(given)
    _per_gram("feedback", feedback, rows, cols, weight.dtype)
    _same("order", order, torch.Size([feedback.shape[0], cols]), torch.int64)
    if _checks_values(order) and order.numel() and not is_huge(given):
        columns = torch.arange(cols).expand_as(order)
        must(torch.equal(order.sort(-1).values, columns), "order is no permutation")


def _checks_values(t: Tensor) -> bool:
    """Whether ops look at the numbers, which on CUDA would take a synchronisation."""
    return t.device.type == "cpu" and not EMULATED


def _packed(op: str, given: Arguments) -> None:
    bits, qmin = given["bits"], given["qmin"]
    must(1 <= bits <= 8, "bits")
    must(qmin >= -128 and qmin + 2**bits - 1 <= (127 if qmin < 0 else 255), "qmin")
    if op == "pack_bits":
        codes = given["codes"]
        _matrix("codes", codes, (torch.int8 if qmin < 0 else torch.uint8,))
        if _checks_values(codes) and codes.numel() and not is_huge(given):
            low, high = (int(value) for value in codes.aminmax())
            must(qmin <= low and high <= qmin + 2**bits - 1, "codes out of range")
        return
    packed, x = given["packed"], given.get("x")
    if x is not None:
        must(x.dtype in _STORAGE and x.dim() >= 1, "x")
    cols = given["cols"] if x is None else x.shape[-1]
    must(cols >= 0, "cols")
    _matrix("packed", packed, (torch.uint8,))
    must(packed.shape[1] == math.ceil(cols * bits / 8), "packed has another width")
    if x is not None:
        _grid(given, packed.shape[0], cols, torch.float32)
        if given["bias"] is not None:
            _same("bias", given["bias"], packed.shape[:1], x.dtype)


def _check_written(op: str, given: Arguments) -> None:
    """What is written is contiguous and shares no memory."""
    written = WRITTEN.get(op, ())
    for name in written:
        t: Tensor = given[name]
        if t.requires_grad or t.is_inference():
            raise Unsettled(name)
        if t.device.type == "meta":
            continue
        must(t.is_contiguous(), f"{name} is not contiguous")
        others: list[tuple[str, Any]] = [(n, o) for n, o in given.items() if isinstance(o, Tensor)]
        for other, tensor in others:
            if other != name and _share(t, tensor):
                raise Invalid(f"{name} shares memory with {other}")


def _share(a: Tensor, b: Tensor) -> bool:
    if a.numel() == 0 or b.numel() == 0:
        return False
    (a_begin, a_end), (b_begin, b_end) = _extent(a), _extent(b)
    return a_begin < b_end and b_begin < a_end


def _extent(t: Tensor) -> tuple[int, int]:
    """First address, and the one after the last element."""
    last = sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True))
    return t.data_ptr(), t.data_ptr() + (last + 1) * t.element_size()
