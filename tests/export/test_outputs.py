"""Exports of models whose outputs are classes that torch's pytrees know, with keys or without.

As ModelOutput of transformers 4, which registers its classes without the keys of their children.
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext import export_model, verify
from adaround_ext.export.manifest import read_manifest
from adaround_ext.export.onnx.names import output_names_of
from tests.support.export_models import quantized

pytestmark = pytest.mark.usefixtures("one_thread")


class Keyless(OrderedDict[str, Any]):
    """A mapping whose keys pytrees do not know, as a ModelOutput of transformers 4."""


class Reversed(OrderedDict[str, Any]):
    """Whose children are not in the order of its values: its keys would name the wrong ones."""


@dataclasses.dataclass
class Numbered:
    """No mapping at all."""

    first: Any
    second: Any


for kind, flatten, unflatten in (
    (Keyless, lambda x: (list(x.values()), list(x)), lambda v, k: Keyless(zip(k, v, strict=True))),
    (
        Reversed,
        lambda x: (list(x.values())[::-1], list(x)),
        lambda v, k: Reversed(zip(k, reversed(list(v)), strict=True)),
    ),
    (Numbered, lambda x: ([x.first, x.second], None), lambda v, _: Numbered(*v)),
):
    pytree.register_pytree_node(
        kind, flatten, unflatten, serialized_type_name=f"{__name__}.{kind.__name__}"
    )


class Net(nn.Module):
    def __init__(self, output: Any) -> None:
        super().__init__()
        self.layer, self.output = nn.Linear(32, 4), output

    def forward(self, x: Tensor) -> Any:
        return self.output(self.layer(x), x)


OUTPUTS = {
    "keyless": (lambda y, x: Keyless(logits=y, state=2 * x), ["logits", "state"]),
    "nested": (
        lambda y, x: Keyless(logits=y, past=(2 * x, Keyless(key=3 * x))),
        ["logits", "past_0", "past_1_key"],
    ),
    "inside": (lambda y, x: {"out": [Keyless(logits=y)], "none": None}, ["out_0_logits"]),
    "reversed": (lambda y, x: Reversed(a=y, b=2 * x), ["output_0", "output_1"]),
    "numbered": (lambda y, x: Numbered(y, 2 * x), ["output_0", "output_1"]),
    "plain": (lambda y, x: {"logits": y, "state": (2 * x,)}, ["logits", "state_0"]),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_names(name: str) -> None:
    output, names = OUTPUTS[name]
    assert output_names_of(output(torch.ones(2, 4), torch.ones(2, 32))) == names


@pytest.mark.parametrize("kind", ["onnx", "aimet", "torchao"])
@pytest.mark.parametrize("name", OUTPUTS)
def test_exports(name: str, kind: str, tmp_path: Path) -> None:
    for package in ("torchao",) if kind == "torchao" else ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    output, names = OUTPUTS[name]
    x = torch.randn(16, 32)
    model = quantized(Net(output), x)
    export_model(model, tmp_path / "out", kind, batch=x)
    assert verify(model, tmp_path / "out", x).ok
    if kind == "onnx":
        assert read_manifest(tmp_path / "out").details["outputs"] == names


@pytest.mark.parametrize("kind", ["onnx", "aimet", "torchao"])
def test_model_outputs_of_transformers(kind: str, tmp_path: Path) -> None:
    """Of whichever version is installed: 4 writes torchao's tensors by torch."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    for package in ("torchao",) if kind == "torchao" else ("onnxscript", "onnxruntime"):
        pytest.importorskip(package)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48}
    config = transformers.BertConfig(**sizes, num_hidden_layers=1, num_attention_heads=2)
    model, ids = transformers.BertModel(config).eval(), torch.randint(64, (2, 8))
    quantized(model, {"input_ids": ids})  # type: ignore[arg-type]
    export_model(model, tmp_path / "out", kind, batch={"input_ids": ids})
    report = verify(model, tmp_path / "out", [{"input_ids": ids}])
    assert report.ok
    assert len(report.runs[0].outputs) == 2
