"""Pickles made when the package was one flat folder: models, packed modules and results."""

from __future__ import annotations

import io
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

import adaround_ext
from adaround_ext import AdaRoundConfig, LayerResult
from adaround_ext.activations import ActivationQuantizer
from adaround_ext.export import QuantConv, QuantLinear

# torch.save of a model with quantized weights and activations, the same with packed modules, a
# result, a configuration, and what both models made of an input, by commit afffcaa.
FORMER = Path(__file__).with_name("pickled.pt")


@pytest.fixture
def former() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return torch.load(FORMER, weights_only=False)


def test_models_do_what_they_did(former: Any) -> None:
    for name in ("model", "packed"):
        with torch.no_grad():
            torch.testing.assert_close(former[name].eval()(former["x"]), former["outputs"][name])
    kinds = {type(module) for module in former["model"].modules()}
    assert ActivationQuantizer in kinds
    assert {QuantConv, QuantLinear} <= {type(module) for module in former["packed"].modules()}


def test_results_are_of_today(former: Any) -> None:
    assert isinstance(former["result"], LayerResult)
    assert "weight 4x6: 4x6 codes of 4 bits" in repr(former["result"])
    assert former["config"] == AdaRoundConfig(bits=3)


def test_pickles_of_today_name_public_places(former: Any) -> None:
    again = io.BytesIO()
    torch.save({"result": former["result"], "config": former["config"]}, again)
    assert b"adaround_ext\nLayerResult" in (text := _pickle_of(again))
    assert b"adaround_ext\nAdaRoundConfig" in text
    for name in adaround_ext.__all__:
        item = getattr(adaround_ext, name)
        assert not isinstance(item, type) or item.__module__ == "adaround_ext", name


def _pickle_of(file: io.BytesIO) -> bytes:
    with zipfile.ZipFile(file) as archive:
        return next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
