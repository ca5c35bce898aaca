"""Places of quantizers of activations, as integer runtimes expect them.

On the input of every quantized layer, and on the shortcut of every residual addition: its other
operand is what a layer has just accumulated. A value is quantized once for all who read it.
Products of two activations, as in attention, stay as they are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Literal

from torch import nn

from adaround_ext.activations.residuals import Flow
from adaround_ext.tracing.trace import ModuleCall, OperatorCall, Trace, Value

Key = tuple[object, ...]
Kind = Literal["input", "output"]
KINDS: tuple[Kind, ...] = ("input", "output")


@dataclass(frozen=True)
class Site:
    """A hook: on the input or output of ``module``, a name, "" for the model itself.

    tensors: which of the tensors among its arguments, or in its output, in order; positional
    arguments come before keyword ones. They are one and the same value.
    """

    module: str
    kind: Kind
    tensors: tuple[int, ...] = (0,)

    @property
    def attribute(self) -> str:
        """What the module calls its quantizer."""
        return f"{self.kind}_quantizer" + (f"_{self.tensors[0]}" if self.tensors[0] else "")

    @property
    def name(self) -> str:
        """With the module's name."""
        return f"{self.module}.{self.attribute}".lstrip(".")


@dataclass(frozen=True)
class Place:
    """One quantizer: its sites, as in ``model.named_modules()``, and the ``readers`` of its values.

    readers: names of the layers, and of the modules that add them up, in the order they run.
    """

    sites: tuple[Site, ...]
    readers: tuple[str, ...]

    @property
    def name(self) -> str:
        """Of the quantizer: that of its first site."""
        return self.sites[0].name


@dataclass(frozen=True)
class Placement:
    """Places in the order in which they run, and what could not be placed."""

    places: tuple[Place, ...]
    notes: tuple[str, ...]


def place(model: nn.Module, trace: Trace, layers: Sequence[nn.Module]) -> Placement:
    """Places for the quantized ``layers`` of a traced model and its residual additions.

    Layers that read the same value share a quantizer, and so do all calls of a module. A shortcut
    is quantized where it enters the innermost module around all that reads it, so that layers in
    there need no quantizer of their own; else where it leaves the innermost module that made it;
    else not at all, and a note says so. Raises ValueError for layers that the model does not have.
    """
    return _Placer(model, trace, layers).placement()


