"""What is drawn for an op: good arguments, with none, one, two or all of them changed."""

from __future__ import annotations

from typing import Any

from hypothesis import strategies as st

from tests.emulation import EMULATED
from tests.fuzz import tensor_changes
from tests.fuzz.op_arguments import (
    OPS,
    PACKED,
    QUANTIZERS,
    SEARCHES,
    WRITTEN,
    OpCase,
    names,
)
from tests.support.helpers import INSTRUCTION_SETS

ROWS = [0, 1, 2, 3, 5, 8, 17]
COLS = [0, 1, 2, 3, 7, 8, 9, 16, 31, 33, 63, 64, 65, 127, 128, 129, 511, 512, 513, 1023, 1024, 1025]
FEW_COLS = [cols for cols in COLS if cols <= 33]  # where the oracle is a loop in Python
LARGE = 17 * 129  # weights: beyond it one row will do
LAYOUTS = list(tensor_changes.LAYOUTS)
# Arguments that are as large as the layer: all huge together they fit each other.
LARGE_ONES = {"weight", "v", "grad", "grad_weight_q", "codes", "residual", "packed", "x"}
# Torch itself cannot hand a negation that is still to come to an op that writes.
LAYOUTS_OF_WRITTEN = [name for name in LAYOUTS if name != "negated"]
INTEGERS = [-(2**63), -(2**31), -129, -128, -1, 0, 1, 2, 7, 8, 9, 127, 128, 255, 256, 2**23]
INTEGERS += [2**23 + 1, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64]
FLOATS = [float("nan"), float("inf"), float("-inf"), -1.0, 0.0, 0.999, 1.0, 1.5, 20.0, 1e6, 1e38]
FLOATS += [1e39, 1e308, 5e-324]
ODD: list[Any] = [None, "text", 1.5, [1], True]
NUMBERS: dict[str, list[Any]] = {
    "beta": FLOATS,
    "as_error": [True, False],
    "normalize": [True, False],
    "dtype": ["torch.float16", "torch.bfloat16", "torch.float32", "torch.int8", "torch.bool",
              "torch.complex64", "torch.float8_e5m2"],
}  # fmt: skip
DTYPES = ["float32", "float32", "bfloat16", "float16"]
if not EMULATED:  # float64 is for the CPU's kernels
    NUMBERS["dtype"].append("torch.float64")
    DTYPES.append("float64")
VALUES = list(tensor_changes.VALUES)
CHANGES = [name for name in tensor_changes.CHANGES if name not in tensor_changes.LAYOUTS]


Changed = dict[str, Any]  # fields of OpCase


@st.composite
def op_cases(draw: st.DrawFn) -> OpCase:
    """A case of any op."""
    op = draw(st.sampled_from(OPS))
    rows = draw(st.sampled_from(ROWS))
    cols = draw(st.sampled_from(COLS if op in QUANTIZERS + PACKED else FEW_COLS))
    rows = min(rows, 1) if rows * cols > LARGE else rows
    divisors = [n for n in (1, 2, 3, 4, 8) if cols and cols % n == 0] or [1]
    groups = [n for n in (1, 2, 3) if rows % n == 0]
    changed = draw(st.sampled_from(list(KINDS.values())))(draw, op)
    return OpCase(
        op=op,
        rows=rows,
        cols=cols,
        n_groups=draw(st.sampled_from(divisors)),
        gram_groups=draw(st.sampled_from(groups)) if op in (*SEARCHES, "gptq") else 1,
        scale_rows=draw(st.sampled_from(["one", "each"])),
        bits=draw(st.integers(1 if op in PACKED else 2, 8)),
        symmetric=draw(st.booleans()),
        dtype=draw(st.sampled_from(DTYPES)),
        grad_dtype=draw(st.sampled_from(["float32", "bfloat16", "float16"])),
        instruction_set=draw(st.sampled_from(INSTRUCTION_SETS)),
        seed=draw(st.integers(0, 999)),
        **changed,
    )


def _numbers(op: str) -> dict[str, list[Any]]:
    """Other values for each argument of an op that is no tensor."""
    scalars = {"qmin", "qmax", "max_sweeps", "steps", "seed", "bits", "cols", *NUMBERS}
    return {name: NUMBERS.get(name, INTEGERS) for name in names(op) if name in scalars}


def _tensors(op: str) -> list[str]:
    scalars = _numbers(op)
    return [name for name in names(op) if name not in scalars]


def _value(draw: st.DrawFn, values: list[Any]) -> Any:
    return draw(st.sampled_from(draw(st.sampled_from([values, values, ODD]))))


def _good(draw: st.DrawFn, op: str) -> Changed:
    return {}


def _layouts(draw: st.DrawFn, op: str) -> Changed:
    """Every tensor with strides, an alignment or a kind of its own; the numbers stay."""
    layouts = LAYOUTS_OF_WRITTEN if op in WRITTEN else LAYOUTS
    return {"changes": [(name, draw(st.sampled_from(layouts))) for name in _tensors(op)]}


def _few(draw: st.DrawFn, op: str) -> Changed:
    """One or two arguments."""
    scalars = _numbers(op)
    numbers, changes = {}, []
    for _ in range(draw(st.sampled_from([1, 1, 2]))):
        name = draw(st.sampled_from([*_tensors(op), *_tensors(op), *scalars]))
        if name in scalars:
            numbers[name] = _value(draw, scalars[name])
        else:
            changes.append((name, draw(st.sampled_from(CHANGES))))
    return {"numbers": numbers, "changes": changes}


def _all(draw: st.DrawFn, op: str) -> Changed:
    """Every number, and every tensor up to two times."""
    numbers = {name: _value(draw, values) for name, values in _numbers(op).items()}
    changes = [
        (name, draw(st.sampled_from(CHANGES)))
        for name in _tensors(op)
        for _ in range(draw(st.integers(0, 2)))
    ]
    return {"numbers": numbers, "changes": changes}


def _values(draw: st.DrawFn, op: str) -> Changed:
    """Numbers in tensors, whose shapes and dtypes stay."""
    chosen = draw(st.lists(st.sampled_from(_tensors(op)), min_size=1, max_size=3))
    return {"changes": [(name, draw(st.sampled_from(VALUES))) for name in chosen]}


def _huge(draw: st.DrawFn, op: str) -> Changed:
    """More than 2^31 elements, without memory for them: all alike, so that they fit each other."""
    how = draw(st.sampled_from(["huge", "huge-rows"]))
    return {"changes": [(name, how) for name in _tensors(op) if name in LARGE_ONES]}


def _meta(draw: st.DrawFn, op: str) -> Changed:
    """All tensors on the meta device, one of them perhaps in another shape."""
    shapes = list(tensor_changes.SHAPES)
    chosen = draw(st.lists(st.sampled_from(_tensors(op)), max_size=1))
    changes = [(name, draw(st.sampled_from(shapes))) for name in chosen]
    return {"changes": changes + [(name, "meta") for name in _tensors(op)]}


def _alias(draw: st.DrawFn, op: str) -> Changed:
    """Two arguments in the same memory, perhaps seen in another order."""
    one, other = (draw(st.sampled_from(_tensors(op))) for _ in range(2))
    turned = draw(st.sampled_from(["", "turned", "transposed"]))
    return {"aliases": [(one, other)], "changes": [(other, turned)] if turned else []}


KINDS = {
    "good": _good,
    "layouts": _layouts,
    "few": _few,
    "fewer": _few,  # what finds most, twice
    "values": _values,
    "all": _all,
    "huge": _huge,
    "meta": _meta,
    "alias": _alias,
}
