"""ONNX export: files for ONNX Runtime, OpenVINO, TensorRT and Qualcomm's QNN."""

from adaround_ext.export.onnx.export import export_onnx
from adaround_ext.export.onnx.runner import runners

__all__ = ["export_onnx", "runners"]
