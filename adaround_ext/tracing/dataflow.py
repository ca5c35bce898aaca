"""Dataflow of a trace: which rows a layer's inputs hold, and who decided on them.

A layer's input is a list of rows: tokens, samples, pixels. Two runs of a model whose weights differ
a little give a layer the same rows where the model's code decides on them, and perhaps others where
its data do: experts, top-k, sorting, sampled tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from adaround_ext.layers.matrix import SUPPORTED
from adaround_ext.tracing.trace import ModuleCall, OperatorCall, Trace, Value

# What gives a tensor's rows in another order or in part, though it takes no indices.
_ORDERING = {"sort", "topk", "msort", "kthvalue"}
# What tells Python about a tensor's values: afterwards the model's code may be another.
_READING = {"_local_scalar_dense", "equal", "is_nonzero"}
# What only hands its operand on.
_HANDING_ON = {"lift_fresh", "detach", "alias", "clone", "_to_copy", "view", "reshape", "copy"}
# What has a bias before the operand that its rows come from.
_BIASED = {"addmm", "baddbmm", "addbmm", "addmv"}


@dataclass
class Dataflow:
    """chosen: storages whose rows depend on values that quantization changes. inputs: by storage,
    the model's arguments whose positions its rows are; several where they were added up, none where
    it cannot be told."""

    chosen: set[int] = field(default_factory=set)
    inputs: dict[int, frozenset[str]] = field(default_factory=dict)

    def chooses_rows(self, call: ModuleCall) -> bool:
        """Whether the data decided which rows this call gets."""
        return any(value.storage in self.chosen for value in call.all_inputs)

    def arguments(self, call: ModuleCall) -> frozenset[str]:
        """The model's arguments whose positions are those of the call's rows."""
        return frozenset().union(*(self._inputs(value) for value in call.all_inputs))

    def _inputs(self, value: Value) -> frozenset[str]:
        return self.inputs.get(value.storage, frozenset())


def dataflow(trace: Trace) -> Dataflow:
    """Follows a run's tensors operator by operator; views are not told from what they are of."""
    flow = Dataflow()
    for storage, name in trace.arguments.items():
        flow.inputs[storage] = frozenset({name})
    known = {*trace.arguments, *trace.constants}
    # What depends on the layers that are to be quantized.
    active = {
        value.storage
        for call in trace.calls
        if isinstance(call.module, SUPPORTED)
        for value in call.all_outputs
    }
    computed: set[int] = set()
    begun = values_read = False  # of what depends on those layers

    def is_foreign(value: Value) -> bool:
        return (
            value.integral
            and bool(value.shape)
            and not (value.storage in known or value.storage in computed)
        )

    for operator in trace.operators:
        read = [value.storage for value in operator.inputs]
        changed = {*(value.storage for value in operator.outputs), *operator.written}
        begun |= bool(changed & active)
        depends = any(storage in active for storage in read)
        name = operator.name.split(".")[1]
        values_read |= depends and name in _READING
        chosen = any(storage in flow.chosen for storage in read) or (values_read and depends)
        if not chosen and not _is_pointwise(operator) and _picks(operator, name):
            # Indices that come from nowhere were made in Python or NumPy, perhaps of activations.
            foreign = begun and any(map(is_foreign, operator.inputs))
            picked = any(v.integral and v.storage in active for v in operator.inputs)
            chosen = foreign or picked or (depends and name in _ORDERING)
        rows = _rows_of(operator, name, flow)
        for storage in changed:
            if depends:
                active.add(storage)
            if chosen:
                flow.chosen.add(storage)
            if rows:
                flow.inputs[storage] = flow.inputs.get(storage, frozenset()) | rows
        if name not in _HANDING_ON or not any(map(is_foreign, operator.inputs)):
            computed |= changed
    return flow


def _picks(operator: OperatorCall, name: str) -> bool:
    """Whether it may take rows by indices: what gives indices again is followed further."""
    return name not in _HANDING_ON and not all(value.integral for value in operator.outputs)


def _rows_of(operator: OperatorCall, name: str, flow: Dataflow) -> frozenset[str]:
    """The arguments whose positions the outputs' rows are: of a product the first factor's, of what
    is computed value by value those of all operands."""
    operands = [flow.inputs.get(value.storage, frozenset()) for value in operator.inputs]
    if _is_pointwise(operator) or name in ("cat", "stack"):
        return frozenset().union(*operands)
    if name in _BIASED:
        operands = operands[1:]
    if name == "embedding":
        operands = operands[1:]  # behind the weights
    return next((rows for rows in operands if rows), frozenset())


_POINTWISE: dict[str, bool] = {}


def _is_pointwise(operator: OperatorCall) -> bool:
    """Whether each value of the output comes from the values in its place."""
    if operator.name not in _POINTWISE:
        try:
            library, name, overload = operator.name.split(".")
            packet = getattr(getattr(torch.ops, library), name)
            _POINTWISE[operator.name] = torch.Tag.pointwise in getattr(packet, overload).tags
        except (AttributeError, ValueError):
            _POINTWISE[operator.name] = False
    return _POINTWISE[operator.name]


def same_positions(trace: Trace, flow: Dataflow) -> list[frozenset[str]]:
    """The model's arguments, those together that are of the same positions, in their order."""
    groups: list[frozenset[str]] = []
    for name in dict.fromkeys(trace.arguments.values()):
        groups.append(frozenset({name}))
    for rows in set(flow.inputs.values()):
        touched = [group for group in groups if group & rows]
        if len(touched) > 1:
            place = groups.index(touched[0])
            groups = [group for group in groups if group not in touched]
            groups.insert(place, frozenset().union(*touched))
    return groups
