"""Sample inputs, the fixture for instruction sets, and the tolerance of the op tests."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from adaround_ext import reference
from adaround_ext.ops.library import build_info, use_instruction_set
from tests.emulation import EMULATED

CLIP_EDGE = 2.3978952728  # log 11: h(V) leaves [0, 1] beyond it
# Torch 2.15 and later make a RuntimeError of every C++ exception of an op; the text stays.
ARGUMENT_ERROR = RuntimeError if torch.__version__ >= (2, 15) else ValueError


def _available(name: str) -> bool:
    try:
        use_instruction_set(name)
    except ValueError:
        return False
    finally:
        use_instruction_set("auto")
    return True


INSTRUCTION_SETS = [name for name in build_info()["instruction_sets"] if _available(name)]
DTYPES = [
    pytest.param(torch.float32, id="f32"),
    pytest.param(torch.bfloat16, id="bf16"),
    pytest.param(torch.float16, id="f16"),
    pytest.param(torch.float64, id="f64"),
]
# 0, 1, around a vector and around a chunk, odd, and several chunks.
SIZES = [(0, 5), (3, 0), (1, 1), (1, 127), (2, 64), (3, 43), (7, 13), (1, 1024), (3, 1367)]
# (bits, symmetric, rows of scale, groups of columns): every width, kind and granularity once.
GRIDS = [
    pytest.param((4, True, "one", 1), id="4-sym-tensor"),
    pytest.param((4, False, "each", 1), id="4-asym-channel"),
    pytest.param((2, True, "each", 1), id="2-sym-channel"),
    pytest.param((2, False, "one", 1), id="2-asym-tensor"),
    pytest.param((3, False, "each", 4), id="3-asym-group"),
    pytest.param((3, True, "one", 2), id="3-sym-shared-group"),
    pytest.param((8, True, "each", 3), id="8-sym-group"),
    pytest.param((8, False, "each", 1), id="8-asym-channel"),
]


@contextmanager
def threads(count: int) -> Iterator[None]:
    """Torch's thread pool has ``count`` threads inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(
    request: pytest.FixtureRequest, device: torch.device, one_thread: None
) -> Iterator[str]:
    """Each instruction set of this machine in turn; on CUDA, where it means nothing, once."""
    if has_cuda_kernels(device) and request.param != INSTRUCTION_SETS[0]:
        pytest.skip("instruction sets are the CPU's")
    yield use_instruction_set(request.param)
    use_instruction_set("auto")


def has_cuda_kernels(device: torch.device) -> bool:
    """Whether ops on ``device`` run what csrc/cuda has, on a GPU or emulated."""
    return device.type == "cuda" or EMULATED


def skip_unsupported(device: torch.device, dtype: torch.dtype) -> None:
    if has_cuda_kernels(device) and dtype == torch.float64:
        pytest.skip("float64 is for the CPU only")


def arithmetic_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of v, the moments and the scale beside a weight of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True)
class Sample:
    """Arguments that soft_quantize, hard_quantize and rounding_step_ share."""

    weight: Tensor
    v: Tensor
    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int]:
        return self.weight, self.v, self.scale, self.zero_point, self.qmin, self.qmax

    def double(self) -> Sample:
        """The same numbers in float64, for the oracle."""
        return replace(
            self, weight=self.weight.double(), v=self.v.double(), scale=self.scale.double()
        )


def make_sample(
    device: torch.device,
    rows: int = 6,
    cols: int = 24,
    *,
    dtype: torch.dtype = torch.float32,
    grid: tuple[int, bool, str, int] = (4, True, "each", 1),
) -> Sample:
    """Random arguments at least a little away from every kink; some weights lie beyond the grid."""
    bits, symmetric, scale_rows, groups = grid
    qmin, qmax = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    shape = (1 if scale_rows == "one" else rows, groups)
    scale = 0.05 + 0.1 * torch.rand(shape)
    zero_point = torch.zeros(shape, dtype=torch.int32)
    if not symmetric:
        zero_point = torch.randint(qmin, qmax + 1, shape, dtype=torch.int32)
    return Sample(
        _weights_off_grid_lines(rows, cols, scale, zero_point, qmin, qmax, dtype).to(device),
        _v_off_kinks(rows, cols).to(device, arithmetic_dtype(dtype)),
        scale.to(device, arithmetic_dtype(dtype)),
        zero_point.to(device),
        qmin,
        qmax,
    )


