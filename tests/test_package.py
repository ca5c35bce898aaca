"""What the package shows of itself."""

from __future__ import annotations

import importlib
import inspect
import sys

import pytest

import adaround_ext


def test_dir_shows_what_is_public() -> None:
    names = dir(adaround_ext)
    assert [name for name in names if not name.startswith("__")] == sorted(adaround_ext.__all__)
    assert {"__version__", "__doc__", "__all__"} <= set(names)
    assert all(hasattr(adaround_ext, name) for name in names)


def test_modules_are_there_all_the_same() -> None:
    for name in ("config", "attachment", "export", "ops"):
        assert inspect.ismodule(importlib.import_module(f"adaround_ext.{name}"))
        assert inspect.ismodule(getattr(adaround_ext, name))


# Places that the documents named before the package had rooms; its classes and functions besides.
FORMER = [
    "attachment.detach",
    "export.aimet.export_aimet",
    "export.compressed_tensors.export_compressed_tensors",
    "export.gguf.export_gguf",
    "export.onnx.export_onnx",
    "export.parity.OutputParity",
    "export.parity.RunnerParity",
    "export.torchao.export_torchao",
    "export.torchao.to_torchao",
    "export_targets.EXPORT_TARGETS",
    "export_targets.ExportTarget",
    "native.use_instruction_set",
    "native.build_info",
    "packing.pack_bits",
    "packing.packed_linear",
    "packing.unpack_bits",
    "reference_solvers.gptq",
    "reference_solvers.tabu_search_",
    "reference.optimize",
    "ops.gptq",
]


@pytest.mark.parametrize("name", FORMER)
@pytest.mark.filterwarnings("ignore:adaround_ext:DeprecationWarning")
def test_former_places_hold_their_names(name: str) -> None:
    module, _, item = name.rpartition(".")
    assert hasattr(importlib.import_module(f"adaround_ext.{module}"), item)


@pytest.mark.parametrize("name", ["native", "packing", "reference_solvers"])
def test_modules_that_go_say_where_to(name: str) -> None:
    sys.modules.pop(f"adaround_ext.{name}", None)
    with pytest.warns(DeprecationWarning, match=rf"adaround_ext\.{name} is adaround_ext"):
        importlib.import_module(f"adaround_ext.{name}")
