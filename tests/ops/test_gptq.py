"""gptq: the codes of the textbook form, and what its arguments mean."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from adaround_ext import ops, reference
from tests.support.helpers import (
    ARGUMENT_ERROR,
    has_cuda_kernels,
    instruction_set,  # noqa: F401  a fixture
    skip_unsupported,
    strided,
    threads,
    transposed,
    unaligned,
)
from tests.support.problems import PROBLEMS, Problem, each_dtype, each_problem, make_problem

each_instruction_set = pytest.mark.usefixtures("instruction_set")
each_order = pytest.mark.parametrize("act_order", [True, False], ids=["act-order", "in-order"])

DAMPING = 0.01


def factor(gram: Tensor, act_order: bool = True, damping: float = DAMPING) -> tuple[Tensor, Tensor]:
    """feedback and order in float64: H = R R^T in processing order, R[i, k] / R[k, k]."""
    gram = gram.double()
    diagonal = gram.diagonal(dim1=1, dim2=2)
    h = gram + torch.diag_embed((damping * diagonal.mean(1, keepdim=True)).expand_as(diagonal))
    order = torch.arange(h.shape[1], device=h.device).repeat(len(h), 1)
    if act_order:
        order = diagonal.argsort(dim=1, descending=True, stable=True)
    ordered = torch.stack([one[at][:, at] for one, at in zip(h, order, strict=True)])
    # The lower factor of the matrix from its end to its beginning, put back, is the upper one.
    upper = torch.linalg.cholesky(ordered.flip(1, 2)).flip(1, 2)
    return upper / upper.diagonal(dim1=1, dim2=2).unsqueeze(1), order


def solve(problem: Problem, dtype: torch.dtype = torch.float32, act_order: bool = True) -> Tensor:
    feedback, order = factor(problem.gram, act_order)
    weight, scale = problem.weight.to(dtype), problem.scale.to(dtype)
    grid = scale, problem.zero_point, problem.qmin, problem.qmax
    return ops.gptq(weight, feedback.to(dtype), order, *grid)


def textbook(problem: Problem, act_order: bool = True) -> Tensor:
    grid = problem.scale.double(), problem.zero_point, problem.qmin, problem.qmax
    weight, gram = problem.weight.double(), problem.gram.double()
    return reference.gptq(weight, gram, DAMPING, *grid, act_order)


@pytest.mark.usefixtures("one_thread")  # float64 has one set of loops
@each_order
@each_problem
def test_the_textbook_codes_in_float64(
    device: torch.device, settings: dict[str, object], act_order: bool
) -> None:
    skip_unsupported(device, torch.float64)
    problem = make_problem(device, **settings)
    assert torch.equal(solve(problem, torch.float64, act_order), textbook(problem, act_order))


@cache
def textbook_codes(name: str) -> Tensor:
    return textbook(make_problem(torch.device("cpu"), **PROBLEMS[name]))


@each_instruction_set
@pytest.mark.parametrize("name", PROBLEMS)
def test_the_textbook_codes_in_float32(device: torch.device, name: str) -> None:
    codes = solve(make_problem(device, **PROBLEMS[name]))
    # Close to the midpoint between two codes either may come out, and changes the rest of its row.
    assert int((codes.cpu() != textbook_codes(name)).any(1).sum()) <= 1


@each_instruction_set
@each_dtype
@pytest.mark.parametrize("cols", [1, 3, 15, 16, 17, 33])
@pytest.mark.parametrize("rows", [1, 3, 4, 6])
def test_sizes(device: torch.device, rows: int, cols: int, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, rows, cols)
    different = (solve(problem, dtype) != textbook(problem)).any(1)
    assert int(different.sum()) <= (0 if dtype == torch.float64 else 1)


@each_instruction_set
@each_dtype
@each_problem
def test_better_than_nearest(
    device: torch.device, settings: dict[str, object], dtype: torch.dtype
) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, **settings)
    codes = solve(problem, dtype)
    assert codes.dtype == problem.codes.dtype
    assert int(codes.min()) >= problem.qmin
    assert int(codes.max()) <= problem.qmax
    before, after = problem.objective(problem.codes).sum(), problem.objective(codes).sum()
    if codes.shape[1] == 1:
        assert torch.equal(codes, problem.codes)
    else:
        assert after < 0.9 * before


@each_instruction_set
def test_by_hand(device: torch.device) -> None:
    # Column 1 first: .6 -> 1, which misses -.4. Column 0: .8 + .5 x -.4 = .6 -> 1, which misses -.2
    # of .8. Column 2: .7 + .25 x -.4 + 1 x -.2 = .4 -> 0. The zero point is 2.
    weight = torch.tensor([[0.8, 0.6, 0.7]], device=device)
    feedback = torch.tensor([[[1.0, 0.5, 0.25], [0.0, 1.0, 1.0], [0.0, 0.0, 1.0]]], device=device)
    order = torch.tensor([[1, 0, 2]], device=device)
    grid = torch.ones(1, 1, device=device), torch.full((1, 1), 2, device=device).int(), 0, 3
    assert ops.gptq(weight, feedback, order, *grid).tolist() == [[3, 3, 2]]


@each_instruction_set
@each_dtype
@each_problem
def test_no_feedback_is_nearest(
    device: torch.device, settings: dict[str, object], dtype: torch.dtype
) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, **settings)
    uncorrelated = replace(problem, gram=torch.eye(problem.gram.shape[1], device=device)[None])
    assert torch.equal(solve(uncorrelated, dtype), problem.codes)


@each_instruction_set
@each_dtype
def test_only_above_the_diagonal_is_read(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, 6, 33)
    feedback, order = factor(problem.gram)
    unread = torch.ones_like(feedback, dtype=torch.bool).tril()
    feedback = feedback.masked_fill(unread, torch.nan).to(dtype)
    grid = problem.scale.to(dtype), problem.zero_point, problem.qmin, problem.qmax
    codes = ops.gptq(problem.weight.to(dtype), feedback, order, *grid)
    assert torch.equal(codes, solve(problem, dtype))


@each_instruction_set
@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (3, 0), (0, 0)])
def test_empty(device: torch.device, rows: int, cols: int) -> None:
    weight, feedback = torch.zeros(rows, cols, device=device), torch.zeros(1, cols, cols)
    order = torch.arange(cols, device=device).unsqueeze(0)
    grid = torch.ones(1, 1, device=device), torch.zeros(1, 1, device=device).int(), 0, 15
    codes = ops.gptq(weight, feedback.to(device), order, *grid)
    assert (codes.shape, codes.dtype) == ((rows, cols), torch.uint8)


@each_instruction_set
def test_a_row_alone_has_the_codes_it_has_among_others(device: torch.device) -> None:
    problem = make_problem(device, 7, 33, n_groups=3)
    codes = solve(problem)
    for row in range(7):
        one = slice(row, row + 1)
        weight, scale, zero_point = problem.weight[one], problem.scale[one], problem.zero_point[one]
        alone = replace(problem, weight=weight, scale=scale, zero_point=zero_point)
        assert torch.equal(solve(alone), codes[one])


@each_instruction_set
@pytest.mark.parametrize("move", [unaligned, transposed, strided])
def test_layouts_give_the_same_codes(
    device: torch.device, move: Callable[[Tensor], Tensor]
) -> None:
    problem = make_problem(device, 6, 33, n_groups=3, groups=2, symmetric=False)
    feedback, order = factor(problem.gram)
    feedback = feedback.float()
    moved = feedback.mT.contiguous().mT if move is transposed else move(feedback)
    grid = move(problem.scale), move(problem.zero_point), problem.qmin, problem.qmax
    codes = ops.gptq(move(problem.weight), moved, move(order), *grid)
    assert torch.equal(codes, solve(problem))


@each_instruction_set
@each_dtype
def test_same_codes_for_any_number_of_threads(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, 37, 65, n_groups=5)
    with threads(1):
        one = solve(problem, dtype)
    with threads(2):
        assert torch.equal(solve(problem, dtype), one)


@pytest.mark.parametrize("wrong", [-1, 5, 24, 2**40], ids=["negative", "twice", "beyond", "far"])
def test_the_order_must_hold_every_column_once(device: torch.device, wrong: int) -> None:
    problem = make_problem(device, groups=2)
    feedback, order = factor(problem.gram, act_order=False)
    left_out = int(order[1, 7])
    order[1, 7] = wrong
    grid = problem.scale, problem.zero_point, problem.qmin, problem.qmax
    if has_cuda_kernels(device):  # nobody reads the order: what it leaves out gets the first code
        codes = ops.gptq(problem.weight, feedback.float(), order, *grid)
        assert bool((codes[len(codes) // 2 :, left_out] == problem.qmin).all())
        return
    with pytest.raises(
        ARGUMENT_ERROR,
        match=f"order must hold every column from 0 to 23 once a group, got {wrong}$",
    ):
        ops.gptq(problem.weight, feedback.float(), order, *grid)
