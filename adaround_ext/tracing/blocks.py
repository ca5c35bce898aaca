"""Blocks: the pieces of a model whose outputs are carried forward, so that no prefix runs twice."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase

from torch import nn

from adaround_ext.layers.matrix import SUPPORTED
from adaround_ext.tracing.evaluation import plain_module_name
from adaround_ext.tracing.trace import ModuleCall, Trace, Value

_MAX_LAYERS = 16  # of one block: a layer's statistics cost a run through half of its block
Blocks = Sequence[str | type[nn.Module]] | None


@dataclass(frozen=True, eq=False)
class BlockCall:
    """A call of a block, in execution order.

    needs: earlier block calls whose outputs reach this one's inputs by what runs between blocks.
    replaceable: whether its recorded outputs can stand for it: it writes to nothing that others
    read later.
    """

    name: str
    call: ModuleCall
    layers: frozenset[nn.Module]  # all Linear and convolution layers inside
    inside: dict[nn.Module, int]  # calls of blocks during this one, itself among them
    needs: frozenset[int]
    replaceable: bool


@dataclass
class _Taint:
    """Which block calls' outputs went into a storage; a superset: views are not told apart."""

    storages: dict[int, set[int]] = field(default_factory=lambda: defaultdict(set))
    decisions: set[int] = field(default_factory=set)  # read as Python numbers: they may steer all


def find_blocks(model: nn.Module, trace: Trace, blocks: Blocks) -> list[nn.Module]:
    """The modules that are carried forward: given by name pattern or type, or found.

    Found are the elements of lists (transformer layers, residual blocks) and other modules with few
    layers inside, from the outside in; layers outside of them are blocks of their own.
    """
    if blocks is None:
        return _blocks_within(model, trace, root=True)
    rule = "blocks must be a sequence of names, patterns or module types"
    if isinstance(blocks, str) or not isinstance(blocks, Iterable):
        raise TypeError(f"{rule}, got {blocks!r}")
    names = [(plain_module_name(name), m) for name, m in model.named_modules() if name]
    given: list[nn.Module] = []
    for block in blocks:
        if not isinstance(block, (str, type)):
            raise TypeError(f"{rule}, got {block!r} in it")
        if isinstance(block, str):
            pattern = plain_module_name(block)
            matches = [m for name, m in names if fnmatchcase(name, pattern)]
        else:
            matches = [m for _, m in names if isinstance(m, block)]
        if not matches:
            raise ValueError(f"blocks must name modules of the model, got {block!r}")
        given += [m for m in matches if trace.calls_of(m)]
    inside = {inner for m in given for inner in m.modules() if inner is not m}
    outer = [m for m in dict.fromkeys(given) if m not in inside]
    covered = {inner for m in outer for inner in m.modules()}
    return outer + [m for m in _layers(model) if m not in covered]


def _layers(module: nn.Module) -> list[nn.Module]:
    return [inner for inner in module.modules() if isinstance(inner, SUPPORTED)]


def _blocks_within(module: nn.Module, trace: Trace, root: bool = False) -> list[nn.Module]:
    """Blocks for a caller who gave none; ``root``: of the model itself, which is not to be one."""
    if isinstance(module, SUPPORTED):
        return [module]
    layers = _layers(module)
    if not layers:
        return []
    small = len(layers) <= _MAX_LAYERS and not _holds_blocks(module)
    if small and not root and trace.calls_of(module):
        return [module]
    return [block for child in module.children() for block in _blocks_within(child, trace)]


def _holds_blocks(module: nn.Module) -> bool:
    """Whether most of its layers are in lists of modules that have layers inside."""
    listed = 0
    for inner in module.modules():
        if isinstance(inner, (nn.ModuleList, nn.Sequential)):
            composite = [c for c in inner if not isinstance(c, SUPPORTED) and _layers(c)]
            if len(composite) > 1:
                listed += sum(len(_layers(c)) for c in composite)
    return 2 * listed > len(_layers(module))


def block_calls(model: nn.Module, trace: Trace, blocks: list[nn.Module]) -> list[BlockCall]:
    """Every call of a block that is not inside another one's, in order, and what it needs."""
    names = {module: plain_module_name(name) for name, module in model.named_modules()}
    calls: list[ModuleCall] = []
    modules = set(blocks)
    for call in trace.calls:
        if call.module in modules and not (calls and call.begin < calls[-1].end):
            calls.append(call)
    needs = _needs(trace, calls)
    layers, outside = _weights(trace)
    return [
        BlockCall(
            names[call.module],
            call,
            frozenset(_layers(call.module)),
            Counter(
                c.module
                for c in trace.calls
                if c.module in modules and call.begin <= c.begin < call.end
            ),
            frozenset(needs[index]),
            _replaceable(trace, call)
            # Else its weights must stay as they are quantized although it does not run.
            and not any(layers[m] & outside for m in call.module.modules() if m in layers),
        )
        for index, call in enumerate(calls)
    ]


def _weights(trace: Trace) -> tuple[dict[nn.Module, set[Value]], set[Value]]:
    """What layers read beside their inputs, and what is read of that by others than layers."""
    layers: dict[nn.Module, set[Value]] = {}
    times = [operator.time for operator in trace.operators]
    inner = [False] * len(times)
    for call in trace.calls:
        if isinstance(call.module, SUPPORTED):
            span = range(bisect_right(times, call.begin), bisect_left(times, call.end))
            read = {v for i in span for v in trace.operators[i].inputs} - set(call.all_inputs)
            read -= {v for i in span for v in trace.operators[i].outputs}
            layers[call.module] = layers.get(call.module, set()) | read
            for i in span:
                inner[i] = True
    outside = [op for op, in_layer in zip(trace.operators, inner, strict=True) if not in_layer]
    return layers, {value for op in outside for value in op.inputs}


def _needs(trace: Trace, calls: list[ModuleCall]) -> list[set[int]]:
    """Of each block call, the numbers of earlier ones whose outputs it depends on directly."""
    taint = _Taint()
    needs: list[set[int]] = []
    operators = iter(trace.operators)
    operator = next(operators, None)
    for index, call in enumerate(calls):
        while operator is not None and operator.time < call.begin:  # between blocks
            read = {k for value in operator.inputs for k in taint.storages[value.storage]}
            for storage in (*(v.storage for v in operator.outputs), *operator.written):
                taint.storages[storage] |= read
            if not operator.outputs:
                taint.decisions |= read
            operator = next(operators, None)
        while operator is not None and operator.time < call.end:
            operator = next(operators, None)
        inputs = {k for value in call.all_inputs for k in taint.storages[value.storage]}
        needs.append(inputs | taint.decisions)
        for value in call.all_outputs:
            taint.storages[value.storage] = {index} | taint.storages[value.storage]
    return needs


def _replaceable(trace: Trace, call: ModuleCall) -> bool:
    """Whether all that later operators read of a call is among its outputs."""
    inside = [op for op in trace.operators if call.spans(op.time)]
    read_later = {v.storage for op in trace.operators if op.time > call.end for v in op.inputs}
    outputs = {value.storage for value in call.all_outputs}
    new = {v.storage for op in inside for v in op.outputs if trace.born[v.storage] > call.begin}
    written = {s for op in inside for s in op.written if trace.born[s] < call.begin}
    # An input that was written to and is returned can be written again: recordings.py does.
    seen = {(v.storage, v.offset, v.shape, v.stride) for v in call.all_inputs}
    returned = {
        v.storage for v in call.all_outputs if (v.storage, v.offset, v.shape, v.stride) in seen
    }
    return not ((new - outputs) | (written - returned)) & read_later
