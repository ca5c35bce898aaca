"""Quantized models as GGUF files."""

from adaround_ext.export.gguf.export import export_gguf, runners

__all__ = ["export_gguf", "runners"]
