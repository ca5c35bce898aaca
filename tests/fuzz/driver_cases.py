"""What is drawn for the driver: a good call with up to three things that are odd or wrong."""

from __future__ import annotations

import dataclasses
from typing import Any

from hypothesis import strategies as st

from tests.fuzz.driver_models import BAD_LAYERS, BAD_MODELS, LAYERS, MODELS
from tests.fuzz.driver_values import (
    BAD_KINDS,
    BAD_MODEL_SETTINGS,
    BAD_SETTINGS,
    BAD_VALUES,
    KINDS,
    MODEL_SETTINGS,
    ODD,
    SETTINGS,
    VALUES,
)

# What of a call is wrong.
FAULTS = [
    (),
    (),
    (),
    (),
    (),
    (),
    (),
    ("model",),
    ("data",),
    ("values",),
    ("settings",),
    ("settings",),
]
FAULTS += [("model", "values"), ("data", "settings"), ("data", "model")]


@dataclasses.dataclass(frozen=True)
class DriverCase:
    """A call of optimize_layer or quantize_; names are those of driver_models and driver_values."""

    call: str
    model: str
    dtype: str
    data: str
    values: str
    targets: str
    train: bool
    grad: bool
    seed: int
    settings: dict[str, Any]


@st.composite
def driver_cases(draw: st.DrawFn) -> DriverCase:
    """A case of either call."""
    layer = draw(st.booleans())
    good, bad = (LAYERS, BAD_LAYERS) if layer else (MODELS, BAD_MODELS)
    faults = draw(st.sampled_from(FAULTS))
    targets = ["none", "none", "tensor", "list", "generator"] if layer else ["none"]
    return DriverCase(
        call="optimize_layer" if layer else "quantize_",
        model=draw(st.sampled_from(list(bad if "model" in faults else good))),
        dtype=draw(st.sampled_from(["float32", "float32", "float32", "float64", "bfloat16",
                                    "float16"])),
        data=draw(st.sampled_from(BAD_KINDS if "data" in faults else KINDS)),
        values=draw(st.sampled_from(BAD_VALUES if "values" in faults else VALUES)),
        targets=draw(st.sampled_from(BAD_KINDS if "data" in faults and layer else targets)),
        train=draw(st.booleans()),
        grad=draw(st.booleans()),
        seed=draw(st.integers(0, 99)),
        settings=_settings(draw, layer, "settings" in faults),
    )  # fmt: skip


def _settings(draw: st.DrawFn, layer: bool, wrong: bool) -> dict[str, Any]:
    """Up to three good settings and, where ``wrong``, a bad or an odd one."""
    good = SETTINGS if layer else SETTINGS | MODEL_SETTINGS
    bad = BAD_SETTINGS if layer else BAD_SETTINGS | BAD_MODEL_SETTINGS
    names = draw(st.lists(st.sampled_from(list(good)), max_size=3, unique=True))
    settings = {name: draw(st.sampled_from(good[name])) for name in names}
    if settings.get("granularity") == "per_group":
        settings.setdefault("group_size", 1)
    elif "group_size" in settings:
        settings["granularity"] = "per_group"
    if wrong and draw(st.booleans()):
        name = draw(st.sampled_from(list(bad)))
        settings[name] = draw(st.sampled_from(bad[name]))
    elif wrong:
        settings[draw(st.sampled_from(sorted(good)))] = draw(st.sampled_from(ODD))
    return settings
