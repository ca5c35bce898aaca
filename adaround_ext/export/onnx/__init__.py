"""Quantized models as ONNX files."""

from adaround_ext.export.onnx.export import export_onnx, runners

__all__ = ["export_onnx", "runners"]
