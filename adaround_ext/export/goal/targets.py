"""Export targets: the runtimes that quantized models are for, and what each takes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.checks import fail
from adaround_ext.config import AdaRoundConfig
from adaround_ext.export.formats import need


@dataclass(frozen=True)
class ExportTarget:
    """A runtime's format, what it asks of layers, and what is best for it; EXPORT_TARGETS has all.

    Attributes:
        name: That ``export_for`` takes.
        format: That :func:`adaround_ext.export_model` writes for it, with ``runtime`` as the target
            of "onnx".
        extra: Of this package, which brings the ``packages`` that write the format.
        packages: That write the format.
        runtime: The target of "onnx".
        dtypes: That weights may have. Where bfloat16 is none of them, models in it become float32,
            which changes no value.
        scale_dtype: Of scales; None is that of the weight.
        asymmetric: The bits of weights that may have zero points.
        group_sizes: How many columns of a Linear share a scale, the preferred number first, where
            it has up to ``group_bits``; a scale a channel where none of them divides the columns.
        group_bits: The most bits of a Linear whose columns are grouped.
        columns: What a Linear's columns, and groups of them, must be multiples of.
        odd_bits: The fewest of a Linear with an odd number of columns.
        narrow_range: Whether 8 bits go without their lowest code.
        circular: Whether there is circular padding.
        linear_only: Whether layers other than Linear stay as they are.
        pretrained: Whether models must be of transformers, and hold just what their class builds.
        head: Whether the output embedding of such a model is quantized, left alone unless overrides
            name it, or always left alone.
        activation_bits: At most so many, 0 where activations cannot be quantized.
        activation_zero_points: Whether they may be asymmetric.
    """

    name: str
    format: str
    extra: str
    packages: tuple[str, ...]
    runtime: str = "ort"
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float16, torch.bfloat16)
    scale_dtype: torch.dtype | None = None
    asymmetric: tuple[int, ...] = (2, 3, 4, 5, 6, 7, 8)
    group_sizes: tuple[int, ...] = (128, 64, 32)
    group_bits: int = 4
    columns: int = 1
    odd_bits: int = 2
    narrow_range: bool = False
    circular: bool = True
    linear_only: bool = False
    pretrained: bool = False
    head: Literal["quantize", "skip", "never"] = "quantize"
    activation_bits: int = 0
    activation_zero_points: bool = True

    def check_packages(self) -> None:
        """ImportError, with what to install, where the format cannot be written."""
        need(f"exporting for {self.name}", self.extra, *self.packages)

    @property
    def choices(self) -> dict[str, Any]:
        """Settings of all layers, which the caller's come after."""
        return {} if self.scale_dtype is None else {"scale_dtype": self.scale_dtype}

    def check_config(self, config: AdaRoundConfig) -> None:
        """ValueError for settings that no layer can have there."""
        if not config.symmetric and config.bits not in self.asymmetric:
            bits = ", ".join(map(str, self.asymmetric))
            also = f" unless bits are one of {bits}" if bits else ""
            fail("symmetric", f"True for {self.name}{also}", config.symmetric)
        if config.bias == "create" and self.pretrained:
            fail("bias", f"refit or keep for {self.name}", config.bias)
        if self.scale_dtype not in (None, config.scale_dtype):
            fail("scale_dtype", f"{self.scale_dtype} for {self.name}", config.scale_dtype)
        if config.group_size is not None and config.group_size % self.columns:
            rule = f"a multiple of {self.columns} for {self.name}"
            fail("group_size", rule, config.group_size)

    def check_activations(self, config: ActivationConfig | None) -> None:
        """ValueError for quantized activations that it has not."""
        if config is None:
            return
        if self.activation_bits == 0:
            fail("activations", f"None for {self.name}", config)
        if config.bits > self.activation_bits:
            rule = f"of at most {self.activation_bits} bits for {self.name}"
            fail("activations", rule, config.bits)
        if not (config.symmetric or self.activation_zero_points):
            fail("activations", f"symmetric for {self.name}", config)


_ONNX = ("onnx", ("onnx", "onnxscript"))
_COMPRESSED = ("compressed-tensors", ("transformers", "compressed_tensors"))
_NO_BFLOAT16 = (torch.float32, torch.float16)
EXPORT_TARGETS = {
    target.name: target
    for target in (
        ExportTarget(
            "onnxruntime", "onnx", *_ONNX,
            dtypes=_NO_BFLOAT16, group_sizes=(128, 64, 32, 16), activation_bits=16,
        ),
        ExportTarget(
            "openvino", "onnx", *_ONNX, runtime="openvino",
            dtypes=_NO_BFLOAT16, group_sizes=(128, 64, 32, 16), odd_bits=8, circular=False,
            activation_bits=8,
        ),
        # Asymmetric codes of 4 and 8 bits would need zero points. Blocks are of 64 or 128.
        ExportTarget(
            "tensorrt", "onnx", *_ONNX, runtime="tensorrt",
            dtypes=_NO_BFLOAT16, asymmetric=(2, 3, 5, 6, 7), group_sizes=(128, 64),
            narrow_range=True, activation_bits=8, activation_zero_points=False,
        ),
        # CompressedTensorsConfig.get_quant_method has methods for linear layers and experts, not
        # for the output embedding; CompressedTensorsWNA16 takes zero points at 4 and 8 bits.
        ExportTarget(
            "vllm", "compressed-tensors", *_COMPRESSED,
            asymmetric=(4, 8), linear_only=True, pretrained=True, head="never",
        ),
        ExportTarget(
            "transformers", "compressed-tensors", *_COMPRESSED,
            linear_only=True, pretrained=True, head="skip",
        ),
        # Q4_0 and Q8_0.
        ExportTarget(
            "gguf", "gguf", "gguf", ("gguf",),
            scale_dtype=torch.float16, asymmetric=(), group_sizes=(32,), group_bits=8, columns=32,
            linear_only=True,
        ),
    )
}  # fmt: skip


def export_target(name: object) -> ExportTarget:
    """The target of that name; ValueError for another one."""
    if not isinstance(name, str) or name not in EXPORT_TARGETS:
        raise ValueError(f"export_for must be one of {', '.join(EXPORT_TARGETS)}, got {name!r}")
    return EXPORT_TARGETS[name]