class _Placer:
    def __init__(self, model: nn.Module, trace: Trace, layers: Sequence[nn.Module]) -> None:
        self._trace = trace
        self._names = {module: name for name, module in model.named_modules()}
        self._notes: list[str] = []
        self._arrivals: dict[tuple[Kind, Key], list[ModuleCall]] = defaultdict(list)
        for call in trace.calls:
            for kind in KINDS:
                for key in dict.fromkeys(_keys(call, kind)):
                    self._arrivals[kind, key].append(call)
        calls = []
        for layer in dict.fromkeys(layers):
            if layer not in self._names:
                raise ValueError(f"layers must be modules of the model, got {layer}")
            reads = [call for call in trace.calls_of(layer) if call.inputs]
            if not reads:
                self._notes.append(f"{self._names[layer]} did not run: its input has no quantizer")
            calls += reads
        self._reads: dict[Key, list[ModuleCall]] = defaultdict(list)
        for call in sorted(calls, key=lambda call: call.begin):
            self._reads[_key(call.inputs[0])].append(call)
        flow = Flow(trace, calls)
        self._sums: dict[Key, list[OperatorCall]] = defaultdict(list)
        self._times: dict[Key, int] = {}
        for operator in trace.operators:
            value = flow.shortcut(operator)
            if value is not None:
                self._sums[_key(value)].append(operator)
                self._times[_key(value)] = flow.time(value)

    def placement(self) -> Placement:
        sites: list[tuple[Site, set[Key]]] = []  # with all values that get there
        shortcuts = {key: self._of_shortcut(key) for key in self._sums}
        for key, shortcut in shortcuts.items():
            if shortcut is not None:
                sites.append(shortcut)
            else:
                operators = self._sums.pop(key)
                around = " and ".join(
                    self._around(operator) or "the model" for operator in operators
                )
                self._notes.append(
                    f"{around}: the shortcut of a residual addition is neither the "
                    "input of a module around all that reads it nor the output of a module that "
                    "made it; it is not quantized"
                )
        for key, calls in self._reads.items():
            for layer in dict.fromkeys(call.module for call in calls if key not in self._sums):
                site = Site(self._names[layer], "input")
                sites.append((site, self._arriving(layer, site.kind, site.tensors)))
        return Placement(self._places(sites), tuple(self._notes))

    def _of_shortcut(self, key: Key) -> tuple[Site, set[Key]] | None:
        times = [call.begin for call in self._reads.get(key, ())]
        times += [operator.time for operator in self._sums[key]]
        for kind in KINDS:
            for call in reversed(self._arrivals[kind, key]):  # inner ones first
                if kind == "input":
                    suits = all(call.spans(time) for time in times)
                else:
                    # Readers that hold what was changed in place would not see the hook's result.
                    in_place = key[0] in {value.storage for value in call.inputs}
                    suits = call.spans(self._times[key]) and call.end < min(times) and not in_place
                if not suits:
                    continue
                tensors = tuple(i for i, other in enumerate(_keys(call, kind)) if other == key)
                arriving = self._arriving(call.module, kind, tensors)
                # Of a module that runs several times all values must be shortcuts.
                if arriving and all(other in self._sums for other in arriving):
                    return Site(self._names[call.module], kind, tensors), arriving
        return None

    def _arriving(self, module: nn.Module, kind: Kind, tensors: tuple[int, ...]) -> set[Key]:
        """The values there, over all calls; none where a call has fewer tensors."""
        arriving = set()
        for call in self._trace.calls_of(module):
            keys = _keys(call, kind)
            if len(keys) <= max(tensors):
                return set()
            arriving |= {keys[i] for i in tensors}
        return arriving

    def _places(self, sites: list[tuple[Site, set[Key]]]) -> tuple[Place, ...]:
        """One for each set of sites that are connected by common values."""
        groups: list[tuple[set[Key], list[Site]]] = []
        for site, keys in sites:
            members = [site]
            for group in [group for group in groups if group[0] & keys]:
                groups.remove(group)
                keys, members = keys | group[0], group[1] + members
            groups.append((keys, members))
        order = {name: i for i, name in enumerate(self._names.values())}
        timed = []
        for keys, members in groups:
            tensors: dict[tuple[str, Kind], set[int]] = defaultdict(set)
            for site in members:
                tensors[site.module, site.kind].update(site.tensors)
            merged = [Site(*at, tensors=tuple(sorted(which))) for at, which in tensors.items()]
            merged.sort(key=lambda site: order[site.module])
            times = [(c.begin, self._names[c.module]) for k in keys for c in self._reads.get(k, ())]
            times += [(op.time, self._around(op)) for k in keys for op in self._sums.get(k, ())]
            readers = dict.fromkeys(name for _, name in sorted(times))
            timed.append((min(times), Place(tuple(merged), tuple(readers))))
        return tuple(item for _, item in sorted(timed, key=lambda pair: pair[0]))

    def _around(self, operator: OperatorCall) -> str:
        """The innermost module that an operator ran in."""
        around = [call for call in self._trace.calls if call.spans(operator.time)]
        return self._names[around[-1].module] if around else ""


def _keys(call: ModuleCall, kind: Kind) -> list[Key]:
    return [_key(value) for value in (call.inputs if kind == "input" else call.outputs)]


def _key(value: Value) -> Key:
    """Equal for the same elements, in whatever order and shape they are seen."""
    numel = prod(value.shape)
    dense = 1
    for stride, size in sorted(zip(value.stride, value.shape, strict=True)):
        if size != 1:
            if stride != dense:
                return value.storage, value.writes, value.offset, value.shape, value.stride
            dense *= size
    return value.storage, value.writes, value.offset, numel
