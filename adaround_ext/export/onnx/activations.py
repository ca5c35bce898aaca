"""Quantizers of activations in ONNX files: what QuantizeLinear needs for them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.grid import quant_range


@dataclass(frozen=True, eq=False)
class StoredQuantizer:
    """x to scale (clamp(round(x / scale) + zero_point) - zero_point), as QDQ computes it.

    storage: "int8", "uint8", "int16" or "uint16", to whose range is clamped. scale: float32 [].
    zero_point: [] of that type. limits: float32 [] each, to which x is clipped before where codes
    have fewer bits than the storage. largest: magnitude of a result.
    """

    storage: str
    scale: Tensor
    zero_point: Tensor
    limits: tuple[Tensor, Tensor] | None
    largest: float

    def tensors(self) -> dict[str, tuple[Tensor, str | None]]:
        """What a file holds of it, with the storage of integers, by the ends of their names."""
        tensors: dict[str, tuple[Tensor, str | None]] = {
            "_scale": (self.scale, None),
            "_zero_point": (self.zero_point, self.storage),
        }
        if self.limits is not None:
            tensors["_low"], tensors["_high"] = ((limit, None) for limit in self.limits)
        return tensors


def stored_quantizer(quantizer: ActivationQuantizer, unsigned: bool = False) -> StoredQuantizer:
    """Codes up to 8 bits in 8, others in 16.

    unsigned: signed codes are stored with 2^7 or 2^15 added, and so is the zero point.
    """
    qmin, qmax = quant_range(quantizer.bits, quantizer.symmetric)
    scale = quantizer.scale.detach().cpu()
    zero_point = int(quantizer.zero_point)
    low, high = scale * (qmin - zero_point), scale * (qmax - zero_point)
    width = 8 if quantizer.bits <= 8 else 16
    signed = quantizer.symmetric and not unsigned
    if quantizer.symmetric and unsigned:
        zero_point += 1 << (width - 1)
    storage = f"{'' if signed else 'u'}int{width}"
    return StoredQuantizer(
        storage=storage,
        scale=scale,
        zero_point=torch.tensor(zero_point, dtype=getattr(torch, storage), device="cpu"),
        limits=None if quantizer.bits == width else (low, high),
        largest=max(-float(low), float(high)),
    )
