"""Targets of ONNX files: what the runtimes that load them can hold, and why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import nn

from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.export.onnx.weights import StoredWeight
from adaround_ext.export.quantized_layers import QuantizedLayer


@dataclass(frozen=True)
class Target:
    """A runtime's limits. What does not fit them is refused, never changed.

    Attributes:
        name: That ``export_onnx`` takes as ``target``.
        zero_points: Whether weights may have them. Without, asymmetric codes are stored as
            code - zero_point, if that fits the same storage: not at 4 and 8 bits.
        lowest_int8: The lowest code of a weight of 8 bits.
        groups: The weights whose groups of columns may have scales of their own.
        linear_blocks: What such groups of a Linear are cut to, as the largest that divides them.
        only_linear_blocks: Whether other groups are refused, or stay as they are.
        odd_int4: Whether Linears of up to 4 bits may have an odd number of inputs.
        custom_linears: Whether Linears may have a forward of their own, in which Transpose may come
            before the product.
        circular: Whether padding may be circular.
        bias_apart: Whether biases of products of matrices, whose activations are not quantized, are
            added by Sum, not Add.
        activation_bits: At most so many.
        activation_zero_points: Whether activations may be asymmetric.
        unsigned_activations: Whether signed codes of activations are stored as unsigned ones.
    """

    name: str
    zero_points: bool = True
    lowest_int8: int = -128
    groups: Literal["all", "matrices", "none"] = "all"
    linear_blocks: tuple[int, ...] = ()
    only_linear_blocks: bool = False
    odd_int4: bool = True
    custom_linears: bool = True
    circular: bool = True
    bias_apart: bool = False
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
        linear = isinstance(layer.module, nn.Linear)
        if linear and not (plain or self.custom_linears):
            return "a Linear with a forward of its own may put Transpose before its product"
        if linear and layer.cols % 2 and layer.bits <= 4 and not self.odd_int4:
            return (
                f"it computes 4-bit products with an odd number of inputs wrongly, got "
                f"{layer.cols}; quantize this layer with 5 bits or more"
            )
        if not self.circular and getattr(layer.module, "padding_mode", "") == "circular":
            return "it has no circular padding"
        return None

    def refuses_weight(self, layer: QuantizedLayer, stored: StoredWeight) -> str | None:
        """Why it cannot hold a weight that is stored in this way; None where it can."""
        if stored.storage == "int8" and int(stored.codes.min()) < self.lowest_int8:
            return (
                f"8-bit weights must be at least {self.lowest_int8}, got codes of -128; quantize "
                "with narrow_range=True"
            )
        if stored.block_size is None:
            return None
        linear = isinstance(layer.module, nn.Linear)
        if self.groups == "none" or (self.groups == "matrices" and not linear):
            where = "" if self.groups == "none" else " of a convolution"
            return (
                f"it has no scales for groups of columns{where}; quantize with "
                "granularity='per_channel'"
            )
        if linear and self.only_linear_blocks and stored.block_size not in self.linear_blocks:
            return (
                f"it computes groups of {layer.group_size} inputs wrongly; quantize with an even "
                "group_size, or granularity='per_channel'"
            )
        return None

    def refuses_quantizer(self, quantizer: ActivationQuantizer) -> str | None:
        """Why it cannot hold a quantizer of activations; None where it can."""
        if quantizer.bits > self.activation_bits:
            return f"activations have at most {self.activation_bits} bits, got {quantizer.bits}"
        if not (self.activation_zero_points or quantizer.symmetric):
            return "activations have no zero points; quantize with symmetric=True for activations"
        return None


# Blocks that ONNX Runtime turns into MatMulNBits. Larger ones it gets wrong, up to 1.26 at least
# (microsoft/onnxruntime#28551), and refuses in 1.29; others it leaves as they are.
MATMUL_BLOCKS = (16, 32, 64, 128, 256)
_POWERS = tuple(1 << exponent for exponent in range(1, 13))

TARGETS = {
    target.name: target
    for target in (
        # The CPU computes all forms right. Of MatMul and Add of matrices it makes Gemm, and with a
        # ReLU behind it FusedGemm, which is too early for MatMulNBits.
        Target("ort", linear_blocks=MATMUL_BLOCKS, bias_apart=True),
        # The CPU of 2026.4 computes Linears wrongly (by percents, for few tokens or for many) where
        # groups are no powers of two, and with int4 of an odd number of inputs. 16-bit activations
        # it lets through as they are. It has no Pad of mode "wrap".
        Target(
            "openvino",
            linear_blocks=_POWERS,
            only_linear_blocks=True,
            odd_int4=False,
            circular=False,
            activation_bits=8,
        ),
        # IDequantizeLayer: zero points are 0, scales have at most 2 dimensions. Weights of int8 lie
        # in [-127, 127], activations are int8.
        Target(
            "tensorrt",
            zero_points=False,
            lowest_int8=-127,
            groups="matrices",
            activation_bits=8,
            activation_zero_points=False,
        ),
        # The HTP takes weights per tensor and per channel, symmetric, and activations unsigned.
        # A Transpose behind DequantizeLinear makes it compute in float (quic/aimet#4105).
        Target(
            "qnn", zero_points=False, groups="none", custom_linears=False, unsigned_activations=True
        ),
    )
}
