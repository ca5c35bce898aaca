"""Simulated quantization of activations: ranges, quantizers, their places, the hooks."""

from adaround_ext.activations.hooks import detach
from adaround_ext.activations.quantizer import ActivationConfig, ActivationQuantizer

__all__ = ["ActivationConfig", "ActivationQuantizer", "detach"]
