"""What the runtimes that load ONNX files can hold, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from adaround_ext.activations import ActivationQuantizer
from adaround_ext.export.layers import QuantizedLayer
from adaround_ext.export.onnx_weights import StoredWeight


@dataclass(frozen=True)
class Target:
    """A runtime's limits. What does not fit them is refused, never changed.

    zero_points: whether weights may have them. Without, asymmetric codes are stored as
    code - zero_point, if that fits the same storage: not at 4 and 8 bits.
    lowest_int8: code of a weight of 8 bits. blocks: the weights whose groups of columns may have
    scales of their own. matmul_blocks: groups of a Linear are cut to blocks that ONNX Runtime
    fuses. own_linears: whether Linears with a forward of their own may be there, whose weight may
    reach its product through Transpose. circular: whether padding may be that.
    activation_bits: at most. activation_zero_points: whether activations may be asymmetric.
    unsigned_activations: signed codes of activations are stored as unsigned ones.
    """

    name: str
    zero_points: bool = True
    lowest_int8: int = -128
    blocks: Literal["all", "matrices", "none"] = "all"
    matmul_blocks: bool = False
    own_linears: bool = True
    circular: bool = True
    activation_bits: int = 16
    activation_zero_points: bool = True
    unsigned_activations: bool = False

    def refuses_layer(self, layer: QuantizedLayer, plain: bool) -> str | None:
        """Why it cannot hold a layer, however that is stored; None where it can.

        plain: whether a Linear has the forward of nn.Linear.
        """
        if not (self.zero_points or layer.symmetric) and layer.bits in (4, 8):
            return (
                f"asymmetric codes of {layer.bits} bits need zero points, which it has not for "
                "weights; quantize with symmetric=True"
            )
        if isinstance(layer.module, nn.Linear) and not (plain or self.own_linears):
            return "a Linear with a forward of its own may put Transpose before its product"
        if not self.circular and getattr(layer.module, "padding_mode", "") == "circular":
            return "it has no circular padding"
        return None

    def refuses_weight(self, stored: StoredWeight) -> str | None:
        """Why it cannot hold a weight that is stored in this way; None where it can."""
        if stored.storage == "int8" and int(stored.codes.min()) < self.lowest_int8:
            return (
                f"8-bit weights must be at least {self.lowest_int8}, got codes of -128; quantize "
                "with narrow_range=True"
            )
        matrix = stored.codes.dim() == 2 and stored.reshape is None
        if stored.block_size and not (
            self.blocks == "all" or (self.blocks == "matrices" and matrix)
        ):
            where = "" if self.blocks == "none" else " of a convolution"
            return (
                f"it has no scales for groups of columns{where}; quantize with "
                "granularity='per_channel'"
            )
        return None

    def refuses_quantizer(self, quantizer: ActivationQuantizer) -> str | None:
        """Why it cannot hold a quantizer of activations; None where it can."""
        if quantizer.bits > self.activation_bits:
            return f"activations have at most {self.activation_bits} bits, got {quantizer.bits}"
        if not (self.activation_zero_points or quantizer.symmetric):
            return "activations have no zero points; quantize with symmetric=True for activations"
        return None


TARGETS = {
    target.name: target
    for target in (
        # The CPU computes all forms right; of Linears, these blocks become MatMulNBits.
        Target("ort", matmul_blocks=True),
        # The CPU computes all forms of weights right. It lets 16-bit activations through as they
        # are, and has no Pad of mode "wrap".
        Target("openvino", circular=False, activation_bits=8),
        # IDequantizeLayer: zero points are 0, scales have at most 2 dimensions. Weights of int8 lie
        # in [-127, 127], activations are int8.
        Target(
            "tensorrt",
            zero_points=False,
            lowest_int8=-127,
            blocks="matrices",
            activation_bits=8,
            activation_zero_points=False,
        ),
        # The HTP takes weights per tensor and per channel, symmetric, and activations unsigned.
        # A Transpose behind DequantizeLinear makes it compute in float (quic/aimet#4105).
        Target(
            "qnn", zero_points=False, blocks="none", own_linears=False, unsigned_activations=True
        ),
    )
}
