"""Quantized models in the formats that runtimes load, and the proof that they give the same.

Formats that need packages of their own are imported by their modules: ``adaround_ext.export.onnx``,
``compressed_tensors``, ``torchao``, ``aimet`` and ``gguf``.
"""

from adaround_ext.export.formats import FORMATS, export_model
from adaround_ext.export.packed.load import load_quantized
from adaround_ext.export.packed.modules import PackedLayer, QuantConv, QuantLinear, pack_
from adaround_ext.export.packed.save import save_quantized
from adaround_ext.export.parity import verify
from adaround_ext.export.parity_report import OutputParity, ParityReport, RunnerParity

__all__ = [
    "FORMATS",
    "OutputParity",
    "ParityReport",
    "QuantConv",
    "QuantLinear",
    "RunnerParity",
    "export_model",
    "load_quantized",
    "pack_",
    "save_quantized",
    "verify",
]

# Pickles name the module of a class: this one, whatever moves.
for _class in (OutputParity, PackedLayer, ParityReport, QuantConv, QuantLinear, RunnerParity):
    _class.__module__ = __name__
del _class
