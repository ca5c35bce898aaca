"""Matrix products whose bits do not depend on the number of threads."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn import functional as F

# The libraries' kernels work on blocks of this many rows and columns; where a block is not full,
# the order of a sum was seen to depend on the threads.
_BLOCK = 16


def fixed_bmm(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a [groups, m, k] times b [groups, k, n]; a lone product filled up with zeros to whole blocks.

    Of several groups each product has one thread. ``out`` is memory that may be used for it: large
    results in new memory cost page faults.
    """
    m, n = a.shape[1], b.shape[2]
    missing_rows, missing_cols = (-m % _BLOCK, -n % _BLOCK) if len(a) == 1 else (0, 0)
    if not missing_rows and not missing_cols:
        return torch.bmm(a, b) if out is None else torch.bmm(a, b, out=out)
    if missing_rows:
        a = F.pad(a, (0, 0, 0, missing_rows))
    if missing_cols:
        b = F.pad(b, (0, missing_cols))
    return torch.bmm(a, b)[:, :m, :n]


@contextmanager
def one_thread(device: torch.device) -> Iterator[None]:
    """For factorisations, whose bits depend on the threads whatever their size."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def annealing_dtype(products: str, device: torch.device) -> torch.dtype:
    """What ``products`` of AdaRoundConfig means on ``device``."""
    if products != "auto":
        return torch.bfloat16 if products == "bfloat16" else torch.float32
    if device.type == "cuda":
        has_bfloat16 = torch.cuda.get_device_capability(device) >= (8, 0)
    else:  # a processor without the instructions emulates them slowly; old torch cannot say
        capabilities: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()
        has_bfloat16 = any(capabilities.get(name) for name in ("avx512_bf16", "amx_bf16"))
    return torch.bfloat16 if has_bfloat16 else torch.float32
