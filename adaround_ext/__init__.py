"""AdaRound, learned weight rounding for post-training quantization, with fused native kernels."""

import sys

from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.config import AdaRoundConfig
from adaround_ext.export import export_model, load_quantized, pack_, save_quantized, verify
from adaround_ext.mixed_precision.result import Sensitivity
from adaround_ext.mixed_precision.sensitivity import sensitivity
from adaround_ext.model.mapped import map_weights_
from adaround_ext.model.quantize import quantize_
from adaround_ext.ops.library import build_info, use_instruction_set
from adaround_ext.report.layer import LayerReport
from adaround_ext.report.model import LayerEntry, ModelReport
from adaround_ext.result import LayerResult, QuantizedWeight
from adaround_ext.rounding.optimize import optimize_layer

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
    "use_instruction_set",
    "verify",
]
__version__ = build_info()["version"]

# Pickles name the module of a class: from here on the place where users find it. Older ones, and
# code of users, may name the modules below.
for _name in __all__:
    if isinstance(_item := globals()[_name], type):
        _item.__module__ = __name__
_FORMER = {
    "attachment": "activations.hooks",
    "export_targets": "export.goal.targets",
    "model_report": "report.model",
    "sensitivity_report": "mixed_precision.result",
    "export.modules": "export.packed.modules",
}
for _former, _now in _FORMER.items():
    _room, _, _last = f"{__name__}.{_former}".rpartition(".")
    sys.modules[f"{_room}.{_last}"] = _module = sys.modules[f"{__name__}.{_now}"]
    setattr(sys.modules[_room], _last, _module)
del _name, _item, _former, _now, _room, _last, _module


def __dir__() -> list[str]:
    """The public names; modules are there to be imported all the same."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__"))])
