"""Small quantized models in no time, and what is checked of each as an ONNX file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig
from adaround_ext.export.onnx import export_onnx, runners
from adaround_ext.export.runner import output_tensors
from adaround_ext.grid import make_grid, nearest_codes
from adaround_ext.layers.matrix import SUPPORTED, matrix_layer
from adaround_ext.result import QuantizedWeight, write_
from adaround_ext.tracing.arguments import Arguments

onnx = pytest.importorskip("onnx", reason="needs onnx")
for package in ("onnxscript", "onnxruntime"):
    pytest.importorskip(package, reason=f"needs {package}")


def rounded(model: nn.Module, **settings: Any) -> nn.Module:
    """The model in eval mode, all of its layers rounded to nearest and left as quantize_ does."""
    config = AdaRoundConfig(**{"bits": 4, "scale": "min_max"} | settings)
    done: dict[nn.Parameter, QuantizedWeight] = {}
    for module in model.eval().modules():
        if isinstance(module, SUPPORTED):
            parameter = module.get_parameter("weight")
            if parameter not in done:
                matrix = matrix_layer(module)
                weight = matrix.weight_matrix().float()
                grid = make_grid(weight, config)
                codes = nearest_codes(weight, grid)
                done[parameter] = QuantizedWeight(codes, grid.scale, grid.zero_point, config.bits)
                write_(module, done[parameter].dequantize(matrix), None)
            module.quantized_weight = done[parameter]
    return model


class Many(nn.Module):
    """Several layers, each on an input of its own."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, *inputs: Tensor) -> list[Tensor]:
        return [layer(x) for layer, x in zip(self.layers, inputs, strict=True)]


def exported(model: nn.Module, batch: Any, folder: Path, **options: Any) -> onnx.ModelProto:
    """What is in the file, which the checker of onnx accepts."""
    export_onnx(model, batch, folder, **options)
    onnx.checker.check_model(folder / "model.onnx", full_check=True)
    return onnx.load(folder / "model.onnx")


def assert_same(model: nn.Module, folder: Path, batches: Sequence[Any]) -> None:
    """All runners that promise it give what the model gives."""
    exact = [runner for runner in runners(folder, model) if runner.exact]
    assert exact
    for batch in batches:
        args, kwargs = Arguments(model, "batch").of(batch)
        with torch.no_grad():
            wanted = output_tensors(model(*args, **kwargs))
        for runner in exact:
            got = runner.run(args, kwargs)
            assert [y.shape for y in got] == [y.shape for y in wanted]
            assert [y.dtype for y in got] == [y.dtype for y in wanted]
            for a, b in zip(got, wanted, strict=True):
                error = float((a.double() - b.double()).norm() / b.double().norm())
                assert error <= 1e-5, f"{runner.name}: {error:.1e}"


def initializers(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """All constants by name; those of 4 bits in a type of ml_dtypes."""
    return {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}


def nodes(model: onnx.ModelProto, kind: str) -> list[onnx.NodeProto]:
    """All nodes of an operator."""
    return [node for node in model.graph.node if node.op_type == kind]


def attributes(node: onnx.NodeProto) -> dict[str, Any]:
    """Of a node, as plain values."""
    return {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}


def state(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that an export must leave alone."""
    found: dict[str, Any] = {"training": [m.training for m in model.modules()]}
    found |= {
        name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()
    }
    for name, module in model.named_modules():
        found[f"keys of {name}"] = sorted(module.__dict__)
        found[f"tensors of {name}"] = [*module._parameters, *module._buffers, *module._modules]
    return found


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state(model)
    assert after.keys() == before.keys()
    for name, value in after.items():
        if isinstance(value, tuple):
            assert value[0] == before[name][0], name
            assert isinstance(value[1], Tensor)
            assert torch.equal(value[1], before[name][1]), name
        else:
            assert value == before[name], name
