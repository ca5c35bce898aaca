"""Layer results: what :func:`adaround_ext.optimize_layer` returns, and keeps in files."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from adaround_ext import ops
from adaround_ext.files import path_from, written_whole
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.report.layer import LayerReport
from adaround_ext.report.text import as_shape
from adaround_ext.tensors import add_tensor

_FORMAT = "adaround_ext.layer.3"


@torch.inference_mode(False)  # a new bias must be one that can be trained
@torch.no_grad()
def write_(layer: nn.Module, weight: Tensor | None, bias: Tensor | None) -> None:
    """Copies weight and bias, those that are given, into a layer's parameters themselves.

    A layer that was made without a bias gets one, where there is one to write.
    """
    parameter = layer.get_parameter("weight")
    if weight is not None:
        parameter.copy_(weight)
    if bias is not None and getattr(layer, "bias", None) is None:
        new = nn.Parameter(bias.to(parameter, copy=True), parameter.requires_grad)
        layer.register_parameter("bias", new)
    elif bias is not None:
        layer.get_parameter("bias").copy_(bias)


@dataclasses.dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """What a weight was quantized to; ``quantize_`` leaves it at a layer as ``quantized_weight``.

    It does not follow the layer to another device.

    Attributes:
        codes: int8 (symmetric) or uint8, in matrix form [rows, cols]. The layer's weight is
            scale (codes - zero_point) in its own shape and dtype.
        scale: float32 [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        bits: Of a code.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bits: int

    def __repr__(self) -> str:
        return f"QuantizedWeight({_grid(self.codes, self.scale, self.bits)})"

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same with its tensors on ``device``."""
        names = ("codes", "scale", "zero_point")
        return dataclasses.replace(self, **{name: getattr(self, name).to(device) for name in names})

    def dequantize(self, layer: MatrixLayer) -> Tensor:
        """The weight in the layer's own shape and dtype.

        Args:
            layer: The layer, seen as a matrix product.

        Returns:
            scale (codes - zero_point), contiguous.
        """
        matrix = ops.dequantize(self.codes, self.scale, self.zero_point)
        return layer.weight_from_matrix(matrix.to(layer.weight.dtype)).contiguous()


@dataclasses.dataclass(frozen=True, eq=False)
class LayerResult:
    """The quantized weight of one layer.

    Attributes:
        weight_q: scale (codes - zero_point), in the layer's own shape and dtype.
        codes: int8 (symmetric) or uint8, in matrix form [rows, cols].
        scale: float32 [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        bias: A new bias, or None where it is unchanged.
        report: What happened.
    """

    weight_q: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    bias: Tensor | None
    report: LayerReport

    def __repr__(self) -> str:
        grid = _grid(self.codes, self.scale, self.report.bits)
        return f"LayerResult(weight {as_shape(self.weight_q.shape)}: {grid}, {self.report.change})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return self.report._repr_html_()

    def apply_(self, layer: nn.Module) -> None:
        """Writes weight_q (and a new bias) into a layer.

        A layer that was made without a bias gets one, where the result has one (bias="create").

        Args:
            layer: That was quantized, or another of its shape.

        Raises:
            ValueError: Weight or bias does not fit.
        """
        weight = dict(layer.named_parameters(recurse=False)).get("weight")
        if weight is None or weight.shape != self.weight_q.shape:
            came = "none of its own" if weight is None else list(weight.shape)
            raise ValueError(
                f"layer must have a weight of shape {list(self.weight_q.shape)}, got {came}"
            )
        bias = getattr(layer, "bias", None)
        if self.bias is not None and bias is not None and bias.shape != self.bias.shape:
            rule = f"layer must have a bias of shape {list(self.bias.shape)} or none"
            raise ValueError(f"{rule}, got {list(bias.shape)}")
        write_(layer, self.weight_q, self.bias)

    def to(self, device: torch.device) -> LayerResult:
        """The same with its tensors on ``device``."""
        tensors = {name: tensor.to(device) for name, tensor in self._tensors().items()}
        return LayerResult(bias=tensors.pop("bias", None), report=self.report, **tensors)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes a safetensors file, whole or not at all.

        Args:
            path: Of the file; one that is there is replaced.
        """
        tensors = {name: t.contiguous().cpu() for name, t in self._tensors().items()}
        report = json.dumps(self.report.to_dict())
        metadata = {"format": _FORMAT, "report": report, "digest": _digest(tensors, report)}
        with written_whole(path_from(path)) as temporary:
            safetensors.torch.save_file(tensors, temporary, metadata)

    @classmethod
    @torch.inference_mode(False)
    def load(cls, path: str | os.PathLike[str], device: str | torch.device = "cpu") -> LayerResult:
        """Reads what :meth:`save` wrote.

        Args:
            path: Of the file.
            device: Where the tensors go.

        Returns:
            The result, equal to the one that was saved.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is another one, or not as it was written.
        """
        rule = f"{path} must be a file written by LayerResult.save"
        try:
            with safe_open(path_from(path), framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except FileNotFoundError:
            raise
        except Exception as error:
            raise ValueError(f"{rule}: {error}") from error
        needed = {"weight_q", "codes", "scale", "zero_point"}
        if metadata.get("format") != _FORMAT or not needed <= set(tensors) <= needed | {"bias"}:
            got = f"format {metadata.get('format')!r} with {sorted(tensors)}"
            raise ValueError(f"{rule}, got {got}")
        if metadata.get("digest") != _digest(tensors, metadata.get("report", "")):
            raise ValueError(f"{rule}, got content that is not as it was written")
        try:
            report = LayerReport.from_dict(json.loads(metadata["report"]))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{rule}, got no whole report: {error}") from error
        tensors = {name: t.to(device) for name, t in tensors.items()}
        return cls(bias=tensors.pop("bias", None), report=report, **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        names = ("weight_q", "codes", "scale", "zero_point")
        tensors = {name: getattr(self, name) for name in names}
        return tensors if self.bias is None else tensors | {"bias": self.bias}


def _grid(codes: Tensor, scale: Tensor, bits: int) -> str:
    """In words: how many codes of how many bits, and what has a scale."""
    (rows, cols), groups = codes.shape, scale.shape[1]
    each = f"{cols // groups} columns" if groups > 1 else "channel"
    each = "tensor" if scale.numel() == 1 and rows > 1 else each
    return f"{as_shape((rows, cols))} codes of {bits} bits, a scale per {each}"


def _digest(tensors: Mapping[str, Tensor], report: str) -> str:
    digest = hashlib.blake2b(report.encode(), digest_size=16)
    for name in sorted(tensors):
        digest.update(f"{name}=".encode())
        add_tensor(digest, tensors[name])
    return digest.hexdigest()
