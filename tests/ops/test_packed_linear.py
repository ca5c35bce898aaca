"""packed_linear against the reference in float64: every width, granularity, size and dtype."""

from __future__ import annotations

import re
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from adaround_ext import ops, reference
from adaround_ext.ops import pack_bits, packed_linear
from adaround_ext.ops.packing import _linear_of_parts
from tests.support.helpers import (
    ARGUMENT_ERROR,
    instruction_set,  # noqa: F401  a fixture
    strided,
    threads,
    transposed,
    unaligned,
)

pytestmark = pytest.mark.usefixtures("one_thread")
each_instruction_set = pytest.mark.usefixtures("instruction_set")

BITS = range(1, 9)
# (rows, cols, n_groups, positions). Rows below a tile of 4 and above; columns around vectors and
# pieces of 512; groups that fill vectors, share them, cross them, and are smaller than a lane; one
# and two positions, those left of six at a time, and more than a chunk of 64.
SHAPES = [
    (1, 1, 1, 1),
    (3, 63, 1, 2),
    (5, 65, 1, 3),
    (4, 128, 4, 1),
    (6, 96, 3, 5),
    (9, 100, 20, 2),
    (2, 60, 20, 1),
    (4, 40, 40, 7),
    (7, 1030, 1, 1),
    (4, 1030, 103, 4),
    (5, 1100, 11, 9),
    (3, 576, 6, 67),
    (2, 200, 1, 131),
]


@dataclass(frozen=True)
class Problem:
    x: Tensor
    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    bits: int
    qmin: int

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None, int, int]:
        grid = self.scale, self.zero_point
        return self.x, self.packed, *grid, self.bias, self.bits, self.qmin


def make_problem(
    device: torch.device,
    rows: int = 6,
    cols: int = 96,
    groups: int = 3,
    positions: int = 5,
    *,
    bits: int = 4,
    signed: bool = False,
    shared: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Problem:
    qmin = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(qmin, qmin + 2**bits, (rows, cols))
    shape = (1 if shared else rows, groups)
    zero_point = torch.randint(qmin, qmin + 2**bits, shape, dtype=torch.int32)
    return Problem(
        torch.randn(positions, cols).to(device, dtype),
        pack_bits(codes.to(device, torch.int8 if signed else torch.uint8), bits, qmin),
        (0.05 + torch.rand(shape)).to(device),
        zero_point.to(device),
        torch.randn(rows).to(device, dtype),
        bits,
        qmin,
    )


def check(problem: Problem) -> None:
    """Within the bound of a float32 sum of products, and of one rounding to x's dtype."""
    got = packed_linear(*problem.args)
    x, bias = problem.x.double(), problem.bias
    weight = _double_weight(problem)
    exact = F.linear(x, weight, None if bias is None else bias.double())
    assert got.shape == exact.shape
    assert got.dtype == problem.x.dtype
    # Errors of lanes and partial sums are random: far less than gamma_cols sum |x| |w|.
    size = F.linear(x.abs(), weight.abs(), None if bias is None else bias.abs().double())
    bound = 4 * torch.finfo(torch.float32).eps * size
    if problem.x.dtype != torch.float32:
        half_ulp = torch.finfo(problem.x.dtype).eps / 2
        if problem.x.device.type == "cuda":  # there the weight is rounded too
            bound = bound + half_ulp * size
        bound = bound + half_ulp * exact.abs() + torch.finfo(problem.x.dtype).tiny
    assert bool(((got.double() - exact).abs() <= bound).all())


def assert_same(got: Tensor, expected: Tensor) -> None:
    """In every bit; on CUDA the product is PyTorch's, which takes others for other layouts."""
    if got.device.type == "cuda":
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)
    else:
        assert torch.equal(got, expected)


def _double_weight(problem: Problem) -> Tensor:
    cols = problem.x.shape[-1]
    codes = reference.unpack_bits(problem.packed, problem.bits, cols, problem.qmin)
    return reference.dequantize(codes, problem.scale.double(), problem.zero_point, torch.float64)


