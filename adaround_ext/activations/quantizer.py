"""Simulated quantization of activations, per tensor: the settings and the quantizer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from adaround_ext.checks import check_int, check_number, fail, refuse_unknown
from adaround_ext.grid import quant_range

RANGES = ("mse", "min_max", "percentile")


@dataclasses.dataclass(frozen=True)
class ActivationConfig:
    """Settings of quantized activations.

    Attributes:
        bits: Of a code, 2 to 16; b in what follows.
        symmetric: Codes in [-2^(b-1), 2^(b-1) - 1] with zero point 0; else in [0, 2^b - 1].
        ranges: How a range comes from observed values: "mse" (of least squared error), "min_max"
            (from the least to the greatest), or "percentile".
        percentile: With ranges="percentile", so many percent of the values lie within the range,
            50 to 100; of ``|x|`` where symmetric, else with as many beyond either end.

    Raises:
        TypeError: bits is no integer, or percentile no number; named with the rule and what came.
        ValueError: A setting has another value; named with the rule and what came.
    """

    bits: int = 8
    symmetric: bool = False
    ranges: Literal["mse", "min_max", "percentile"] = "mse"
    percentile: float = 99.99

    def __post_init__(self) -> None:
        check_int("bits", self.bits, 2, 16)
        if not isinstance(self.symmetric, bool):
            fail("symmetric", "True or False", self.symmetric)
        if self.ranges not in RANGES:
            fail("ranges", ", ".join(RANGES), self.ranges)
        check_number("percentile", self.percentile, 50.0, 100.0)

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ActivationConfig:
        """The inverse of :meth:`to_dict`.

        Args:
            values: Settings by name; what is missing has its default.

        Returns:
            The settings.

        Raises:
            TypeError: As of the class.
            ValueError: As of the class, and for a name that is no setting.
        """
        refuse_unknown(cls, values)
        return cls(**values)


def affine(low: Tensor, high: Tensor, qmin: int, qmax: int) -> tuple[Tensor, Tensor]:
    """(scale float32, zero_point int32) of ranges that are widened to hold 0; float64 in.

    s = max(high, -low) / qmax for signed codes, else (high - low) / (qmax - qmin) with
    z = round(qmin - low / s). Scales are kept normal, and so small that no code overflows; that of
    an empty range is 1.
    """
    low, high = low.clamp(max=0), high.clamp(min=0)
    symmetric = qmin < 0
    width = torch.maximum(high, -low) / qmax if symmetric else (high - low) / (qmax - qmin)
    limits = torch.finfo(torch.float32)
    scale = width.clamp(limits.smallest_normal, limits.max / (qmax - qmin + 1)).float()
    scale = torch.where(width == 0, torch.ones_like(scale), scale)
    zero_point = (qmin - low / scale.double()).round().clamp(qmin, qmax)
    return scale, (torch.zeros_like(low) if symmetric else zero_point).int()


class ActivationQuantizer(nn.Module):
    """Simulated quantization of a tensor, with one range for all its values.

    ``x -> scale (clamp(round(x / scale) + zero_point, qmin, qmax) - zero_point)`` in float32, for x
    of any shape. The result has its dtype; what is not floating point comes back as it is. Rounding
    is to nearest, ties to even. 0 is exact, and a second time changes nothing (in float16 and
    bfloat16 where a code fits their mantissa: 10 and 8 bits). No gradient goes through. A call
    raises RuntimeError as long as there is no range.

    Args:
        config: The settings; None for the defaults.

    Attributes:
        scale: float32 [], in the state dict; NaN as long as there is no range.
        zero_point: int32 [], in the state dict.
        qmin: The least code, int32 [], in the state dict.
        qmax: The greatest code, int32 [], in the state dict.
        config: The settings. Loading a state dict changes its bits and sign to those in there.
        enabled: False lets everything through.
        observer: While it is set, it gets every x, and x goes through.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: Tensor
    qmax: Tensor

    def __init__(self, config: ActivationConfig | None = None) -> None:
        super().__init__()
        self.config = config or ActivationConfig()
        self.enabled = True
        self.observer: Callable[[Tensor], None] | None = None
        self.handles: list[RemovableHandle] = []  # of the hooks that call it
        no_range = torch.tensor(torch.nan, dtype=torch.float32, device="cpu")
        self.register_buffer("scale", no_range)
        self.register_buffer("zero_point", torch.tensor(0, dtype=torch.int32, device="cpu"))
        for name, value in zip(("qmin", "qmax"), self._codes, strict=True):
            self.register_buffer(name, torch.tensor(value, dtype=torch.int32, device="cpu"))
        self._ready = False

    @property
    def bits(self) -> int:
        """Of a code."""
        return self.config.bits

    @property
    def symmetric(self) -> bool:
        """Whether codes are signed and the zero point is 0."""
        return self.config.symmetric

    @property
    def ready(self) -> bool:
        """Whether it has a range."""
        return self._ready

    @property
    def _codes(self) -> tuple[int, int]:
        return quant_range(self.config.bits, self.config.symmetric)

    def set_range(self, low: float, high: float) -> None:
        """Takes the range of its inputs, from which scale and zero point follow (:func:`affine`).

        Args:
            low: The lower end; the range is widened to hold 0.
            high: The upper end.

        Raises:
            ValueError: One of them is not finite, or low > high.
        """
        ends = torch.tensor([low, high], dtype=torch.float64, device="cpu")
        if not (bool(ends.isfinite().all()) and low <= high):
            raise ValueError(f"low, high must be finite and in this order, got {low}, {high}")
        scale, zero_point = affine(ends[0], ends[1], *self._codes)
        self.scale.copy_(scale)
        self.zero_point.copy_(zero_point)
        self._ready = True

    def forward(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            return x
        if self.observer is not None:
            self.observer(x)
            return x
        if not self.enabled:
            return x
        if not self._ready:
            raise RuntimeError("this activation quantizer has no range yet: observe data first")
        codes = (x.float() / self.scale).round().add(self.zero_point).clamp(*self._codes)
        quantized = (codes - self.zero_point) * self.scale
        largest = torch.finfo(x.dtype).max
        if largest < torch.finfo(torch.float32).max:  # rounded up, the last code may be infinite
            quantized = quantized.clamp(-largest, largest)
        return quantized.to(x.dtype)

    def extra_repr(self) -> str:
        shown = f"bits={self.bits}, symmetric={self.symmetric}"
        if not self._ready or self.scale.is_meta:
            return f"{shown}, no range"
        return f"{shown}, scale={float(self.scale):.6g}, zero_point={int(self.zero_point)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ActivationQuantizer:
        """Buffers go to other devices, but keep their dtypes: model.half() must not round them."""
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = self._buffers[name]
            if old is not None and new is not None and new.dtype != old.dtype:
                self._buffers[name] = old.to(new.device)
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if self.scale.is_meta:
            return
        bits = int(self.qmax - self.qmin + 1).bit_length() - 1
        symmetric = bool(self.qmin < 0)
        self.config = dataclasses.replace(self.config, bits=bits, symmetric=symmetric)
        self._ready = bool(self.scale > 0)
