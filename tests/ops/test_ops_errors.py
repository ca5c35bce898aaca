"""Every argument check of the ops: the message names the argument, the rule and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch

from adaround_ext import ops
from tests.support.helpers import ARGUMENT_ERROR, schedule_row, transposed

ROWS, COLS = 4, 6
Arguments = dict[str, Any]


def arguments(op: str, device: torch.device) -> Arguments:
    """Arguments that the op takes."""
    weight = torch.randn(ROWS, COLS, device=device)
    step = torch.zeros(1, dtype=torch.int64, device=device)
    codes = torch.zeros(ROWS, COLS, dtype=torch.int8, device=device)
    given: Arguments = {
        "grad_weight_q": torch.randn_like(weight),
        "grad_reg": torch.ones((), device=device),
        "v": torch.randn_like(weight),
        "exp_avg": torch.zeros_like(weight),
        "exp_avg_sq": torch.zeros_like(weight),
        "weight_q": torch.zeros_like(weight),
        "grad": torch.randn_like(weight),
        "weight": weight,
        "codes": codes,
        "residual": torch.randn_like(weight),
        "gram": torch.eye(COLS, device=device).repeat(2, 1, 1),
        "scale": torch.full((ROWS, 2), 0.1, device=device),
        "zero_point": torch.zeros(ROWS, 2, dtype=torch.int32, device=device),
        "qmin": -8,
        "qmax": 7,
        "beta": 2.0,
        "schedule": torch.tensor([schedule_row(1)], device=device),
        "step": step,
        "as_error": False,
        "normalize": False,
        "max_sweeps": 3,
        "steps": 3,
        "seed": 0,
        "feedback": torch.randn(2, COLS, COLS, device=device),
        "order": torch.arange(COLS, device=device).repeat(2, 1),
        "dtype": torch.float32,
    }
    return {
        a.name: given[a.name] for a in getattr(torch.ops.adaround_ext, op).default._schema.arguments
    }


def call(op: str, given: Arguments) -> None:
    getattr(torch.ops.adaround_ext, op)(*given.values())


OPS = [
    "soft_quantize",
    "_soft_quantize_backward",
    "soft_quantize_with_grad",
    "rounding_step_",
    "hard_quantize",
    "dequantize",
    "refine_",
    "tabu_search_",
    "gptq",
]
QUANTIZERS = OPS[:5]
SEARCHES = ["refine_", "tabu_search_"]
ON_GRIDS = [*QUANTIZERS, "gptq"]
WITH_RANGES = [*QUANTIZERS, *SEARCHES, "gptq"]

Change = Callable[[Arguments], Any]
# (ops, argument, its bad value from the good arguments, message)
CASES: list[tuple[list[str], str, Change, str]] = [
    (
        QUANTIZERS,
        "weight",
        lambda a: a["weight"].int(),
        "weight must have dtype Float or BFloat16 or Half",
    ),
    (
        ON_GRIDS,
        "weight",
        lambda a: a["weight"][0],
        "weight must be a matrix [rows, cols], got shape [6]",
    ),
    (QUANTIZERS, "v", lambda a: a["v"].bfloat16(), "v must have dtype Float, got BFloat16"),
    (
        QUANTIZERS,
        "v",
        lambda a: a["v"][:2].clone(),
        "v must have the shape of weight, [4, 6], got [2, 6]",
    ),
    (ON_GRIDS, "scale", lambda a: a["scale"].double(), "scale must have dtype Float, got Double"),
    (
        ON_GRIDS,
        "scale",
        lambda a: a["scale"][:3],
        "scale must have shape [4 or 1, n_groups], got [3, 2]",
    ),
    (
        ON_GRIDS,
        "scale",
        lambda a: a["scale"][:, 0],
        "scale must have shape [4 or 1, n_groups], got [4]",
    ),
    (
        ON_GRIDS,
        "scale",
        lambda a: a["scale"][:, :0],
        "scale must have shape [4 or 1, n_groups], got [4, 0]",
    ),
    (
        ON_GRIDS,
        "scale",
        lambda a: a["scale"].repeat(1, 2),
        "scale must have a number of groups that divides the 6 columns of weight, got 4",
    ),
    (
        ON_GRIDS,
        "zero_point",
        lambda a: a["zero_point"].long(),
        "zero_point must have dtype Int, got Long",
    ),
    (
        ON_GRIDS,
        "zero_point",
        lambda a: a["zero_point"][:1],
        "zero_point must have the shape of scale, [4, 2], got [1, 2]",
    ),
    (
        WITH_RANGES,
        "qmax",
        lambda a: -8,
        "qmin and qmax must be a range within [-128, 127] or [0, 255], got [-8, -8]",
    ),
    (WITH_RANGES, "qmin", lambda a: -129, "qmin and qmax must be a range within"),
    (WITH_RANGES, "qmax", lambda a: 128, "got [-8, 128]"),
    (OPS[:3], "beta", lambda a: 0.99, "beta must be at least 1 and finite in float32, got 0.99"),
    (
        OPS[:3],
        "beta",
        lambda a: float("nan"),
        "beta must be at least 1 and finite in float32, got nan",
    ),
    (OPS[:3], "beta", lambda a: float("inf"), "beta must be at least 1 and finite in float32"),
    (
        OPS[1:2],
        "grad_weight_q",
        lambda a: a["grad_weight_q"].half(),
        "grad_weight_q must have dtype Float, got Half",
    ),
    (
        OPS[1:2],
        "grad_weight_q",
        lambda a: a["grad_weight_q"].t(),
        "grad_weight_q must have the shape of weight, [4, 6], got [6, 4]",
    ),
    (
        OPS[1:2],
        "grad_reg",
        lambda a: a["grad_reg"].double(),
        "grad_reg must have dtype Float, got Double",
    ),
    (
        OPS[1:2],
        "grad_reg",
        lambda a: a["grad_reg"].repeat(2),
        "grad_reg must hold one number, got shape [2]",
    ),
]
STEP_CASES: list[tuple[str, Change, str]] = [
    ("exp_avg", lambda a: a["exp_avg"].half(), "exp_avg must have dtype Float, got Half"),
    ("exp_avg_sq", lambda a: a["exp_avg_sq"].double(), "exp_avg_sq must have dtype Float"),
    ("exp_avg", lambda a: a["exp_avg"][:1], "exp_avg must have the shape of weight"),
    ("exp_avg_sq", lambda a: a["exp_avg_sq"].t(), "exp_avg_sq must have the shape of weight"),
    ("grad", lambda a: a["grad"].double(), "grad must have dtype Float or BFloat16 or Half"),
    ("grad", lambda a: a["grad"][:, :3], "grad must have the shape of weight, [4, 6], got [4, 3]"),
    ("weight_q", lambda a: a["weight_q"].half(), "weight_q must have dtype Float, got Half"),
    ("weight_q", lambda a: a["weight_q"][:3], "weight_q must have the shape of weight"),
    ("schedule", lambda a: a["schedule"].double(), "schedule must have dtype Float, got Double"),
    (
        "schedule",
        lambda a: a["schedule"][:0],
        "schedule must have shape [steps >= 1, 5], got [0, 5]",
    ),
    ("schedule", lambda a: a["schedule"][0], "schedule must have shape [steps >= 1, 5], got [5]"),
    ("schedule", lambda a: a["schedule"][:, :4], "schedule must have shape [steps >= 1, 5]"),
    ("step", lambda a: a["step"].int(), "step must have dtype Long, got Int"),
    ("step", lambda a: a["step"].repeat(2), "step must hold one number, got shape [2]"),
    ("v", lambda a: transposed(a["v"]), "v is written in place and must be contiguous"),
    ("exp_avg", lambda a: transposed(a["exp_avg"]), "exp_avg is written in place and must be con"),
    ("exp_avg_sq", lambda a: transposed(a["grad"]), "exp_avg_sq is written in place and must be"),
    ("weight_q", lambda a: transposed(a["grad"]), "weight_q is written in place and must be conti"),
    ("exp_avg", lambda a: a["v"], "v is written in place and must not share memory with exp_avg"),
    ("weight_q", lambda a: a["grad"], "weight_q is written in place and must not share memory"),
    ("weight_q", lambda a: a["weight"], "must not share memory with weight"),
    ("scale", lambda a: a["exp_avg_sq"].flatten()[-8:].view(4, 2), "exp_avg_sq is written in pla"),
    # What is read is copied first, and would yet be changed.
    ("grad", lambda a: a["v"][:1].expand(ROWS, COLS), "v is written in place and must not share"),
    (
        "step",
        lambda a: a["weight_q"].flatten()[-2:].view(torch.int64),
        "weight_q is written in place and must not share memory with step",
    ),
]
SEARCH_CASES: list[tuple[str, Change, str]] = [
    (
        "codes",
        lambda a: a["residual"].flatten()[:COLS].view(torch.int8).view(ROWS, COLS),
        "codes is written in place and must not share memory with residual",
    ),
    ("codes", lambda a: a["codes"][0], "codes must be a matrix [rows, cols], got shape [6]"),
    ("codes", lambda a: a["codes"].to(torch.uint8), "codes must have dtype Char, got Byte"),
    ("qmin", lambda a: 0, "codes must have dtype Byte, got Char"),
    ("residual", lambda a: a["residual"].half(), "residual must have dtype Float"),
    ("residual", lambda a: a["residual"].t(), "residual must have the shape of codes"),
    ("gram", lambda a: a["gram"].double(), "gram must have dtype Float, got Double"),
    ("gram", lambda a: a["gram"][0], "gram must have shape [groups, 6, 6] with groups dividing 4"),
    ("gram", lambda a: a["gram"][:, :5], "gram must have shape [groups, 6, 6]"),
    ("gram", lambda a: a["gram"][:1].repeat(3, 1, 1), "with groups dividing 4 rows, got [3, 6, 6]"),
    ("scale", lambda a: a["scale"].half(), "scale must have dtype Float, got Half"),
    ("scale", lambda a: a["scale"][:3], "scale must have shape [4 or 1, n_groups] with n_groups"),
    ("scale", lambda a: a["scale"].repeat(1, 2), "n_groups dividing 6 columns, got [4, 4]"),
    ("codes", lambda a: transposed(a["codes"]), "codes is written in place and must be contiguous"),
    ("residual", lambda a: transposed(a["residual"]), "residual is written in place and must be"),
    ("residual", lambda a: a["gram"][0, :4], "residual is written in place and must not share"),
    ("gram", lambda a: a["residual"][0, 0].expand(2, COLS, COLS), "and must not share memory with"),
]
TABU_CASES: list[tuple[str, Change, str]] = [
    ("steps", lambda a: -1, "steps must be from 0 to 8388608, got -1"),
    ("steps", lambda a: 2**23 + 1, "steps must be from 0 to 8388608, got 8388609"),
    ("seed", lambda a: -1, "seed must not be negative, got -1"),
]
GPTQ_CASES: list[tuple[str, Change, str]] = [
    ("weight", lambda a: a["weight"].half(), "weight must have dtype Float"),
    ("feedback", lambda a: a["feedback"].double(), "feedback must have dtype Float, got Double"),
    ("feedback", lambda a: a["feedback"][0], "feedback must have shape [groups, 6, 6] with groups"),
    (
        "feedback",
        lambda a: a["feedback"][..., :5],
        "[groups, 6, 6] with groups dividing 4 rows, go",
    ),
    ("feedback", lambda a: a["feedback"][:0], "groups dividing 4 rows, got [0, 6, 6]"),
    ("order", lambda a: a["order"].int(), "order must have dtype Long, got Int"),
    ("order", lambda a: a["order"][0], "order must have shape [2, 6], got [6]"),
    ("order", lambda a: a["order"][:1], "order must have shape [2, 6], got [1, 6]"),
    ("order", lambda a: a["order"][:, :5], "order must have shape [2, 6], got [2, 5]"),
]
DEQUANTIZE_CASES: list[tuple[str, Change, str]] = [
    ("codes", lambda a: a["codes"].int(), "codes must have dtype Char or Byte, got Int"),
    ("codes", lambda a: a["codes"][0], "codes must be a matrix [rows, cols], got shape [6]"),
    ("scale", lambda a: a["scale"].double(), "scale must have dtype Float, got Double"),
    ("scale", lambda a: a["scale"].repeat(1, 2), "divides the 6 columns of codes, got 4"),
    ("zero_point", lambda a: a["zero_point"].float(), "zero_point must have dtype Int, got Float"),
    ("dtype", lambda a: torch.int32, "dtype must be Float, BFloat16, Half"),
]
ALL_CASES = [
    *((op, *case[1:]) for case in CASES for op in case[0]),
    *(("rounding_step_", *case) for case in STEP_CASES),
    *((op, *case) for case in SEARCH_CASES for op in SEARCHES),
    ("refine_", "max_sweeps", lambda a: -1, "max_sweeps must be from 0 to 8388608, got -1"),
    ("refine_", "max_sweeps", lambda a: 2**23 + 1, "max_sweeps must be from 0 to 8388608, got"),
    *(("tabu_search_", *case) for case in TABU_CASES),
    *(("gptq", *case) for case in GPTQ_CASES),
    *(("dequantize", *case) for case in DEQUANTIZE_CASES),
]


@pytest.mark.parametrize(
    ("op", "name", "change", "message"),
    [pytest.param(*case, id=f"{case[0]}-{case[1]}") for case in ALL_CASES],
)
def test_message(device: torch.device, op: str, name: str, change: Change, message: str) -> None:
    given = arguments(op, device)
    given[name] = change(given)
    before = {k: t.clone() for k, t in given.items() if isinstance(t, torch.Tensor)}
    with pytest.raises(ARGUMENT_ERROR, match=re.escape(message)):
        call(op, given)
    assert all(torch.equal(given[k], t) for k, t in before.items())  # refused before any write


@pytest.mark.parametrize("op", OPS)
def test_the_good_arguments_are_taken(device: torch.device, op: str) -> None:
    call(op, arguments(op, device))


@pytest.mark.parametrize("qrange", [(0, 256), (0, 0), (5, 3), (-1, 128)])
def test_ranges(device: torch.device, qrange: tuple[int, int]) -> None:
    given = arguments("hard_quantize", device)
    given["qmin"], given["qmax"] = qrange
    with pytest.raises(ARGUMENT_ERROR, match=re.escape(f"got [{qrange[0]}, {qrange[1]}]")):
        call("hard_quantize", given)


@pytest.mark.parametrize("op", OPS)
def test_other_device(device: torch.device, op: str) -> None:
    if device.type == "cpu":
        pytest.skip("needs a second device")
    given = arguments(op, device)
    given["scale"] = given["scale"].cpu()
    with pytest.raises(
        ARGUMENT_ERROR, match=r"scale must be on the device of .* got cpu and cuda:0"
    ):
        call(op, given)


def test_float64_is_refused_on_cuda(device: torch.device) -> None:
    if device.type == "cpu":
        pytest.skip("the CPU takes float64")
    names = {"soft_quantize": "weight", "refine_": "residual", "tabu_search_": "residual"}
    for op, name in (names | {"gptq": "weight"}).items():
        given = arguments(op, device)
        given[name] = given[name].double()
        with pytest.raises(ARGUMENT_ERROR, match=f"{name} must have dtype Float"):
            call(op, given)


def tensors(op: str) -> list[str]:
    return [n for n, t in arguments(op, torch.device("cpu")).items() if isinstance(t, torch.Tensor)]


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in tensors(op)])
def test_meta_tensors_beside_real_ones(device: torch.device, op: str, name: str) -> None:
    """They lead to the fake kernel, whose results are memory that nobody has written."""
    given = arguments(op, device)
    given[name] = given[name].to("meta")
    with pytest.raises(RuntimeError, match=r"must be on the device of .*got"):
        call(op, given)


@pytest.mark.parametrize(("op", "name"), [(op, name) for op in OPS for name in tensors(op)])
def test_no_tensor(device: torch.device, op: str, name: str) -> None:
    given = arguments(op, device)
    with pytest.raises(ARGUMENT_ERROR, match=f"^{name} must be a tensor, got None"):
        call(op, {**given, name: None})


def test_empty_groups_take_no_time(device: torch.device) -> None:
    many = 2**40
    weight, feedback = torch.empty(many, 0, device=device), torch.empty(many, 0, 0, device=device)
    order = torch.empty(many, 0, dtype=torch.int64, device=device)
    scale = torch.ones(1, 1, device=device)
    codes = ops.gptq(weight, feedback, order, scale, scale.int(), 0, 15)
    assert codes.shape == (many, 0)
