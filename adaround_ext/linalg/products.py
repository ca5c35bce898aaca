"""Matrix products whose bits do not depend on the number of threads."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from adaround_ext.linalg.precision import tf32_products
from adaround_ext.process.one_thread import on_one_thread

# The libraries' kernels work on tiles of this many rows and columns; where one is not full, the
# order of a sum was seen to depend on the threads.
TILE = 16
# Longer sums are shared out over the threads: of float32 from 832 on, of float64 from 256 on where
# there are 16 of them.
_MAX_TERMS = {torch.float32: 512, torch.float64: 128}
# From so many multiplications, and terms a sum, a GPU has float32's digits sooner by three products
# of TF32.
_MIN_LARGE, _MIN_LARGE_TERMS = 1 << 33, 512
_TF32_UNIT = 1 << 13  # of a float32's bits as a number: what TF32 does not have is less
_TF32_END = 2.0**128 - 2.0**116  # from here on rounding to nearest would give infinity


def fixed_bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [groups, m, k] times b [groups, k, n]; a lone product filled up with zeros to whole tiles.

    Several groups have one thread in float64, where sums are shared out if there are more threads
    than groups; in float32 that was not seen for up to 32 threads. On CUDA no number of threads
    decides, and a large product of float32 is three of TF32. ``out`` is memory that may be used:
    large results in new memory cost page faults.
    """
    if _is_large(a, b):
        return _three_products(a, b, out)
    if a.is_cuda or (len(a) > 1 and a.dtype != torch.float64):
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    if len(a) > 1:
        return on_one_thread(partial(torch.bmm, a, b), a.device)
    m, k, n = a.shape[1], a.shape[2], b.shape[2]
    if m % TILE:
        a, out = F.pad(a, (0, 0, 0, -m % TILE)), None
    if n % TILE:
        b, out = F.pad(b, (0, -n % TILE)), None
    # Half precision is summed elsewhere, whole: partial sums would be rounded.
    step = _MAX_TERMS.get(a.dtype, max(k, 1))
    first = a[:, :, :step], b[:, :step]
    out = torch.bmm(*first) if out is None else torch.bmm(*first, out=out)
    for begin in range(step, k, step):
        out.baddbmm_(a[:, :, begin : begin + step], b[:, begin : begin + step])
    return out[:, :m, :n]


def _is_large(a: Tensor, b: Tensor) -> bool:
    """Whether it is a float32 product on CUDA that takes longer than three of TF32."""
    if not a.is_cuda or a.dtype != torch.float32 or a.shape[2] < _MIN_LARGE_TERMS:
        return False
    large = a.numel() * b.shape[2] >= _MIN_LARGE
    # Where TF32 was asked for, one product is what is wanted.
    return large and torch.get_float32_matmul_precision() == "highest"


def _three_products(a: Tensor, b: Tensor, out: Tensor | None) -> Tensor:
    """a b to about float32's precision, on the units that only know TF32: a number is the sum of
    itself rounded to TF32 and of the rest, rounded too, which leaves 2^-24 of the number."""
    (a_upper, a_rest), (b_upper, b_rest) = map(_in_two, (a, b))
    with tf32_products(a.device):
        out = torch.bmm(a_rest, b_upper) if out is None else torch.bmm(a_rest, b_upper, out=out)
        return out.baddbmm_(a_upper, b_rest).baddbmm_(a_upper, b_upper)


def _in_two(x: Tensor) -> tuple[Tensor, Tensor]:
    """float32 x as the sum of two numbers of TF32; infinity is (infinity, 0), NaN twice NaN."""
    upper = _to_tf32(x)
    return upper, _to_tf32((x - upper).masked_fill_(x.isinf(), 0))


def _to_tf32(x: Tensor) -> Tensor:
    """Rounded to nearest, the largest numbers towards 0; the products themselves would cut the
    bits off."""
    # Bits of what is not finite would carry into the sign: CUDA's NaN, 0x7fffffff, into a zero's.
    rounds = x.abs() < _TF32_END
    bits = x.view(torch.int32).add(rounds, alpha=_TF32_UNIT // 2).bitwise_and_(-_TF32_UNIT)
    return bits.view(torch.float32).masked_fill_(x.isnan(), torch.nan)


def annealing_dtype(products: str, device: torch.device) -> torch.dtype:
    """What ``products`` of AdaRoundConfig means on ``device``."""
    if products != "auto":
        return torch.bfloat16 if products == "bfloat16" else torch.float32
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:  # a processor without the instructions emulates them slowly; old torch cannot say
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        # Intel's AVX-512 instruction has half the rate of float32's: it was slower.
        intel = "Intel" in str(capabilities.get("cpu_name"))
        avx512 = bool(capabilities.get("avx512_bf16")) and not intel
        has_bfloat16 = avx512 or bool(capabilities.get("amx_bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32
