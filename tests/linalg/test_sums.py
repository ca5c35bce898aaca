"""Sums in float64 of values in float32, on CUDA in pieces."""

from __future__ import annotations

import pytest
import torch

from adaround_ext.linalg.sums import double_sum


@pytest.mark.parametrize("length", [0, 1, 63, 64, 65, 1000])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_any_length_and_dimension(device: torch.device, length: int, dim: int) -> None:
    shape = [3, 4, 5]
    shape[dim] = length
    values = torch.randn(shape, device=device) + 1000
    for given in (values, values.transpose(0, 1).contiguous().transpose(0, 1)):
        got = double_sum(given, dim)
        assert got.dtype == torch.float64
        torch.testing.assert_close(got, values.double().sum(dim), rtol=1e-6, atol=0)
