"""Contents of an ONNX file: what it stores of a model, checked against the target to load it."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from adaround_ext.activations.hooks import quantizers
from adaround_ext.activations.quantizer import ActivationQuantizer
from adaround_ext.export.onnx.activations import StoredQuantizer, stored_quantizer
from adaround_ext.export.onnx.targets import TARGETS, Target
from adaround_ext.export.onnx.trace import is_plain_linear
from adaround_ext.export.onnx.weights import StoredWeight, stored_weight
from adaround_ext.export.quantized_layers import QuantizedLayer, quantized_layers, refuse

_DTYPES = (torch.float32, torch.float16)
_HALF_MAX = torch.finfo(torch.float16).max


class Contents:
    """Layers and quantizers of activations of a model, and how each is stored.

    Raises ValueError where the model is not quantized, and naming the layers and quantizers that
    the target cannot hold, with the reasons.
    """

    def __init__(self, model: nn.Module, target: Target, channel_blocks: int | None) -> None:
        self.layers = quantized_layers(model)
        enabled = {name: q for name, q in quantizers(model).items() if q.enabled}
        self.quantizer_names, self.quantizers = list(enabled), list(enabled.values())
        self.target, self._channel_blocks = target, channel_blocks
        self._weights: dict[tuple[int, bool], StoredWeight] = {}
        self._used: dict[int, StoredWeight] = {}
        modules = [[model.get_submodule(n) for n in layer.names] for layer in self.layers]
        self._transposed = [{is_plain_linear(module) for module in group} for group in modules]
        self._half = any(layer.matrix.weight.dtype == torch.float16 for layer in self.layers)
        refuse(f"an ONNX file for {target.name}", self.layers, self._refuses_layer)
        for name, quantizer in enabled.items():
            reason = self._refuses_quantizer(quantizer)
            if reason is not None:
                raise ValueError(
                    f"an ONNX file for {target.name} cannot hold this model: {name}: {reason}"
                )

    def weight_of(self, index: int, transpose: bool) -> tuple[str, StoredWeight]:
        """The name of a layer's weight, and what is stored for it; remembers that it is."""
        stored = self._used[index] = self._stored(index, transpose)
        return f"{self.layers[index].name}.weight".lstrip("."), stored

    def quantizer_of(self, index: int) -> tuple[str, StoredQuantizer]:
        """The same for a quantizer."""
        unsigned = self.target.unsigned_activations
        return self.quantizer_names[index], stored_quantizer(self.quantizers[index], unsigned)

    def details(self) -> dict[str, Any]:
        """Of the layers that are stored and of the quantizers, plain values.

        half: whether weights are float16. openvino: whether that runtime computes them right, too.
        """
        openvino = TARGETS["openvino"]
        return {
            "layers": {
                self.layers[index].name: _layer_details(self.layers[index], stored)
                for index, stored in self._used.items()
            },
            "activations": {
                name: {"bits": q.bits, "symmetric": q.symmetric}
                for name, q in zip(self.quantizer_names, self.quantizers, strict=True)
            },
            "half": self._half,
            "openvino": not any(self._reasons(openvino, layer) for layer in self.layers)
            and not any(openvino.refuses_quantizer(q) for q in self.quantizers),
        }

    def _stored(self, index: int, transpose: bool) -> StoredWeight:
        key = (index, transpose)
        if key not in self._weights:
            layer = self.layers[index]
            self._weights[key] = stored_weight(
                layer,
                transpose=transpose,
                centred=not self.target.zero_points and not layer.symmetric,
                blocks=self.target.linear_blocks,
                channel_blocks=self._channel_blocks,
            )
        return self._weights[key]

    def _refuses_layer(self, layer: QuantizedLayer) -> str | None:
        dtype = layer.matrix.weight.dtype
        if dtype not in _DTYPES:
            return (
                f"weights must be float32 or float16, got {dtype}: ONNX Runtime has no other "
                "DequantizeLinear on CPUs; convert the model before it is quantized"
            )
        try:
            return next(iter(self._reasons(self.target, layer)), None)
        except ValueError as error:  # it has no form
            return str(error)

    def _reasons(self, target: Target, layer: QuantizedLayer) -> list[str]:
        """Why a target cannot hold a layer, as it is stored for the model's own."""
        index = self.layers.index(layer)
        transposed = self._transposed[index]
        reason = target.refuses_layer(layer, plain=False not in transposed)
        if reason is not None:
            return [reason]  # it may not fit what it would be stored in
        forms = [self._stored(index, transpose) for transpose in transposed]
        reasons = [target.refuses_weight(layer, form) for form in forms]
        return [reason for reason in reasons if reason is not None]

    def _refuses_quantizer(self, quantizer: ActivationQuantizer) -> str | None:
        if not quantizer.ready or quantizer.observer is not None:
            return "it has no range yet, or is observing data for one"
        reason = self.target.refuses_quantizer(quantizer)
        if reason is None and self._half and stored_quantizer(quantizer).largest > _HALF_MAX:
            return "its largest values are beyond those of float16"
        return reason


def _layer_details(layer: QuantizedLayer, stored: StoredWeight) -> dict[str, Any]:
    return {
        **layer.grid,
        "group_size": layer.group_size if layer.granularity == "per_group" else None,
        "names": list(layer.names),
        "storage": stored.storage,
        "axis": stored.axis,
        "block_size": stored.block_size,
    }
