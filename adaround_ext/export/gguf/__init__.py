"""GGUF export: files with a layer's codes as they are."""

from adaround_ext.export.gguf.export import export_gguf
from adaround_ext.export.gguf.runner import runners

__all__ = ["export_gguf", "runners"]
