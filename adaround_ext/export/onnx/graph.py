"""QDQ graph: marked operators become QuantizeLinear, DequantizeLinear, MatMul and Add."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from adaround_ext.export.onnx.activations import StoredQuantizer
from adaround_ext.export.onnx.trace import ACTIVATION, DOMAIN, LINEAR
from adaround_ext.export.onnx.weights import StoredWeight

if TYPE_CHECKING:
    import onnx_ir as ir

WeightOf = Callable[[int, bool], tuple[str, StoredWeight]]
QuantizerOf = Callable[[int], tuple[str, StoredQuantizer]]


def expand_(
    model: ir.Model, weight_of: WeightOf, quantizer_of: QuantizerOf, bias_apart: bool
) -> None:
    """Replaces all marked operators of an onnx_ir model.

    weight_of(index, transpose), quantizer_of(index): the name of a weight or quantizer in the model
    and what is stored for it; asked once each. Codes become initializers of that name; what belongs
    to them has "_scale" and the like behind it. Layers that hold one weight, and uses of one layer,
    share them, but not DequantizeLinear, as runtimes fuse one with each use. bias_apart: see
    :class:`adaround_ext.export.onnx.targets.Target`.
    """
    from onnx_ir.passes import common

    nodes = without_weights_(model)
    expander = _Expander(model.graph, cache(weight_of), cache(quantizer_of), bias_apart)
    for node in nodes:
        if node.graph is not None:  # else nothing used its output
            expander.expand(node)
    common.RemoveUnusedOpsetsPass()(model)


def without_weights_(model: ir.Model) -> list[ir.Node]:
    """The marked operators of a graph, all cut off from float weights, which go.

    What replaces the operators may take the weights' names.
    """
    import onnx_ir as ir
    from onnx_ir.passes import common

    nodes = [n for n in ir.traversal.RecursiveGraphIterator(model.graph) if n.domain == DOMAIN]
    for node in nodes:
        if node.op_type != ACTIVATION:
            node.replace_input_with(1 if node.op_type == LINEAR else 0, None)
    common.RemoveUnusedNodesPass()(model)
    return nodes


def index_of(node: ir.Node) -> int:
    """The number of the layer or quantizer that a marked operator stands for."""
    return node.attributes["index"].as_int()


class _Expander:
    def __init__(
        self, graph: ir.Graph, weight_of: WeightOf, quantizer_of: QuantizerOf, bias_apart: bool
    ) -> None:
        self._graph = graph  # subgraphs see its initializers too
        self._weight_of, self._quantizer_of = weight_of, quantizer_of
        self._bias_apart = bias_apart
        self._stored: dict[StoredWeight | StoredQuantizer, dict[str, ir.Value]] = {}

    def expand(self, node: ir.Node) -> None:
        import onnx_ir as ir

        index = index_of(node)
        inputs = [value for value in node.inputs if value is not None]
        chain = _Chain(node)
        if node.op_type == ACTIVATION:
            self._quantize(chain, inputs[0], *self._quantizer_of(index))
        else:
            linear = node.op_type == LINEAR
            weight = self._dequantize(chain, *self._weight_of(index, linear))
            if linear:
                product = chain.add("MatMul", [inputs[0], weight])
                for bias in inputs[1:]:
                    apart = self._bias_apart and _is_float_matrix(inputs[0])
                    chain.add("Sum" if apart else "Add", [product, bias])
        assert node.graph is not None
        ir.convenience.replace_nodes_and_values(
            node.graph, node, [node], chain.nodes, node.outputs, chain.nodes[-1].outputs
        )

    def _dequantize(self, chain: _Chain, name: str, stored: StoredWeight) -> ir.Value:
        values = self._initializers(name, stored)
        inputs = [values[key] for key in ("", "_scale", "_zero_point") if key in values]
        places = {"axis": stored.axis, "block_size": stored.block_size}
        attributes = {key: value for key, value in places.items() if value is not None}
        value = chain.add("DequantizeLinear", inputs, values["_scale"].dtype, attributes)
        value.shape = values[""].shape
        if "_shape" in values:
            value = chain.add("Reshape", [value, values["_shape"]], value.dtype)
        return chain.cast(value)

    def _quantize(self, chain: _Chain, x: ir.Value, name: str, stored: StoredQuantizer) -> None:
        values = self._initializers(name, stored)
        grid = [values["_scale"], values["_zero_point"]]
        single = grid[0].dtype
        value = chain.cast(x, single)
        if "_low" in values:
            value = chain.add("Clip", [value, values["_low"], values["_high"]], single)
        value = chain.add("QuantizeLinear", [value, *grid], grid[1].dtype)
        value = chain.add("DequantizeLinear", [value, *grid], single)
        chain.cast(value)

    def _initializers(
        self, name: str, stored: StoredWeight | StoredQuantizer
    ) -> dict[str, ir.Value]:
        """What is stored, by what is behind ``name`` in the names of its initializers."""
        if stored not in self._stored:
            self._stored[stored] = {
                key: self._initializer(name + key, tensor, storage)
                for key, (tensor, storage) in stored.tensors().items()
            }
        return self._stored[stored]

    def _initializer(self, name: str, tensor: Tensor, storage: str | None) -> ir.Value:
        import ml_dtypes

        array = tensor.cpu().numpy()
        if storage in ("int4", "uint4"):
            array = array.astype(getattr(ml_dtypes, storage))
        return add_initializer(self._graph, name, array)


def _is_float_matrix(x: ir.Value) -> bool:
    """Whether it has two dimensions and is not quantized."""
    producer = x.producer()
    quantized = producer is not None and producer.op_type == "DequantizeLinear"
    return not quantized and x.shape is not None and len(x.shape) == 2


class _Chain:
    """Nodes for the place of one, whose output's type and shape theirs have but where they say."""

    def __init__(self, node: ir.Node) -> None:
        self._output = node.outputs[0]
        assert self._output.dtype is not None
        self._dtype: ir.DataType = self._output.dtype
        self.nodes: list[ir.Node] = []

    def add(
        self,
        operator: str,
        inputs: Sequence[ir.Value],
        dtype: ir.DataType | None = None,
        attributes: Mapping[str, Any] | None = None,
    ) -> ir.Value:
        """A node with these inputs; its output."""
        import onnx_ir as ir

        node = ir.node(operator, inputs, attributes)
        node.outputs[0].dtype = dtype or self._dtype
        node.outputs[0].shape = self._output.shape
        self.nodes.append(node)
        return node.outputs[0]

    def cast(self, value: ir.Value, dtype: ir.DataType | None = None) -> ir.Value:
        """The value in ``dtype``, or that of the output."""
        dtype = dtype or self._dtype
        if value.dtype == dtype:
            return value
        return self.add("Cast", [value], dtype, {"to": dtype})


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
