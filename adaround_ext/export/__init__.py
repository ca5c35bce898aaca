"""Quantized models in the formats that runtimes load; one file a format.

Formats that need packages of their own are imported by their modules: ``adaround_ext.export.onnx``,
``compressed_tensors``, ``torchao``, ``aimet`` and ``gguf``.
"""

from adaround_ext.export.formats import FORMATS, export_model
from adaround_ext.export.packed.modules import QuantConv, QuantLinear, pack_
from adaround_ext.export.packed.save import load_quantized, save_quantized
from adaround_ext.export.parity import ParityReport, verify

__all__ = [
    "FORMATS",
    "ParityReport",
    "QuantConv",
    "QuantLinear",
    "export_model",
    "load_quantized",
    "pack_",
    "save_quantized",
    "verify",
]
