"""Packed runners: our own format loaded into the model's class, as floats and with packed codes."""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path

from torch import nn

from adaround_ext.activations.hooks import quantizers
from adaround_ext.export.packed.load import load_quantized
from adaround_ext.export.runner import FLIPS, Runner, module_runner


def runners(folder: Path, model: nn.Module) -> list[Runner]:
    """The model with its weights as floating point, and with packed codes."""
    plain, packed = (load_quantized(folder, copy.deepcopy(model), packed=p) for p in (False, True))
    compact = module_runner("QuantLinear, QuantConv", packed)
    if quantizers(packed):
        compact = dataclasses.replace(compact, exact=False, note=FLIPS)
    loaded = dataclasses.replace(module_runner("load_quantized", plain), same_operators=True)
    return [loaded, compact]
