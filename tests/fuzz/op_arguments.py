"""The arguments that a case of an op stands for."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from adaround_ext import ops, reference
from tests.fuzz.tensor_changes import change
from tests.support.helpers import arithmetic_dtype, make_sample, schedule_row

Arguments = dict[str, Any]
QUANTIZERS = (
    "soft_quantize",
    "_soft_quantize_backward",
    "soft_quantize_with_grad",
    "rounding_step_",
    "hard_quantize",
)
SEARCHES = ("refine_", "tabu_search_")
PACKED = ("pack_bits", "unpack_bits", "packed_linear")
OPS = (*QUANTIZERS, "dequantize", *SEARCHES, "gptq", *PACKED)
# What an op may write to; all else must keep its bits.
WRITTEN = {
    "rounding_step_": ("v", "exp_avg", "exp_avg_sq", "weight_q", "step"),
    "refine_": ("codes", "residual"),
    "tabu_search_": ("codes", "residual"),
}
SCHEDULE_STEPS = 3


@dataclasses.dataclass(frozen=True)
class OpCase:
    """Good arguments of an op, by sizes and kinds, and what is then changed of them.

    numbers: other values of arguments that are no tensors. changes: (argument, name of a change).
    aliases: (argument, other): the argument becomes a view of the other one's memory.
    """

    op: str
    rows: int
    cols: int
    n_groups: int
    gram_groups: int
    scale_rows: str
    bits: int
    symmetric: bool
    dtype: str
    grad_dtype: str
    instruction_set: str
    seed: int
    numbers: dict[str, Any] = dataclasses.field(default_factory=dict)
    changes: list[tuple[str, str]] = dataclasses.field(default_factory=list)
    aliases: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @property
    def plain(self) -> bool:
        """Whether the numbers in all tensors are those that were made for comparison."""
        return not self.changes and not self.aliases


def names(op: str) -> list[str]:
    """The arguments of an op, in order."""
    return [a.name for a in getattr(torch.ops.adaround_ext, op).default._schema.arguments]


def function(op: str) -> Callable[..., Any]:
    """The typed wrapper where there is one."""
    return getattr(ops, op, None) or getattr(torch.ops.adaround_ext, op)  # type: ignore[no-any-return]


def arguments(case: OpCase) -> Arguments:
    """What the op is called with."""
    torch.manual_seed(case.seed)
    if case.op in SEARCHES:
        given = _search(case)
    elif case.op == "gptq":
        given = _gptq(case)
    elif case.op in PACKED:
        given = _packed(case)
    else:
        given = _quantizer(case)
    made = {name: given[name] for name in names(case.op)}
    made |= {name: _scalar(value) for name, value in case.numbers.items() if name in made}
    for name, what in case.changes:
        made[name] = change(made[name], what)
    for name, other in case.aliases:
        made[name] = _alias(made[name], made[other])
    return made


def _scalar(value: Any) -> Any:
    """JSON has no dtypes."""
    return getattr(torch, value[6:]) if str(value).startswith("torch.") else value


def _alias(value: object, other: object) -> object:
    """The other tensor itself, or a view of its memory in the shape of ``value``."""
    if not isinstance(value, Tensor) or not isinstance(other, Tensor):
        return other
    if value.dtype != other.dtype or value.shape == other.shape or not other.is_contiguous():
        return other
    flat = other.flatten()
    if value.numel() > flat.numel():
        return other
    return flat[flat.numel() - value.numel() :].view(value.shape)


def _range(case: OpCase) -> tuple[int, int]:
    top = 2**case.bits
    return (-top // 2, top // 2 - 1) if case.symmetric else (0, top - 1)


def _codes(case: OpCase) -> Tensor:
    qmin, qmax = _range(case)
    dtype = torch.int8 if case.symmetric else torch.uint8
    return torch.randint(qmin, qmax + 1, (case.rows, case.cols)).to(dtype)


def _quantizer(case: OpCase) -> Arguments:
    dtype, grad_dtype = getattr(torch, case.dtype), getattr(torch, case.grad_dtype)
    if dtype == torch.float64 or case.op == "_soft_quantize_backward":
        grad_dtype = dtype
    grid = (case.bits, case.symmetric, case.scale_rows, case.n_groups)
    sample = make_sample(torch.device("cpu"), case.rows, case.cols, dtype=dtype, grid=grid)
    v = sample.v
    rows = [schedule_row(t, 2.0 + t, 0.01 * t) for t in range(1, SCHEDULE_STEPS + 1)]
    return {
        "weight": sample.weight,
        "v": v,
        "scale": sample.scale,
        "zero_point": sample.zero_point,
        "qmin": sample.qmin,
        "qmax": sample.qmax,
        "beta": 2.0 + case.seed % 7,
        "grad": torch.randn_like(v).to(grad_dtype),
        "grad_weight_q": torch.randn_like(v).to(dtype),
        "grad_reg": v.new_tensor(0.3),
        "exp_avg": 0.1 * torch.randn_like(v),
        "exp_avg_sq": 0.01 * torch.rand_like(v) + 1e-3,
        "weight_q": torch.full_like(v, torch.nan, dtype=grad_dtype),
        "schedule": torch.tensor(rows),
        "step": torch.tensor([case.seed % SCHEDULE_STEPS]),
        "as_error": case.seed % 2 == 1,
        "normalize": case.seed % 3 == 1,
        "codes": _codes(case),
        "dtype": dtype,
    }


def _scale(case: OpCase, dtype: torch.dtype) -> Tensor:
    """Powers of two: with other short numbers everything is exact, and any order the same."""
    rows = 1 if case.scale_rows == "one" else case.rows
    return 0.5 ** torch.randint(0, 4, (rows, case.n_groups)).to(dtype)


def _search(case: OpCase) -> Arguments:
    dtype = arithmetic_dtype(getattr(torch, case.dtype))
    factor = torch.randint(-2, 3, (case.gram_groups, case.cols, case.cols + 2)).to(dtype)
    qmin, qmax = _range(case)
    return {
        "codes": _codes(case),
        "residual": torch.randint(-64, 65, (case.rows, case.cols)).to(dtype) / 8,
        "gram": factor @ factor.mT,
        "scale": _scale(case, dtype),
        "qmin": qmin,
        "qmax": qmax,
        "max_sweeps": case.seed % 6,
        "steps": case.seed % 20,
        "seed": case.seed,
    }


def _gptq(case: OpCase) -> Arguments:
    dtype = arithmetic_dtype(getattr(torch, case.dtype))
    scale = _scale(case, dtype)
    qmin, qmax = _range(case)
    columns = (case.gram_groups, case.cols)
    return {
        "weight": torch.randint(-256, 257, (case.rows, case.cols)).to(dtype) / 32,
        "feedback": torch.randint(-2, 3, (*columns, case.cols)).to(dtype) / 4,
        "order": torch.rand(columns).argsort(-1),
        "scale": scale,
        "zero_point": torch.randint(qmin, qmax + 1, scale.shape, dtype=torch.int32),
        "qmin": qmin,
        "qmax": qmax,
    }


def _packed(case: OpCase) -> Arguments:
    qmin, _ = _range(case)
    dtype = getattr(torch, "float32" if case.dtype == "float64" else case.dtype)
    codes = _codes(case)
    scale = 0.1 + torch.rand(1 if case.scale_rows == "one" else case.rows, case.n_groups)
    positions = [(), (1,), (3,), (2, 3), (9,)][case.seed % 5]
    return {
        "codes": codes,
        "packed": reference.pack_bits(codes, case.bits, qmin),
        "bits": case.bits,
        "qmin": qmin,
        "cols": case.cols,
        "x": torch.randn(*positions, case.cols).to(dtype),
        "scale": scale,
        "zero_point": torch.randint(-8, 9, scale.shape, dtype=torch.int32),
        "bias": torch.randn(case.rows).to(dtype) if case.seed % 2 else None,
    }