@each_instruction_set
@pytest.mark.parametrize("bits", BITS)
def test_bits_and_sizes(device: torch.device, bits: int) -> None:
    for i, shape in enumerate(SHAPES):
        check(make_problem(device, *shape, bits=bits, signed=i % 2 == 0, shared=i % 3 == 0))


@each_instruction_set
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
@pytest.mark.parametrize("positions", [1, 8])
def test_half_precision(device: torch.device, dtype: torch.dtype, positions: int) -> None:
    check(make_problem(device, 6, 130, 2, positions, dtype=dtype, signed=True))


@each_instruction_set
def test_one_step_of_x_is_a_column_of_the_weight(device: torch.device) -> None:
    problem = make_problem(device, 7, 100, 20, bits=3, signed=True)
    weight = _double_weight(problem).float()
    got = packed_linear(torch.eye(100, device=device), *problem.args[1:4], None, 3, -4)
    assert torch.equal(got, weight.t())  # in every bit: one product with 1, all others 0


@each_instruction_set
def test_shapes_of_x(device: torch.device) -> None:
    problem = make_problem(device, 6, 96, 3, 24)
    expected = packed_linear(*problem.args)
    for shape in [(2, 3, 4, 96), (24, 1, 96)]:
        got = packed_linear(problem.x.view(shape), *problem.args[1:])
        assert torch.equal(got, expected.view(*shape[:-1], 6))
    assert_same(packed_linear(problem.x[3], *problem.args[1:]), expected[3])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("rows", "cols", "positions"), [(0, 96, 5), (6, 0, 5), (6, 96, 0), (0, 0, 0)]
)
def test_empty(device: torch.device, rows: int, cols: int, positions: int, bias: bool) -> None:
    problem = make_problem(device, rows, cols, 1, positions)
    given_bias = problem.bias if bias else None
    got = packed_linear(*problem.args[:4], given_bias, *problem.args[5:])
    assert got.shape == (positions, rows)
    if cols == 0:
        expected = problem.bias if bias else torch.zeros(rows, device=device)
        assert torch.equal(got, expected.expand(positions, rows))


@each_instruction_set
@pytest.mark.parametrize("layout", [unaligned, transposed, strided])
def test_layouts(device: torch.device, layout: object) -> None:
    problem = make_problem(device, 6, 132, 3, 7, bits=3)
    moved = [layout(t) for t in problem.args[:4]]
    assert_same(packed_linear(*moved, *problem.args[4:]), packed_linear(*problem.args))


@each_instruction_set
@pytest.mark.parametrize("bits", [3, 4])
def test_a_row_of_y_depends_on_its_row_of_x_alone(device: torch.device, bits: int) -> None:
    if device.type == "cuda":
        pytest.skip("on CUDA the product is PyTorch's, which promises nothing here")
    problem = make_problem(device, 9, 700, 7, 70, bits=bits)
    together = packed_linear(*problem.args)
    for positions in (1, 2, 3, 6, 13, 66):
        got = packed_linear(problem.x[:positions], *problem.args[1:])
        assert torch.equal(got, together[:positions])


@each_instruction_set
@pytest.mark.parametrize("positions", [1, 3, 150])
def test_same_bits_for_any_number_of_threads(device: torch.device, positions: int) -> None:
    problem = make_problem(device, 403, 520, 4, positions)
    with threads(1):
        one = packed_linear(*problem.args)
    with threads(2):
        two = packed_linear(*problem.args)
    assert torch.equal(one, two)


def test_the_parts_that_cuda_runs(device: torch.device) -> None:
    problem = make_problem(device, 6, 96, 3, 5, bits=3, signed=True)
    got = _linear_of_parts(*problem.args)
    torch.testing.assert_close(got, packed_linear(*problem.args), rtol=1e-5, atol=1e-4)


