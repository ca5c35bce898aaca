"""The blocked factorisation: a library's results, for any number of threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaround_ext.linalg.cholesky import Cholesky
from adaround_ext.rounding.gptq import OrderedCholesky

pytestmark = pytest.mark.on_a_device

# Within a block, at its end, beyond it by less and by more than products are filled up to.
SIZES = [1, 7, 127, 128, 129, 144, 300, 700]


def matrices(device: torch.device, groups: int, n: int) -> Tensor:
    x = torch.randn(groups, n, 2 * n + 1, dtype=torch.float64) * torch.rand(n, 1).double()
    gram = x @ x.mT / x.shape[2]
    gram.diagonal(dim1=1, dim2=2).add_(0.01)
    return gram.to(device)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("n", SIZES)
def test_factor_and_solution(device: torch.device, groups: int, n: int) -> None:
    a = matrices(device, groups, n)
    before = a.clone()
    factor = Cholesky.of(a)
    torch.testing.assert_close(factor.lower, torch.linalg.cholesky(a), rtol=1e-9, atol=1e-9)
    assert torch.equal(factor.lower, factor.lower.tril())
    right = torch.randn(groups, 5, n, dtype=torch.float64).to(device)
    given = right.clone()
    for own in (factor, OrderedCholesky.of(a)):
        torch.testing.assert_close(own.solve(right) @ a, right, rtol=1e-9, atol=1e-9)
    assert torch.equal(a, before) and torch.equal(right, given)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("n", [150, 700, 1100])
def test_threads_do_not_change_the_bits(groups: int, n: int) -> None:
    a = matrices(torch.device("cpu"), groups, n)
    right = torch.randn(groups, 37, n, dtype=torch.float64)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 16):
            torch.set_num_threads(threads)
            factor = Cholesky.of(a)
            found.append((factor.lower, factor.solve(right)))
    finally:
        torch.set_num_threads(before)
    for lower, solution in found[1:]:
        assert torch.equal(lower, found[0][0]) and torch.equal(solution, found[0][1])


def test_rows_do_not_depend_on_each_other() -> None:
    """Ranks share the rows of a layer."""
    a = matrices(torch.device("cpu"), 1, 300)
    right = torch.randn(1, 80, 300, dtype=torch.float64)
    factor = Cholesky.of(a)
    whole = factor.solve(right)
    assert torch.equal(whole[:, 16:48], factor.solve(right[:, 16:48]))


@pytest.mark.parametrize("n", [20, 200])
def test_singular_matrices_are_shifted_alone(device: torch.device, n: int) -> None:
    good = matrices(device, 2, n)
    both = torch.cat([good, torch.ones_like(good[:1]), torch.zeros_like(good[:1])])
    lower = Cholesky.of(both).lower
    assert bool(lower.isfinite().all())
    torch.testing.assert_close(lower @ lower.mT, both, rtol=0, atol=1e-5)
    torch.testing.assert_close(lower[:2] @ lower[:2].mT, good, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_is_refused(device: torch.device, value: float) -> None:
    a = matrices(device, 2, 5)
    a[1, 2, 3] = value
    with pytest.raises(ValueError, match="gram must be finite, got NaN or infinite values"):
        Cholesky.of(a)
