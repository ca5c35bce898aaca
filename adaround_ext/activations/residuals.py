"""Residual additions: recognised in the flow of the data, whatever a model calls them."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import defaultdict

from adaround_ext.tracing.trace import ModuleCall, OperatorCall, Trace, Value

_ADDITIONS = ("aten.add.Tensor", "aten.add_.Tensor")

Version = tuple[int, int]  # of a storage: its number, and the writes into it so far


def version(value: Value) -> Version:
    """What a value is a view of."""
    return value.storage, value.writes


def inputs_of_the_model(trace: Trace) -> list[Value]:
    """The tensors that calls from outside were given."""
    values: list[Value] = []
    end = -1
    for call in trace.calls:
        if call.begin > end:
            end = call.end
            values += call.inputs
    return values


class Flow:
    """What every value was computed from: a bit for each input of the model and each operator."""

    def __init__(self, trace: Trace, layers: list[ModuleCall]) -> None:
        first = list(dict.fromkeys(version(value) for value in inputs_of_the_model(trace)))
        self._ancestors = {value: 1 << bit for bit, value in enumerate(first)}  # and its own
        self._time = dict.fromkeys(first, 0)
        # What computed something from it, other than by addition.
        self._used: dict[Version, int] = defaultdict(int)
        self._from_outside = (1 << len(first)) - 1
        writes: dict[int, int] = defaultdict(int)
        for bit, operator in enumerate(trace.operators, len(first)):
            read = {version(value) for value in operator.inputs}
            before = 0
            for old in read:
                before |= self._ancestors.get(old, 0)
            written = {version(value) for value in operator.outputs}
            for storage in set(operator.written):
                writes[storage] += 1
                written.add((storage, writes[storage]))
            for new in written - read:  # what is in both is only viewed
                self._ancestors[new] = before | (1 << bit)
                self._time[new] = operator.time
            if written - read and operator.name not in _ADDITIONS:
                for old in read:
                    self._used[old] |= 1 << bit
        times = [operator.time for operator in trace.operators]
        self._layers = []  # the bits of each layer call's operators
        for call in layers:
            begin, end = bisect_right(times, call.begin), bisect_left(times, call.end)
            self._layers.append(((1 << end) - (1 << begin)) << len(first))

    def time(self, value: Value) -> int:
        """When an operator made it; 0 for inputs of the model, -1 for parameters and the like."""
        return self._time.get(version(value), -1)

    def shortcut(self, addition: OperatorCall) -> Value | None:
        """The operand that took the shorter way; None where this is no residual addition.

        It is one where both operands have the same shape and come from the model's input, where
        they do not come through the same quantized layers, and where the shorter way has such
        layers too or the longer one starts from its end (a mask that was added before does not
        count as that). So are neither the sums inside rotary embeddings and GELU, nor those with
        masks, position embeddings and biases. With equally many layers on both ways it is the
        operand that was made first.
        """
        if addition.name not in _ADDITIONS or len(addition.inputs) != 2:
            return None
        if addition.inputs[0].shape != addition.inputs[1].shape:
            return None
        ways = [self._ancestors.get(version(value), 0) for value in addition.inputs]
        if not all(way & self._from_outside for way in ways):
            return None
        alone = [self._layers_on(ways[0] & ~ways[1]), self._layers_on(ways[1] & ~ways[0])]
        if not any(alone):
            return None
        short = min((0, 1), key=lambda i: (alone[i], self.time(addition.inputs[i])))
        value = addition.inputs[short]
        leads_on = ways[1 - short] & self._used[version(value)]
        return value if leads_on or self._layers_on(ways[short]) else None

    def _layers_on(self, way: int) -> int:
        return sum(1 for layer in self._layers if way & layer)
