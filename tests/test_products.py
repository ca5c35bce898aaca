"""Products of float32 on a GPU, from three of TF32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaround_ext import products
from adaround_ext.precision import full_precision, tf32_products


def _make(device: torch.device) -> tuple[Tensor, Tensor]:
    """Of all magnitudes, some of them 0."""
    sizes = torch.logspace(-9, 9, 700)
    a = torch.randn(2, 40, 700) * sizes
    b = torch.randn(2, 700, 33) / sizes[:, None]
    a[0, :, 5] = 0
    return a.to(device), b.to(device)


def _error(got: Tensor, a: Tensor, b: Tensor) -> float:
    """The largest error over what the terms of a sum add up to."""
    exact, size = a.double() @ b.double(), a.double().abs() @ b.double().abs()
    return float(((got - exact).abs() / size).max())


def test_a_number_in_two(device: torch.device) -> None:
    x = _make(device)[0].mT  # not contiguous
    upper, rest = products._in_two(x)
    exact = x.double()
    assert bool(((upper.double() + rest - exact).abs() <= 2**-23 * exact.abs()).all())
    assert bool(((upper - exact).abs() <= 2**-11 * exact.abs()).all())
    for part in (upper, rest):
        assert bool((part.contiguous().view(torch.int32) % (1 << 13) == 0).all())


@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_three_products(device: torch.device, given: bool) -> None:
    a, b = _make(device)
    with full_precision(device):
        out = torch.empty(2, 40, 33, device=device) if given else None
        got = products._three_products(a, b, out)
        plain = torch.bmm(a, b)
        assert torch.get_float32_matmul_precision() == "highest"
    assert out is None or out.data_ptr() == got.data_ptr()
    assert _error(got, a, b) < max(4 * _error(plain, a, b), 5e-7)


def test_large_products_only(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """And only where float32's digits are wanted."""
    monkeypatch.setattr(products, "_LARGE", 1 << 21)
    a, b = _make(device)
    cuda = device.type == "cuda"
    with full_precision(device):
        assert products._is_large(a, b[:, :, :32]) is (cuda and a.numel() * 32 >= 1 << 21)
        assert products._is_large(a, b) is (cuda and a.numel() * 33 >= 1 << 21)
        assert not products._is_large(a[:, :, :500], b[:, :500].repeat(1, 1, 9))
        assert not products._is_large(a.double(), b.double())
        assert not products._is_large(a[:, :1], b)
        with tf32_products(device):
            assert not products._is_large(a, b) or not cuda
