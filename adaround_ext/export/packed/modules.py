"""Packed layers: modules that hold codes instead of floating-point weights, to run in PyTorch."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn

from adaround_ext.export.quantized_layers import QuantizedLayer, quantized_layers, refuse
from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.ops import dequantize, pack_bits, packed_linear, unpack_bits


class PackedLayer(nn.Module):
    """A Linear or convolution whose weight is scale (codes - zero_point), the codes packed.

    ``weight`` is computed when it is asked for, in the shape and dtype of the layer that this one
    stands for, whose public attributes it has. The buffers keep their dtypes: model.half() must not
    round scales.

    Args:
        layer: The quantized layer, with its codes.
        module: The module to stand for, one of those that hold the layer's weight.

    Attributes:
        packed: Buffer, uint8 [rows, ceil(cols bits / 8)] as :func:`adaround_ext.ops.pack_bits` has
            them.
        scale: Buffer, float32 [rows or 1, n_groups].
        zero_point: Buffer, int32 [rows or 1, n_groups].
        bias: A parameter in the layer's dtype, or None.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: nn.Parameter | None

    def __init__(self, layer: QuantizedLayer, module: nn.Module) -> None:
        super().__init__()
        self.bits, (self.qmin, _) = layer.bits, layer.range
        self.dtype = layer.matrix.weight.dtype
        self.register_buffer("packed", pack_bits(layer.weight.codes, self.bits, self.qmin))
        self.register_buffer("scale", layer.weight.scale.clone())
        self.register_buffer("zero_point", layer.weight.zero_point.clone())
        self.register_parameter("bias", module._parameters["bias"])
        self._matrix = _without_parameters(module)
        self._adopt(module)

    def _adopt(self, module: nn.Module) -> None:
        """Hooks and submodules of the layer: its activation quantizers; and its public attributes.

        A model may read those, as the stride of a convolution.
        """
        for name, value in module.__dict__.items():
            public = not name.startswith("_") and name != "quantized_weight"
            if "hooks" in name or (public and not hasattr(self, name)):
                self.__dict__[name] = value
        self._modules.update(module._modules)
        self.train(module.training)

    @property
    def weight(self) -> Tensor:
        """The dequantized weight."""
        codes = unpack_bits(self.packed, self.bits, self._matrix.cols, self.qmin)
        # Weights in float64 have the numbers of float32, in which codes and scales are multiplied.
        dtype = torch.float32 if self.dtype == torch.float64 else self.dtype
        matrix = dequantize(codes, self.scale, self.zero_point, dtype)
        return self._matrix.weight_from_matrix(matrix.to(self.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """What the layer gave with its dequantized weight."""
        return self._matrix.forward(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        rows, groups = self.scale.shape
        return (
            f"{self._matrix.rows}x{self._matrix.cols}, bias={self.bias is not None}, "
            f"bits={self.bits}, symmetric={self.qmin < 0}, scales={rows}x{groups}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLayer:
        scale = self.scale
        super()._apply(fn, recurse)
        self.scale = scale.to(self.scale.device)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device="cpu")).dtype
        return self


class QuantLinear(PackedLayer):
    """A Linear with packed codes: y = x W_q^T + b by :func:`adaround_ext.ops.packed_linear`.

    In float64, which that does not know, its weight is dequantized at every call. It is made by
    :func:`adaround_ext.pack_`, and by :func:`adaround_ext.load_quantized` with packed=True.

    Attributes:
        packed: Buffer, uint8 [out_features, ceil(in_features bits / 8)], the codes W_q / scale +
            zero_point as :func:`adaround_ext.ops.pack_bits` has them.
        scale: Buffer, float32 [out_features or 1, n_groups].
        zero_point: Buffer, int32 [out_features or 1, n_groups].
        bias: A parameter in the layer's dtype, or None.
    """

    in_features: int
    out_features: int

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output.

        Args:
            x: [..., in_features], in the layer's dtype.

        Returns:
            [..., out_features].

        Raises:
            ValueError: ``x`` has another width.
        """
        if x.shape[-1:] != (self.in_features,):  # the op sees whole bytes of codes only
            rule = f"input must have {self.in_features} features in its last dimension"
            raise ValueError(f"{rule}, got shape {list(x.shape)}")
        if x.dtype == torch.float64:
            return super().forward(x)
        return packed_linear(
            x, self.packed, self.scale, self.zero_point, self.bias, self.bits, self.qmin
        )


class QuantConv(PackedLayer):
    """A convolution, transposed or not, with packed codes, dequantized at every call.

    It is made by :func:`adaround_ext.pack_`, and by :func:`adaround_ext.load_quantized` with
    packed=True.

    Attributes:
        packed: Buffer, uint8 [rows, ceil(cols bits / 8)], the codes of the weight as a matrix, as
            :func:`adaround_ext.ops.pack_bits` has them.
        scale: Buffer, float32 [rows or 1, n_groups].
        zero_point: Buffer, int32 [rows or 1, n_groups].
        bias: A parameter in the layer's dtype, or None.
    """


@torch.inference_mode(False)  # buffers of inference mode could not be loaded or moved later
def pack_(model: nn.Module) -> None:
    """Replaces every layer that quantize_ quantized by one that holds packed codes, in place.

    Linear becomes :class:`adaround_ext.export.QuantLinear`, convolutions
    :class:`adaround_ext.export.QuantConv`; hooks (of activation quantizers) and biases move along.
    Outputs are those of the simulated model up to the order of sums; in 16 bits up to their
    rounding, as a QuantLinear on the CPU does not round its weights before it multiplies. Save
    before: packed models are for running.

    Args:
        model: A model that :func:`adaround_ext.quantize_` has quantized; its modules are replaced.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: The model is not quantized, or changed since; it is a quantized layer itself; or
            the class of a layer does more than that of torch.
    """
    layers = quantized_layers(model)
    if any("" in layer.names for layer in layers):
        raise ValueError("model must hold its quantized layers, got one that is a layer itself")
    modules = dict(model.named_modules(remove_duplicate=False))
    refuse("packing", layers, lambda layer: _obstacle(modules[layer.name]))
    packed: dict[nn.Module, PackedLayer] = {}
    for layer in layers:
        for name in layer.names:
            module = modules[name]
            if module not in packed:
                packed[module] = (
                    QuantLinear(layer, module)
                    if isinstance(module, nn.Linear)
                    else QuantConv(layer, module)
                )
    for layer in layers:
        for name in layer.names:
            parent, _, child = name.rpartition(".")
            modules[parent]._modules[child] = packed[modules[name]]


def _obstacle(module: nn.Module) -> str | None:
    if "forward" in module.__dict__:
        return "it must have the forward of its class, got one of its own"
    if type(module).__module__.startswith("torch.nn.modules."):
        return None
    return f"it must be a layer of torch itself, got {type(module).__qualname__}"


def _without_parameters(module: nn.Module) -> MatrixLayer:
    """The layer as a matrix product that knows how to convolve, but holds no weight."""
    shell = copy.copy(module)
    shell.__dict__["_parameters"] = dict(module._parameters)
    shell.__dict__.pop("quantized_weight", None)
    matrix = matrix_layer(shell)
    shell._parameters.clear()
    return matrix
