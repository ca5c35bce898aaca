"""The package's own format, and modules that compute with packed codes."""

from adaround_ext.export.packed.save import load_quantized, runners, save_quantized

__all__ = ["load_quantized", "runners", "save_quantized"]
