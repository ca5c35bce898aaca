"""AIMET export: a float ONNX file and its encodings."""

from adaround_ext.export.aimet.export import export_aimet
from adaround_ext.export.aimet.runner import runners

__all__ = ["export_aimet", "runners"]
