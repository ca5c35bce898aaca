"""AdaRound, learned weight rounding for post-training quantization, with fused native kernels."""

from adaround_ext.activations import ActivationConfig
from adaround_ext.config import AdaRoundConfig
from adaround_ext.export import export_model, load_quantized, pack_, save_quantized, verify
from adaround_ext.mapped import map_weights_
from adaround_ext.model import quantize_
from adaround_ext.model_report import LayerEntry, ModelReport
from adaround_ext.native import build_info
from adaround_ext.reconstruct import optimize_layer
from adaround_ext.report import LayerReport
from adaround_ext.result import LayerResult, QuantizedWeight
from adaround_ext.sensitivities import sensitivity
from adaround_ext.sensitivity_report import Sensitivity

__all__ = [
    "ActivationConfig",
    "AdaRoundConfig",
    "LayerEntry",
    "LayerReport",
    "LayerResult",
    "ModelReport",
    "QuantizedWeight",
    "Sensitivity",
    "build_info",
    "export_model",
    "load_quantized",
    "map_weights_",
    "optimize_layer",
    "pack_",
    "quantize_",
    "save_quantized",
    "sensitivity",
    "verify",
]
__version__ = build_info()["version"]


def __dir__() -> list[str]:
    """The public names; modules are there to be imported all the same."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
