"""CUDA kernels on the processor: `make sanitize` runs the op tests with them."""

from __future__ import annotations

import pytest
import torch
from helpers import EMULATED, make_sample

from adaround_ext import ops
from tests.emulation.library import as_cpp

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
