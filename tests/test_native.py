"""The native libraries: what build_info says, and the choice of the instruction set."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from helpers import INSTRUCTION_SETS, make_sample

import adaround_ext
from adaround_ext import native, ops


def test_build_info() -> None:
    info = adaround_ext.build_info()
    assert set(info) == {
        "version",
        "compiler",
        "torch_built_with",
        "instruction_sets",
        "cuda_toolkit",
        "cuda_architectures",
        "torch",
        "instruction_set",
        "cuda_loaded",
    }
    assert info["torch"] == torch.__version__
    assert info["instruction_set"] in info["instruction_sets"]
    assert info["instruction_sets"][0] == "baseline"
    assert bool(info["cuda_toolkit"]) == bool(info["cuda_architectures"])
    assert not info["cuda_loaded"] or info["cuda_toolkit"]


@pytest.mark.parametrize("name", INSTRUCTION_SETS)
def test_use_instruction_set(name: str) -> None:
    before = native.use_instruction_set()
    try:
        assert native.use_instruction_set(name) == name
        assert native.use_instruction_set() == name  # asking changes nothing
        assert native.build_info()["instruction_set"] == name
    finally:
        assert native.use_instruction_set("auto") == INSTRUCTION_SETS[-1]  # the best
        native.use_instruction_set(before)


def test_unknown_instruction_set() -> None:
    before = native.use_instruction_set()
    with pytest.raises(ValueError, match=r'name must be "auto", "baseline" or .* got "sse9"'):
        native.use_instruction_set("sse9")
    assert native.use_instruction_set() == before


def test_instruction_sets_agree() -> None:
    sample = make_sample(torch.device("cpu"), 16, 67, grid=(8, False, "each", 1))
    results = []
    try:
        for name in INSTRUCTION_SETS:
            native.use_instruction_set(name)
            codes = ops.hard_quantize(*sample.args)
            results.append((*ops.soft_quantize_with_grad(*sample.args, 4.0), codes))
    finally:
        native.use_instruction_set("auto")
    for other in results[1:]:
        assert torch.equal(other[-1], results[0][-1])
        torch.testing.assert_close(other[:-1], results[0][:-1], rtol=1e-5, atol=1e-5)


def test_environment_variable_makes_the_first_choice() -> None:
    code = "from adaround_ext import native; print(native.use_instruction_set())"
    environment = os.environ | {"ADAROUND_EXT_ISA": "baseline"}
    out = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True
    )
    assert out.stdout.strip() == "baseline"


def test_loading_the_libraries_keeps_denormals() -> None:
    # Code built with -ffast-math would flush them to zero in the whole process.
    tiny = torch.full((64,), torch.finfo(torch.float32).tiny)
    assert ((tiny / 4) * 4 == tiny).all()
