"""Constants of a graph that is being written."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray[Any, Any]) -> ir.Value:
    """A new initializer; its name gets "_" behind it while the model has one of that name."""
    import onnx_ir as ir

    while name in graph.initializers:
        name += "_"
    constant = ir.Tensor(array, name=name)
    value = ir.Value(
        name=name,
        shape=constant.shape,
        type=ir.TensorType(constant.dtype),
        const_value=constant,
    )
    graph.register_initializer(value)
    return value
