"""Packed export: the package's own format, and modules that compute with packed codes."""

from adaround_ext.export.packed.load import load_quantized
from adaround_ext.export.packed.runner import runners
from adaround_ext.export.packed.save import save_quantized

__all__ = ["load_quantized", "runners", "save_quantized"]
