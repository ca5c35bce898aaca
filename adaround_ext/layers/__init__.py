"""Layers as matrix products, and the inputs they get."""

from adaround_ext.layers.matrix import MatrixLayer, _Conv, _ConvTranspose  # in pickled modules

__all__ = ["MatrixLayer", "_Conv", "_ConvTranspose"]
