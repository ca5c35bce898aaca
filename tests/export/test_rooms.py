"""The packages of the formats: each stands alone, and shows its functions and its runners."""

from __future__ import annotations

import ast
import pickle
from pathlib import Path

import pytest

from adaround_ext import export
from adaround_ext.export import QuantConv, QuantLinear
from adaround_ext.export.formats import FORMATS, format_module

ROOT = Path(export.__file__).parent
ROOMS = {"aimet", "compressed_tensors", "gguf", "onnx", "packed", "torchao"}
# AIMET's graph is an ONNX graph.
MAY_IMPORT = {"aimet": {"onnx"}}
FUNCTIONS = {
    "safetensors": ("load_quantized", "save_quantized"),
    "onnx": ("export_onnx",),
    "compressed-tensors": ("export_compressed_tensors",),
    "torchao": ("export_torchao", "to_torchao"),
    "aimet": ("export_aimet",),
    "gguf": ("export_gguf",),
}


def imported_rooms(path: Path) -> set[str]:
    """The formats that a module imports anywhere, also inside of functions."""
    prefix = "adaround_ext.export."
    tree = ast.parse(path.read_text(encoding="utf-8"))
    modules = (node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom))
    return {m.removeprefix(prefix).split(".")[0] for m in modules if m.startswith(prefix)} & ROOMS


@pytest.mark.parametrize("room", sorted(ROOMS))
def test_formats_do_not_know_each_other(room: str) -> None:
    single = ROOT / f"{room}.py"
    for path in [single] if single.is_file() else sorted((ROOT / room).glob("*.py")):
        assert imported_rooms(path) <= {room} | MAY_IMPORT.get(room, set()), path.name


def test_what_formats_share_knows_none_of_them() -> None:
    for name in ("torch_export", "quantized_layers", "manifest", "hugging_face", "formats"):
        assert not imported_rooms(ROOT / f"{name}.py"), name


@pytest.mark.parametrize("kind", FORMATS)
def test_functions_of_the_formats(kind: str) -> None:
    for name in (*FUNCTIONS[kind], "runners"):
        assert callable(getattr(format_module(kind), name))


@pytest.mark.parametrize("kind", [QuantConv, QuantLinear])
def test_pickles_name_the_public_place(kind: type) -> None:
    pickled = pickle.dumps(kind, protocol=2)
    assert b"adaround_ext.export\n" in pickled
    former = pickled.replace(b"adaround_ext.export\n", b"adaround_ext.export.modules\n")
    assert pickle.loads(pickled) is pickle.loads(former) is kind
