"""refine_: the codes of the reference's descent, never worse, no better code beside the last."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

from adaround_ext import ops, reference
from tests.support.helpers import (
    instruction_set,  # noqa: F401  a fixture
    skip_unsupported,
    strided,
    threads,
    transposed,
    unaligned,
)
from tests.support.problems import MANY, PROBLEMS, Problem, each_dtype, each_problem, make_problem

each_instruction_set = pytest.mark.usefixtures("instruction_set")


@pytest.mark.usefixtures("one_thread")  # float64 has one set of loops
@each_problem
def test_same_codes_as_the_reference_in_float64(
    device: torch.device, settings: dict[str, object]
) -> None:
    skip_unsupported(device, torch.float64)
    problem = make_problem(device, **settings)
    codes, residual = problem.solve(dtype=torch.float64)
    expected, expected_residual = problem.solve(reference.refine_, torch.float64)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(residual, expected_residual, rtol=0, atol=1e-12)


@cache
def reference_codes(name: str) -> Tensor:
    """Slow, so once for all devices."""
    return make_problem(torch.device("cpu"), **PROBLEMS[name]).solve(reference.refine_)[0]


@each_instruction_set
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_codes_as_the_reference_in_float32(device: torch.device, name: str) -> None:
    problem = make_problem(device, **PROBLEMS[name])
    codes = problem.solve()[0]
    expected = reference_codes(name).to(device)
    # A pull within some 1e-6 of the midpoint between two codes may be decided either way, as sums
    # are fused in one and not in the other; it changes the rest of its row: at most one row here.
    different = (codes != expected).any(1)
    assert int(different.sum()) <= 1
    objective, reached = problem.objective(codes), problem.objective(expected)
    torch.testing.assert_close(objective.sum(), reached.sum(), rtol=0.02, atol=1e-6)


@each_instruction_set
@each_dtype
@each_problem
def test_descends_to_a_minimum(
    device: torch.device, settings: dict[str, object], dtype: torch.dtype
) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, **settings)
    codes, residual = problem.solve(dtype=dtype)
    before, after = problem.objective(problem.codes), problem.objective(codes)
    assert (after <= before * (1 + 1e-6)).all()
    changed = (codes != problem.codes).any(1)
    assert (after < before)[changed].all()
    if codes.shape[1] > 1:
        assert changed.any()
    assert int(codes.min()) >= problem.qmin
    assert int(codes.max()) <= problem.qmax
    exact = problem.exact_residual(codes)
    drift = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(residual.double(), exact, rtol=0, atol=drift)
    check_certificate(problem, codes, exact)


def check_certificate(problem: Problem, codes: Tensor, residual: Tensor) -> None:
    """No change of a single code to any other of the grid lowers its row's objective."""
    curvature = problem.gram.double().diagonal(dim1=1, dim2=2)
    curvature = curvature.repeat_interleave(len(codes) // len(curvature), dim=0)
    scale = reference.expand_grid(problem.scale.double(), *codes.shape)
    for code in range(problem.qmin, problem.qmax + 1):
        move = (code - codes.double()) * scale
        change = 2 * move * residual + move.square() * curvature
        # The descent asks for 1e-4 of a step past the midpoint, worth 2e-4 G_jj s_j^2; twice that.
        assert (change >= -4e-4 * curvature * scale.square()).all()


@each_instruction_set
def test_one_sweep_by_hand(device: torch.device) -> None:
    # Weights (.4, .4) on the grid of integers, G = [[1, .9], [.9, 1]]: nearest is (0, 0) with
    # residual -(.76, .76). Code 0 goes up: the errors are (.6, -.4), G e = (.24, .14). Done.
    codes = torch.zeros(1, 2, dtype=torch.int8, device=device)
    residual = torch.full((1, 2), -0.76, device=device)
    gram = torch.tensor([[[1.0, 0.9], [0.9, 1.0]]], device=device)
    ops.refine_(codes, residual, gram, torch.ones(1, 1, device=device), -8, 7, 1)
    assert codes.tolist() == [[1, 0]]
    torch.testing.assert_close(residual, torch.tensor([[0.24, 0.14]], device=device))


@each_instruction_set
def test_moves_several_codes_at_once_and_stops_at_the_grid(device: torch.device) -> None:
    codes = torch.tensor([[0, 0, 5, -8]], dtype=torch.int8, device=device)
    residual = torch.tensor([[-3.4, 20.0, -4.0, 9.0]], device=device)
    gram = torch.eye(4, device=device).unsqueeze(0)
    ops.refine_(codes, residual, gram, torch.ones(1, 1, device=device), -8, 7, MANY)
    assert codes.tolist() == [[3, -8, 7, -8]]
    torch.testing.assert_close(residual, torch.tensor([[-0.4, 12.0, -2.0, 9.0]], device=device))


@each_instruction_set
def test_equal_codes_do_not_alternate(device: torch.device) -> None:
    # A change must lie 1e-4 of a step past the midpoint between two codes.
    residual = [[-0.5], [0.5], [-0.50005], [0.50005], [-0.5002], [0.5002]]
    residual = torch.tensor(residual, device=device)
    codes = torch.zeros(6, 1, dtype=torch.int8, device=device)
    gram = torch.ones(1, 1, 1, device=device)
    ops.refine_(codes, residual, gram, torch.ones(1, 1, device=device), -8, 7, MANY)
    assert codes.flatten().tolist() == [0, 0, 0, 0, 1, -1]


@each_instruction_set
@each_dtype
def test_no_sweeps_change_nothing(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device)
    codes, residual = problem.solve(dtype=dtype, max_sweeps=0)
    assert torch.equal(codes, problem.codes)
    assert torch.equal(residual, problem.exact_residual(codes).to(dtype))


@each_instruction_set
def test_sweeps_are_counted(device: torch.device) -> None:
    problem = make_problem(device)
    once, twice = (problem.solve(max_sweeps=n)[0] for n in (1, 2))
    again = replace(problem, codes=once).solve(max_sweeps=1)[0]
    assert not torch.equal(once, twice)
    assert torch.equal(again, twice)
    assert torch.equal(once, problem.solve(reference.refine_, max_sweeps=1)[0])


@each_instruction_set
@each_dtype
def test_dead_inputs_are_left_alone(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device)
    problem.gram[:, 3] = 0
    problem.gram[:, :, 3] = 0
    codes, residual = problem.solve(dtype=dtype)
    assert torch.equal(codes[:, 3], problem.codes[:, 3])
    assert torch.equal(residual[:, 3], torch.zeros_like(residual[:, 3]))
    assert not torch.equal(codes, problem.codes)
    silent = replace(problem, gram=torch.zeros_like(problem.gram))
    assert torch.equal(silent.solve(dtype=dtype)[0], problem.codes)


@each_instruction_set
def test_nan_in_a_residual_changes_no_code(device: torch.device) -> None:
    problem = make_problem(device)
    codes = problem.codes.clone()
    residual = torch.full_like(problem.weight, torch.nan)
    ops.refine_(codes, residual, problem.gram, problem.scale, problem.qmin, problem.qmax, MANY)
    assert torch.equal(codes, problem.codes)


@each_instruction_set
@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (3, 0), (0, 0)])
def test_empty(device: torch.device, rows: int, cols: int) -> None:
    codes = torch.zeros(rows, cols, dtype=torch.uint8, device=device)
    residual = torch.zeros(rows, cols, device=device)
    gram = torch.ones(1, cols, cols, device=device)
    ops.refine_(codes, residual, gram, torch.ones(1, 1, device=device), 0, 15, MANY)


@each_instruction_set
@pytest.mark.parametrize("move", [unaligned, transposed, strided])
def test_layouts_give_the_same_bits(device: torch.device, move: Callable[[Tensor], Tensor]) -> None:
    problem = make_problem(device, 6, 33, n_groups=3, groups=2)
    codes, residual = problem.solve()
    gram = problem.gram.mT.contiguous().mT if move is transposed else move(problem.gram)
    moved = unaligned(problem.codes)
    moved_residual = unaligned(problem.exact_residual(problem.codes).float())
    scale = move(problem.scale)
    ops.refine_(moved, moved_residual, gram, scale, problem.qmin, problem.qmax, MANY)
    assert torch.equal(moved, codes)
    assert torch.equal(moved_residual, residual)


@each_instruction_set
@each_dtype
def test_same_bits_for_any_number_of_threads(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, 37, 65, groups=1, n_groups=5)
    with threads(1):
        one, again = problem.solve(dtype=dtype), problem.solve(dtype=dtype)
    with threads(2):
        two = problem.solve(dtype=dtype)
    for first, second, threaded in zip(one, again, two, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, threaded)
