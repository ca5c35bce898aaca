"""Float graph: marked operators become float ones, whose tensors AIMET can put quantizers on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import nn

from adaround_ext.export.onnx.graph import add_initializer, index_of, without_weights_
from adaround_ext.export.onnx.trace import ACTIVATION, DOMAIN, LINEAR
from adaround_ext.export.quantized_layers import QuantizedLayer

if TYPE_CHECKING:
    import onnx_ir as ir


def operator_of(layer: nn.Module) -> str:
    """The operator that reads a layer's weight in a float graph."""
    if isinstance(layer, nn.Linear):
        return "MatMul"
    return "ConvTranspose" if isinstance(layer, nn.modules.conv._ConvTransposeNd) else "Conv"


class FloatGraph:
    """A marked onnx_ir model that has become a float one, in place.

    A Linear becomes MatMul, by its weight as [in, out], and Add; weights are initializers, named as
    in the model. A quantizer of activations just goes, where all that reads a tensor reads it
    through that quantizer; elsewhere it becomes Identity, so that what it gave is a tensor. Names
    in the result are those that values have when they are asked for.
    Raises ValueError where a weight is read by another operator than its layer's.
    """

    def __init__(self, model: ir.Model, layers: Sequence[QuantizedLayer]) -> None:
        from onnx_ir.passes import common

        self._graph, self._layers = model.graph, layers
        self._weights: dict[int, ir.Value] = {}
        self._activations: dict[ir.Value, int] = {}
        for node in without_weights_(model):
            if node.graph is None:  # nothing used its output, or another has stood for it
                continue
            if node.op_type == ACTIVATION:
                self._resolve_activation(node)
            elif node.op_type == LINEAR:
                self._resolve_linear(node)
            else:
                _replace(node, [], self._weight(index_of(node), transpose=False))
        common.RemoveUnusedOpsetsPass()(model)
        self._check_readers()

    def weights(self) -> dict[str, QuantizedLayer]:
        """The layers that the graph uses, by the names of their weights there."""
        return {str(value.name): self._layers[index] for index, value in self._weights.items()}

    def activations(self) -> dict[str, int]:
        """The numbers of quantizers, by the names of the tensors that they belong to."""
        return {str(value.name): index for value, index in self._activations.items()}

    def _check_readers(self) -> None:
        for index, value in self._weights.items():
            layer = self._layers[index]
            reader = operator_of(layer.module)
            uses = {(use.node.op_type, use.idx) for use in value.uses()}
            if uses != {(reader, 1)}:
                got = ", ".join(sorted(operator for operator, _ in uses))
                rule = f"the weight of {layer.name} must be read by {reader} as its weight"
                raise ValueError(f"{rule}, got {got}")

    def _resolve_linear(self, node: ir.Node) -> None:
        import onnx_ir as ir

        x, _, bias = (*node.inputs, None, None)[:3]  # those that are absent may be cut off
        output = node.outputs[0]
        nodes = [ir.node("MatMul", [x, self._weight(index_of(node), transpose=True)])]
        if bias is not None:
            nodes[0].outputs[0].name = f"{output.name}_without_bias"
            nodes.append(ir.node("Add", [nodes[0].outputs[0], bias]))
        for each in nodes:
            _describe(each.outputs[0], output)
        _replace(node, nodes, nodes[-1].outputs[0])

    def _resolve_activation(self, node: ir.Node) -> None:
        import onnx_ir as ir

        x, index = node.inputs[0], index_of(node)
        assert x is not None
        readers = [use.node for use in x.uses()]
        if (
            all(_quantizes(reader, index) for reader in readers)
            and not any(reader.outputs[0].is_graph_output() for reader in readers)
            and not (x.is_graph_output() or x.is_initializer() or x in self._activations)
        ):
            for reader in readers:
                _replace(reader, [], x)
            self._activations[x] = index
            return
        identity = ir.node("Identity", [x])
        identity.outputs[0].name = f"{x.name}_quantized"
        _describe(identity.outputs[0], node.outputs[0])
        _replace(node, [identity], identity.outputs[0])
        self._activations[identity.outputs[0]] = index

    def _weight(self, index: int, transpose: bool) -> ir.Value:
        """The initializer of a layer's weight."""
        if index not in self._weights:
            layer = self._layers[index]
            weight = layer.matrix.weight
            array = (weight.t() if transpose else weight).cpu().contiguous().numpy()
            name = f"{layer.name}.weight".lstrip(".")  # or another, where the model uses it too
            self._weights[index] = add_initializer(self._graph, name, array)
        return self._weights[index]


def _quantizes(node: ir.Node, index: int) -> bool:
    """Whether it is a mark of this quantizer."""
    return node.domain == DOMAIN and node.op_type == ACTIVATION and index_of(node) == index


def _replace(node: ir.Node, nodes: Sequence[ir.Node], value: ir.Value) -> None:
    """By nodes, the output of whose last is ``value``; without any, by a value that is there."""
    import onnx_ir as ir

    graph, output = node.graph, node.outputs[0]
    assert graph is not None
    if nodes:
        ir.convenience.replace_nodes_and_values(graph, node, [node], nodes, [output], [value])
    else:
        output.replace_all_uses_with(value)
        graph.remove(node, safe=True)


def _describe(value: ir.Value, like: ir.Value) -> None:
    """Gives a value the type and shape of another."""
    value.type, value.shape = like.type, like.shape