def test_gradients(device: torch.device) -> None:
    problem = make_problem(device, 6, 96, 3, 6)
    x = problem.x.view(2, 3, 96).requires_grad_()
    bias = problem.bias.requires_grad_()
    grad = torch.randn(2, 3, 6, device=device)
    got = torch.autograd.grad(
        packed_linear(x, *problem.args[1:4], bias, *problem.args[5:]), (x, bias), grad
    )
    weight = _double_weight(problem).float()
    expected = torch.autograd.grad(F.linear(x, weight, bias), (x, bias), grad)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_opcheck(device: torch.device) -> None:
    problem = make_problem(device, 6, 96, 3, 6)
    op = torch.ops.adaround_ext.packed_linear.default
    torch.library.opcheck(op, problem.args)
    torch.library.opcheck(op, (problem.x.clone().requires_grad_(), *problem.args[1:]))
    torch.library.opcheck(op, (*problem.args[:4], None, *problem.args[5:]))


def test_compiled(device: torch.device) -> None:
    problem = make_problem(device, 6, 96, 3, 6)

    def forward(x: Tensor) -> Tensor:
        return packed_linear(x * 0.5, *problem.args[1:]).relu()

    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(problem.x), forward(problem.x))


ERRORS = [
    ("x", lambda a: a["x"].double(), "x must have dtype Float or BFloat16 or Half, got Double"),
    ("x", lambda a: a["x"][0, 0], "x must have shape [..., cols], got []"),
    ("x", lambda a: a["x"][:, :90], "packed must have shape [rows, 45] for 90 columns of 4 bits"),
    ("packed", lambda a: a["packed"].to(torch.int8), "packed must have dtype Byte, got Char"),
    ("packed", lambda a: a["packed"][0], "packed must have shape [rows, 48] for 96 columns"),
    ("scale", lambda a: a["scale"].double(), "scale must have dtype Float, got Double"),
    ("scale", lambda a: a["scale"][:2], "scale must have shape [6 or 1, n_groups], got [2, 3]"),
    ("scale", lambda a: a["scale"].repeat(1, 3), "divides the 96 columns of packed, got 9"),
    ("zero_point", lambda a: a["zero_point"].long(), "zero_point must have dtype Int, got Long"),
    ("zero_point", lambda a: a["zero_point"][:1], "zero_point must have the shape of scale"),
    ("bias", lambda a: a["bias"].half(), "bias must have dtype Float, got Half"),
    ("bias", lambda a: a["bias"][:5], "bias must have shape [6], got [5]"),
    ("bias", lambda a: a["bias"].view(1, 6), "bias must have shape [6], got [1, 6]"),
    ("bits", lambda a: 9, "bits must be from 1 to 8, got 9"),
    ("qmin", lambda a: 241, "qmin must leave 4 bits within [-128, 127] or [0, 255], got 241"),
]


@pytest.mark.parametrize(("name", "change", "message"), ERRORS)
def test_message(device: torch.device, name: str, change: object, message: str) -> None:
    if device.type == "cuda":
        pytest.skip("on CUDA the checks are those of unpack_bits, dequantize and linear")
    problem = make_problem(device)
    given = {**vars(problem)}
    given[name] = change(given)
    with pytest.raises(ARGUMENT_ERROR, match=re.escape(message)):
        packed_linear(**given)


@each_instruction_set
def test_the_weight_is_that_of_dequantize(device: torch.device) -> None:
    problem = make_problem(device, 5, 64, 2, bits=8, signed=True)
    far = torch.full_like(problem.zero_point, 1_000_003)  # a zero point beyond the grid
    got = packed_linear(
        torch.eye(64, device=device), problem.packed, problem.scale, far, None, 8, -128
    )
    codes = reference.unpack_bits(problem.packed, 8, 64, -128)
    assert torch.equal(got, ops.dequantize(codes, problem.scale, far).t())


def test_positions_of_nothing_take_no_time(device: torch.device) -> None:
    x, scale = torch.empty(2**40, 0, device=device), torch.ones(1, 1, device=device)
    packed = torch.empty(0, 0, dtype=torch.uint8, device=device)
    assert packed_linear(x, packed, scale, scale.int(), None, 4, 0).shape == (2**40, 0)