def _weights_off_grid_lines(
    rows: int,
    cols: int,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    dtype: torch.dtype,
) -> Tensor:
    # floor(w / s) may differ between float32 and the float64 oracle within an ulp of a grid line.
    s = reference.expand_grid(scale, rows, cols)
    z = reference.expand_grid(zero_point, rows, cols)
    below = torch.randint(qmin - 2, qmax + 2, (rows, cols)) - z
    weight = (s * (below + 0.02 + 0.96 * torch.rand(rows, cols))).to(dtype)
    steps = weight.double() / s.double()
    near = (steps - steps.round()).abs() < 1e-3  # after rounding to dtype
    return torch.where(near, (0.4 * s).to(dtype), weight)


def _v_off_kinks(rows: int, cols: int) -> Tensor:
    # h has kinks at its clip edges, the regularizer at V = 0 (for beta < 2, a jump for beta = 1).
    v = 8 * torch.rand(rows, cols) - 4
    for kink in (-CLIP_EDGE, 0.0, CLIP_EDGE):
        v = torch.where((v - kink).abs() < 0.05, kink + 0.07, v)
    return v


def weight_eps(sample: Sample, dtype: torch.dtype | None = None) -> float:
    """What weight_q may err beyond twice the eager reference's error, which can be 0 by luck.

    A few roundings of h, the rounding of a code of that size, and one of the storage in ``dtype``.
    """
    if sample.scale.numel() == 0:
        return 0.0
    scale = float(sample.scale.max())
    arithmetic = torch.finfo(sample.v.dtype).eps * (2 + max(abs(sample.qmin), sample.qmax))
    storage = torch.finfo(dtype or sample.weight.dtype).eps / 2 * (sample.qmax - sample.qmin)
    return scale * (arithmetic + storage)


def reg_eps(beta: float, dtype: torch.dtype) -> float:
    """The same for the regularizer of one weight and for its derivative, at most 0.6 beta."""
    return torch.finfo(dtype).eps * 4 * beta


def assert_near_oracle(got: Tensor, eager: Tensor, exact: Tensor, eps: float, name: str) -> None:
    """The op errs at most twice as much as eager PyTorch in the same dtype, plus eps."""
    assert got.shape == exact.shape, f"{name} has shape {got.shape}, not {exact.shape}"
    if got.numel() == 0:
        return
    error = float((got.double() - exact).abs().max())
    bound = 2 * float((eager.double() - exact).abs().max()) + eps
    assert error <= bound, f"{name} errs by {error:.3e}, more than {bound:.3e}"


def unaligned(t: Tensor) -> Tensor:
    """A contiguous copy whose memory starts one element past an aligned address."""
    storage = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)
    return storage[1:].view(t.shape).copy_(t)


def transposed(t: Tensor) -> Tensor:
    """A copy with the strides of a transposed matrix."""
    return t.t().contiguous().t()


def strided(t: Tensor) -> Tensor:
    """A copy that takes every second element of its memory."""
    wide = torch.empty(*t.shape[:-1], 2 * t.shape[-1], dtype=t.dtype, device=t.device)
    return wide[..., ::2].copy_(t)


def schedule_row(
    t: int, beta: float = 2.0, reg_weight: float = 0.0, learning_rate: float = 1e-2
) -> list[float]:
    """A row of the schedule for Adam's step t = 1, 2, ..."""
    return [beta, reg_weight, learning_rate, 1 - 0.9**t, (1 - 0.999**t) ** 0.5]
