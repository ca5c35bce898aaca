"""Products of float32 on a GPU, from three of TF32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaround_ext.linalg import products
from adaround_ext.linalg.precision import full_precision, tf32_products


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


BITS = {
    "cuda-nan": 0x7FFFFFFF,
    "negative-cuda-nan": 0xFFFFFFFF,
    "nan": 0x7FC00000,
    "negative-nan": 0xFFC00000,
    "signalling-nan": 0x7F800001,
    "largest-signalling-nan": 0x7FBFFFFF,
    "infinity": 0x7F800000,
    "negative-infinity": 0xFF800000,
    "largest": 0x7F7FFFFF,
    "negative-largest": 0xFF7FFFFF,
    "first-towards-zero": 0x7F7FF000,
    "last-to-nearest": 0x7F7FEFFF,
    "one-and-a-half-unit": 0x3F801000,
    "smallest-normal": 0x00800000,
    "zero": 0x00000000,
    "negative-zero": 0x80000000,
}


def _of_bits(bits: int, device: torch.device) -> Tensor:
    signed = bits - (1 << 32) if bits >= 1 << 31 else bits
    return torch.tensor([signed], dtype=torch.int32, device=device).view(torch.float32)


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS.keys())
def test_every_kind_of_number_in_two(device: torch.device, bits: int) -> None:
    x = _of_bits(bits, device)
    upper, rest = products._in_two(x)
    if bool(x.isnan()):
        assert bool(upper.isnan())
        assert bool(rest.isnan())
    elif bool(x.isinf()):
        assert torch.equal(upper, x)
        assert float(rest) == 0
    else:
        exact = x.double()
        for part in (upper, rest):
            assert bool(part.isfinite())
            assert int(part.view(torch.int32)) % (1 << 13) == 0
        assert float((upper.double() + rest - exact).abs()) <= 2**-22 * float(exact.abs())
        assert torch.equal(upper.signbit(), x.signbit())


@pytest.mark.parametrize("bits", [b for b in BITS.values() if b & 0x7F800000 == 0x7F800000])
@pytest.mark.parametrize("factor", ["a", "b"])
def test_what_is_not_finite_stays_so_in_a_product(
    device: torch.device, bits: int, factor: str
) -> None:
    """So that a guard that asks for NaN or infinity sees it."""
    a, b = torch.ones(1, 3, 4, device=device), torch.full((1, 4, 2), 0.3, device=device)
    {"a": a, "b": b}[factor][0, 1, 1] = _of_bits(bits, device)
    with full_precision(device):
        got = products._three_products(a, b, None)
    touched = torch.zeros(1, 3, 2, dtype=torch.bool, device=device)
    touched[(0, 1) if factor == "a" else (0, slice(None), 1)] = True
    assert torch.equal(~got.isfinite(), touched)


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
    monkeypatch.setattr(products, "_MIN_LARGE", 1 << 21)
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
