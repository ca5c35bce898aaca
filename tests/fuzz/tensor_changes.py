"""Ways in which a tensor argument may differ from a good one, by name."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import torch
from torch import Tensor

from tests.support.helpers import strided, unaligned

Change = Callable[[Tensor], object]
HUGE = (2**16, 2**16)  # 2^32 elements, which take no memory until they are copied
_MOST_CHANGED = 2**20
DTYPES = [
    "bool", "uint8", "int8", "int16", "int32", "int64", "float16", "bfloat16", "float32", "float64",
    "complex64", "float8_e4m3fn", "float8_e5m2", "uint16",
]  # fmt: skip
NUMBERS = {
    "zero": 0.0,
    "negative": -1.0,
    "one": 1.0,
    "nan": float("nan"),
    "inf": float("inf"),
    "-inf": float("-inf"),
    "denormal": 1e-40,
    "least": 1e-45,
    "tiny": 1e-38,
    "huge": 1e38,
    "most": 3.4028234663852886e38,
    "int31": 2.0**31 - 1,
    "-int31": -(2.0**31),
    "int24": 2.0**24 + 2,
}


def _cast(dtype: torch.dtype) -> Change:
    return lambda t: t.to(dtype)


def _number(t: Tensor, number: float) -> float:
    """As the dtype can hold it."""
    if t.is_floating_point():
        limit = torch.finfo(t.dtype).max
        return number if abs(number) == float("inf") else min(max(number, -limit), limit)
    limits = torch.iinfo(t.dtype)
    return 0 if number != number else int(min(max(number, limits.min), limits.max))


def _fill(number: float) -> Change:
    """Every element, without a write to what may be shared."""
    return lambda t: torch.full_like(t, _number(t, number))


def _sprinkle(number: float) -> Change:
    """About a tenth of the elements, at least one."""

    def change(t: Tensor) -> Tensor:
        chosen = torch.arange(t.numel()).remainder(11).view(t.shape) == t.numel() // 2 % 11
        return t.masked_fill(chosen, _number(t, number))

    return change


def _overlapping(t: Tensor) -> Tensor:
    """Rows that begin one element after each other."""
    memory = torch.zeros(sum(t.shape) + 1, dtype=t.dtype)
    memory[: min(len(memory), t.numel())] = t.flatten()[: len(memory)]
    return memory.as_strided(t.shape, [1] * t.dim())


def _negated(t: Tensor) -> Tensor:
    """The same values behind a negation that is still to come."""
    return torch.complex(torch.zeros_like(t), -t).conj().imag


def _huge(t: Tensor) -> Tensor:
    one = t.flatten()[:1] if t.numel() else t.new_zeros(1)
    return one.expand(HUGE) if t.dim() <= 2 else one.expand(1, *HUGE)


LAYOUTS: dict[str, Change] = {
    "transposed": lambda t: t.mT.contiguous().mT,
    "strided": strided,
    "unaligned": unaligned,
    "negated": _negated,
    "contiguous": lambda t: t.clone(memory_format=torch.contiguous_format),
    "inference": lambda t: _in_inference_mode(t),
    "parameter": lambda t: torch.nn.Parameter(t, requires_grad=False),
}
SHAPES: dict[str, Change] = {
    "scalar": lambda t: t.flatten()[0] if t.numel() else t.new_zeros(()),
    "vector": lambda t: t.flatten(),
    "one-more-dimension": lambda t: t.unsqueeze(0),
    "two-more-dimensions": lambda t: t.unsqueeze(-1).unsqueeze(0),
    "fewer-rows": lambda t: t[:-1],
    "more-rows": lambda t: torch.cat([t, t]),
    "one-row": lambda t: t[:1],
    "no-rows": lambda t: t[:0],
    "fewer-cols": lambda t: t[..., :-1],
    "more-cols": lambda t: torch.cat([t, t], -1),
    "one-col": lambda t: t[..., :1],
    "no-cols": lambda t: t[..., :0],
    "turned": lambda t: t.mT,
    "expanded-rows": lambda t: t[:1].expand(t.shape),
    "expanded-cols": lambda t: t[..., :1].expand(t.shape),
    "overlapping": _overlapping,
    "huge": _huge,
    "huge-rows": lambda t: t[:1].expand(2**31 + 1, *t.shape[1:]),
    "many-empty-rows": lambda t: t.new_empty(2**40, 0),
    "many-empty-cols": lambda t: t.new_empty(0, 2**40),
    "many-empty-groups": lambda t: t.new_empty(2**40, 0, 0),
}
OTHERS: dict[str, Change] = {
    "meta": lambda t: t.to("meta"),
    "needs-grad": lambda t: t.detach().requires_grad_(),
    "sparse": lambda t: t.to_sparse(),
    "mkldnn": lambda t: t.to_mkldnn(),
    "none": lambda t: None,
    "number": lambda t: 3,
    "text": lambda t: "text",
    "list": lambda t: t.tolist(),
    "numpy": lambda t: t.numpy(),
}
CASTS: dict[str, Change] = {name: _cast(getattr(torch, name)) for name in DTYPES}
FILLS: dict[str, Change] = {f"all-{name}": _fill(number) for name, number in NUMBERS.items()}
SPRINKLES: dict[str, Change] = {
    f"some-{name}": _sprinkle(number) for name, number in NUMBERS.items()
}
VALUES = FILLS | SPRINKLES
CHANGES = LAYOUTS | SHAPES | OTHERS | CASTS | VALUES


def _in_inference_mode(t: Tensor) -> Tensor:
    with torch.inference_mode():
        return t.clone()


def change(value: object, name: str) -> object:
    """``value`` changed; as it was where it is no tensor, or the change means nothing for it or
    would need memory that only the op may ask for."""
    if not isinstance(value, Tensor) or max(value.numel(), *value.shape, 0) > _MOST_CHANGED:
        return value
    # A scalar has no rows, numbers of other kinds no NaN, sparse tensors no views.
    with suppress(RuntimeError, TypeError, IndexError, NotImplementedError):
        return CHANGES[name](value)
    return value
