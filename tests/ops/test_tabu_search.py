"""tabu_search_: the codes of the reference's search, never worse, better than a descent alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import product

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
from tests.support.problems import PROBLEMS, Problem, each_dtype, each_problem, make_problem

each_instruction_set = pytest.mark.usefixtures("instruction_set")

MOST = 2**23  # steps: seconds, if a search that can change nothing did not end


@cache
def reference_codes(name: str, steps: int) -> tuple[Tensor, Tensor]:
    """Slow, so once for all devices and dtypes."""
    problem = make_problem(torch.device("cpu"), **PROBLEMS[name])
    return problem.search(reference.tabu_search_, torch.float64, steps)


@pytest.mark.usefixtures("one_thread")  # float64 has one set of loops
@pytest.mark.parametrize("steps", [1, 2, 60])
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_codes_as_the_reference_in_float64(
    device: torch.device, name: str, steps: int
) -> None:
    skip_unsupported(device, torch.float64)
    codes, residual = make_problem(device, **PROBLEMS[name]).search(
        dtype=torch.float64, steps=steps
    )
    expected, expected_residual = reference_codes(name, steps)
    assert torch.equal(codes, expected)
    torch.testing.assert_close(residual, expected_residual, rtol=0, atol=1e-12)


@each_instruction_set
@pytest.mark.parametrize("steps", [1, 2, 60])
@pytest.mark.parametrize("name", PROBLEMS)
def test_same_codes_as_the_reference_in_float32(
    device: torch.device, name: str, steps: int
) -> None:
    problem = make_problem(device, **PROBLEMS[name])
    codes = problem.search(steps=steps)[0]
    expected = reference_codes(name, steps)[0].to(device)
    # Of two changes that cost the same but for some 1e-6 either may be taken: one row at most.
    assert int((codes != expected).any(1).sum()) <= 1


@each_instruction_set
@pytest.mark.parametrize("seed", [1, 2**63 - 1])
def test_long_search_of_many_columns(device: torch.device, seed: int) -> None:
    # More than 120 columns: they rest for longer. The largest seed: modulo 2^64, without a sign.
    problem = make_problem(device, 4, 163)
    codes = problem.search(steps=200, seed=seed)[0]
    search = reference.tabu_search_
    expected = problem.search(search, torch.float32, steps=200, seed=seed)[0]
    assert int((codes != expected).any(1).sum()) <= 1


@each_instruction_set
@each_dtype
@each_problem
def test_never_worse(device: torch.device, settings: dict[str, object], dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, **settings)
    codes, residual = problem.search(dtype=dtype)
    assert_improved(problem, codes)
    if codes.shape[1] > 1:
        assert not torch.equal(codes, problem.codes)
    assert int(codes.min()) >= problem.qmin
    assert int(codes.max()) <= problem.qmax
    drift = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    torch.testing.assert_close(residual.double(), problem.exact_residual(codes), rtol=0, atol=drift)


def assert_improved(problem: Problem, codes: Tensor) -> None:
    """Every row is better than it was, or what it was."""
    changed = (codes != problem.codes).any(1)
    assert (problem.objective(codes) < problem.objective(problem.codes))[changed].all()


@each_instruction_set
@each_dtype
@each_problem
def test_never_worse_than_a_descent(
    device: torch.device, settings: dict[str, object], dtype: torch.dtype
) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, **settings)
    descended = replace(problem, codes=problem.solve(dtype=dtype)[0])
    codes = descended.search(dtype=dtype, steps=300)[0]
    assert_improved(descended, codes)
    if codes.shape[1] > 1:
        assert not torch.equal(codes, descended.codes)


@each_instruction_set
def test_one_step_by_hand(device: torch.device) -> None:
    # Steps of scale 1 under the unit matrix cost 1 - 2 |residual|: -1, -.2, .4; the first is made.
    codes = torch.tensor([[0, 0, 0]], dtype=torch.int8, device=device)
    residual = torch.tensor([[1.0, -0.6, 0.3]], device=device)
    gram = torch.eye(3, device=device).unsqueeze(0)
    ops.tabu_search_(codes, residual, gram, torch.ones(1, 1, device=device), -8, 7, 1, 0)
    assert codes.tolist() == [[-1, 0, 0]]
    torch.testing.assert_close(residual, torch.tensor([[0.0, -0.6, 0.3]], device=device))


@each_instruction_set
def test_stops_at_the_grid(device: torch.device) -> None:
    # A column may change although it rests where that leads below the best codes so far.
    codes = torch.tensor([[5, -8, 0]], dtype=torch.int8, device=device)
    residual = torch.tensor([[-4.2, 9.0, 20.0]], device=device)
    gram = torch.eye(3, device=device).unsqueeze(0)
    ops.tabu_search_(codes, residual, gram, torch.ones(1, 1, device=device), -8, 7, 100, 0)
    assert codes.tolist() == [[7, -8, -8]]
    torch.testing.assert_close(residual, torch.tensor([[-2.2, 9.0, 12.0]], device=device))


@each_instruction_set
@each_dtype
def test_finds_the_optimum_of_small_problems(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    rows = 40
    problem = make_problem(device, rows, 6, bits=2)
    least = brute_force(problem)
    descended = problem.solve(dtype=dtype)[0]
    searched = replace(problem, codes=descended).search(dtype=dtype, steps=200)[0]
    found = {}
    for name, codes in (("descent", descended), ("search", searched)):
        found[name] = int((problem.objective(codes) < least * (1 + 1e-6)).sum())
    assert found["descent"] < found["search"] == rows


def brute_force(problem: Problem) -> Tensor:
    """The least e G e^T of each row over all codes."""
    cols = problem.codes.shape[1]
    every = torch.tensor(list(product(range(problem.qmin, problem.qmax + 1), repeat=cols)))
    gram = problem.gram[0].double()
    least = []
    for weight, scale in zip(problem.weight.double(), problem.scale.double(), strict=True):
        error = every.to(weight) * scale - weight
        least.append((error @ gram * error).sum(1).min())
    return torch.stack(least)


@each_instruction_set
@each_dtype
def test_no_steps_change_nothing(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device)
    codes, residual = problem.search(dtype=dtype, steps=0)
    assert torch.equal(codes, problem.codes)
    assert torch.equal(residual, problem.exact_residual(codes).to(dtype))


@each_instruction_set
@each_dtype
def test_dead_inputs_are_left_alone(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device)
    problem.gram[:, 3] = 0
    problem.gram[:, :, 3] = 0
    codes = problem.search(dtype=dtype)[0]
    assert torch.equal(codes[:, 3], problem.codes[:, 3])
    assert not torch.equal(codes, problem.codes)
    silent = replace(problem, gram=torch.zeros_like(problem.gram))
    assert torch.equal(silent.search(dtype=dtype, steps=MOST)[0], problem.codes)


@each_instruction_set
@each_dtype
def test_nan_in_a_residual_changes_no_code(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device)
    codes = problem.codes.clone()
    residual = torch.full_like(problem.weight, torch.nan, dtype=dtype)
    gram, scale = problem.gram.to(dtype), problem.scale.to(dtype)
    ops.tabu_search_(codes, residual, gram, scale, problem.qmin, problem.qmax, MOST, 0)
    assert torch.equal(codes, problem.codes)
    assert residual.isnan().all()


@each_instruction_set
@pytest.mark.parametrize(("rows", "cols"), [(0, 5), (3, 0), (0, 0)])
def test_empty(device: torch.device, rows: int, cols: int) -> None:
    codes = torch.zeros(rows, cols, dtype=torch.uint8, device=device)
    residual = torch.zeros(rows, cols, device=device)
    gram = torch.ones(1, cols, cols, device=device)
    ops.tabu_search_(codes, residual, gram, torch.ones(1, 1, device=device), 0, 15, MOST, 0)


@each_instruction_set
def test_another_seed_gives_other_codes(device: torch.device) -> None:
    problem = make_problem(device, 8, 163)
    first, again, other = (problem.search(steps=200, seed=seed)[0] for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@each_instruction_set
def test_a_row_alone_has_the_codes_it_has_among_others(device: torch.device) -> None:
    problem = make_problem(device, 7, 163)
    start = problem.exact_residual(problem.codes).float()
    codes, residual = problem.search(steps=200)
    for row in range(7):
        one = slice(row, row + 1)
        alone, alone_residual = problem.codes[one].clone(), start[one].clone()
        grid = problem.scale[one], problem.qmin, problem.qmax
        ops.tabu_search_(alone, alone_residual, problem.gram, *grid, 200, 0)
        assert torch.equal(alone, codes[one])
        assert torch.equal(alone_residual, residual[one])


@each_instruction_set
@pytest.mark.parametrize("move", [unaligned, transposed, strided])
def test_layouts_give_the_same_bits(device: torch.device, move: Callable[[Tensor], Tensor]) -> None:
    problem = make_problem(device, 6, 33, n_groups=3, groups=2)
    codes, residual = problem.search()
    gram = problem.gram.mT.contiguous().mT if move is transposed else move(problem.gram)
    moved = unaligned(problem.codes)
    moved_residual = unaligned(problem.exact_residual(problem.codes).float())
    scale = move(problem.scale)
    ops.tabu_search_(moved, moved_residual, gram, scale, problem.qmin, problem.qmax, 100, 0)
    assert torch.equal(moved, codes)
    assert torch.equal(moved_residual, residual)


@each_instruction_set
@each_dtype
def test_same_bits_for_any_number_of_threads(device: torch.device, dtype: torch.dtype) -> None:
    skip_unsupported(device, dtype)
    problem = make_problem(device, 37, 65, n_groups=5)
    with threads(1):
        one, again = problem.search(dtype=dtype), problem.search(dtype=dtype)
    with threads(2):
        two = problem.search(dtype=dtype)
    for first, second, threaded in zip(one, again, two, strict=True):
        assert torch.equal(first, second)
        assert torch.equal(first, threaded)
