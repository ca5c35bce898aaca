"""Quantized models for AIMET: a float ONNX file and its encodings."""

from adaround_ext.export.aimet.export import export_aimet, runners

__all__ = ["export_aimet", "runners"]
