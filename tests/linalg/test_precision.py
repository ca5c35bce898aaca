"""What the caller allows elsewhere does not reach the results, and is as it was afterwards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from adaround_ext import optimize_layer
from adaround_ext.linalg.precision import full_precision, tf32_products


def test_results_do_not_depend_on_the_callers_precision(device: torch.device) -> None:
    layer = nn.Linear(96, 64).to(device)
    inputs = torch.randn(400, 96, device=device) @ torch.randn(96, 96, device=device)
    expected = optimize_layer(layer, inputs, steps=60)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16):
            result = optimize_layer(layer, inputs, steps=60)
            assert torch.is_autocast_enabled(device.type)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(result.codes, expected.codes)
    assert result.report.losses == expected.report.losses


@pytest.mark.parametrize(("kind", "expected"), [("cuda", "high"), ("cpu", "highest")])
def test_tf32_is_for_products_on_cuda(kind: str, expected: str) -> None:
    """Settings are the process's: no CUDA device has to be there."""
    with full_precision(torch.device("cpu")):
        with pytest.raises(KeyError), tf32_products(torch.device(kind)):
            assert torch.get_float32_matmul_precision() == expected
            assert not torch.backends.cudnn.allow_tf32
            raise KeyError
        assert torch.get_float32_matmul_precision() == "highest"
        assert torch._C._get_fp32_precision_getter("cuda", "matmul") == "ieee"


def test_tf32_products(device: torch.device) -> None:
    """On the CPU those of float32; on CUDA rounding errors, but another result."""
    layer = nn.Linear(96, 64).to(device)
    inputs = torch.randn(400, 96, device=device)
    settings = {"steps": 200, "starts": ("adaround",), "refine": False}
    exact, fast = (
        optimize_layer(layer, inputs, products=products, **settings)
        for products in ("float32", "tf32")
    )
    same = (exact.codes == fast.codes).float().mean()
    assert same == 1 if device.type == "cpu" else same > 0.9


def test_restored_after_an_exception(device: torch.device) -> None:
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    assert not torch.backends.cudnn.deterministic
    with pytest.raises(KeyError), full_precision(device):
        assert torch.get_float32_matmul_precision() == "highest"
        assert not torch.backends.cudnn.allow_tf32
        assert torch.backends.cudnn.deterministic
        raise KeyError
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32) == before


def test_convolutions_have_the_same_algorithms_each_time(device: torch.device) -> None:
    flags = torch.backends.cudnn
    with flags.flags(enabled=True, benchmark=True, deterministic=False):
        with full_precision(device):
            assert flags.enabled and flags.deterministic and not flags.benchmark
            assert not flags.allow_tf32  # torch's older functions can tell
        assert flags.benchmark and not flags.deterministic
