"""What stands in for CUDA: `make sanitize` runs the kernels, `make pretend` the drivers with it."""

from __future__ import annotations

import pytest
import torch

from adaround_ext import ops
from tests.emulation import EMULATED
from tests.emulation.library import as_cpp
from tests.emulation.pretended import cuda_device
from tests.support.helpers import make_sample

KERNEL = """
__global__ void kernel() { extern __shared__ float4 memory[]; }
void run() { kernel<int><<<blocks(n), 32, 0, stream>>>(a, b); }
STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CUDA, m) {}
"""


def test_cuda_as_cpp() -> None:
    text = as_cpp(KERNEL)
    assert "float4* memory = static_cast<float4*>(emulation::shared_memory());" in text
    assert "emulation::launch(blocks(n), 32, 0, stream, [&] { kernel<int>(a, b); });" in text
    assert "STABLE_TORCH_LIBRARY_IMPL(adaround_ext, CPU, m)" in text


@pytest.mark.parametrize("missing", ["<<<blocks(n), 32, 0, stream>>>", "CUDA"])
def test_what_is_not_understood_is_refused(missing: str) -> None:
    with pytest.raises(ValueError, match="a launch, shared memory or the ops were not found"):
        as_cpp(KERNEL.replace(missing, ""))


@pytest.mark.skipif(not EMULATED, reason="the kernels of the CPU are in use")
def test_the_ops_are_the_emulated_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EMULATION_ORDER", "sideways")
    with pytest.raises(RuntimeError, match=r"EMULATION_ORDER must be .* got sideways"):
        ops.hard_quantize(*make_sample(torch.device("cpu")).args)


def test_tensors_of_a_device_that_is_not_there() -> None:
    x = torch.arange(6.0).view(2, 3)
    with cuda_device() as device:
        there = x.to(device)
        there[0] *= 2
        there += torch.tensor(1.0)  # a number may be on the CPU
        assert there.device == torch.ones(2, device=device).device == device
        assert there.cpu().tolist() == [[1.0, 3.0, 5.0], [4.0, 5.0, 6.0]]
        assert x.tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
        with pytest.raises(RuntimeError, match="found at least two devices, cuda:0 and cpu"):
            there + x
    assert type(torch.tensor(1.0)) is torch.Tensor
