"""Which rows of two streams are one token's."""

from __future__ import annotations

import pytest
import torch

from adaround_ext.statistics.pairing import paired_rows


@pytest.mark.parametrize("noise", [0.0, 1e-4, 0.1, 0.3])
@pytest.mark.parametrize("shape", [(2, 8), (70, 16), (1000, 64), (40, 3, 4, 4)])
def test_a_row_with_noise_is_its_partner(shape: tuple[int, ...], noise: float) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape)
    assert paired_rows(x + noise * torch.randn(shape), x).all()


@pytest.mark.parametrize("rows", [2, 5, 70, 1000])
def test_others_are_not(rows: int) -> None:
    torch.manual_seed(0)
    x = torch.randn(rows, 32)
    assert not paired_rows(x.roll(1, 0) + 1e-3 * torch.randn(rows, 32), x).any()
    assert not paired_rows(torch.randn(rows, 32), x).any()


def test_some_are() -> None:
    torch.manual_seed(0)
    x = torch.randn(1000, 32)
    moved = x.clone()
    moved[100:150] = x[100:150].roll(1, 0)
    paired = paired_rows(moved, x)
    assert paired[:100].all() and paired[150:].all()
    assert int(paired[100:150].sum()) < 5  # one in 65 by chance


def test_equal_rows_are_one() -> None:
    """Zeros, padding, one token again and again: whichever stands in the place."""
    x = torch.randn(4, 16).repeat(50, 1)
    assert paired_rows(x + 1e-3 * torch.randn(4, 16).repeat(50, 1), x).all()
    assert paired_rows(torch.zeros(9, 16), torch.zeros(9, 16)).all()


def test_alone_nothing_can_be_told() -> None:
    x = torch.randn(1, 16)
    assert not paired_rows(x, x).any()
    assert paired_rows(x[:0], x[:0]).shape == (0,)


@pytest.mark.usefixtures("one_thread")
def test_the_same_marks_with_any_threads() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(501, 33), torch.randn(501, 33)
    y[:460] = x[:460] + 0.9 * torch.randn(460, 33)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        found.append(paired_rows(x, y))
    assert found[0].any() and not found[0].all()
    assert all(torch.equal(found[0], other) for other in found)
