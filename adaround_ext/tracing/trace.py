"""Trace of one run of a model: its modules and operators, in order, and the tensors they had.

Everything that must not depend on how a model is written is read from this: the order of its
layers, which of them share an input, what follows a layer, what a block's output is used for.
"""

from __future__ import annotations

import inspect
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from adaround_ext.tensors import tensors


@dataclass(frozen=True)
class Value:
    """A tensor as it was at some time: equal for the same memory, seen in the same way, with no
    write between."""

    storage: int  # a number a storage, never used twice
    writes: int  # into that storage so far
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    integral: bool = False  # integers or booleans, as indices are


@dataclass(frozen=True, eq=False)
class ModuleCall:
    """One call of a module. ``index`` counts this module's calls, from 0.

    repeats: the same call in traces of other batches, see :mod:`adaround_ext.tracing.merged`.
    """

    module: nn.Module
    index: int
    begin: int
    end: int
    inputs: tuple[Value, ...]  # all tensors among the arguments
    outputs: tuple[Value, ...]
    repeats: tuple[ModuleCall, ...] = ()

    @property
    def all_inputs(self) -> Iterator[Value]:
        """Of the call and its repeats."""
        for call in (self, *self.repeats):
            yield from call.inputs

    @property
    def all_outputs(self) -> Iterator[Value]:
        """Of the call and its repeats."""
        for call in (self, *self.repeats):
            yield from call.outputs

    def spans(self, time: int) -> bool:
        """Whether something that happened then was part of this call."""
        return self.begin < time < self.end


@dataclass(frozen=True, eq=False)
class OperatorCall:
    """One call of an ATen operator, as "aten.relu.default"."""

    name: str
    time: int
    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    arguments: tuple[Any, ...]  # those that are no tensors, in order
    written: tuple[int, ...]  # storages that it changed


@dataclass(frozen=True, eq=False)
class Trace:
    """A whole run; ``calls`` in the order in which they began."""

    calls: list[ModuleCall]
    operators: list[OperatorCall]
    outputs: tuple[Value, ...]
    born: dict[int, int]  # when a storage was first seen
    arguments: dict[int, str] = field(default_factory=dict)  # the model's, by storage
    constants: frozenset[int] = frozenset()  # storages of parameters and buffers

    @cached_property
    def _by_module(self) -> dict[nn.Module, list[ModuleCall]]:
        calls = defaultdict(list)
        for call in self.calls:
            calls[call.module].append(call)
        return calls

    @cached_property
    def _readers(self) -> dict[Value, list[OperatorCall]]:
        readers = defaultdict(list)
        for operator in self.operators:
            for value in dict.fromkeys(operator.inputs):
                readers[value].append(operator)
        return readers

    def calls_of(self, module: nn.Module) -> list[ModuleCall]:
        """All calls of a module, in order."""
        return self._by_module.get(module, [])

    def readers(self, value: Value) -> list[OperatorCall]:
        """The operators that took exactly this value, in order; views of it are operators too."""
        return self._readers.get(value, [])

    def only_reader(self, call: ModuleCall) -> OperatorCall | None:
        """The one operator that reads this call's one output, where the model does not return it.

        What runs inside the call itself is not counted.
        """
        if len(call.outputs) != 1 or call.outputs[0] in self.outputs:
            return None
        readers = [op for op in self.readers(call.outputs[0]) if op.time > call.end]
        return readers[0] if len(readers) == 1 else None


_unwatched: ContextVar[bool] = ContextVar("unwatched", default=False)


@contextmanager
def unwatched() -> Iterator[None]:
    """Inside, a trace sees nothing."""
    token = _unwatched.set(True)
    try:
        yield
    finally:
        _unwatched.reset(token)


_Begun = tuple[int, int, int, tuple[Value, ...]]  # a call's place, index, time and inputs


@dataclass
class _Recorder(TorchDispatchMode):
    """Numbers the storages and writes every event down."""

    root: nn.Module
    calls: list[ModuleCall | None] = field(default_factory=list)
    operators: list[OperatorCall] = field(default_factory=list)
    born: dict[int, int] = field(default_factory=dict)
    arguments: dict[int, str] = field(default_factory=dict)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # torch would import its dynamo, only to tell it that this is not to be compiled.
        return False

    def __post_init__(self) -> None:
        super().__init__()
        self._time = 0
        self._storages: dict[int, tuple[weakref.ref[Any], int]] = {}
        self._writes: dict[int, int] = defaultdict(int)
        self._count: dict[nn.Module, int] = defaultdict(int)
        self._open: dict[nn.Module, list[_Begun]] = defaultdict(list)
        state = (*self.root.parameters(), *self.root.buffers())
        self.constants = frozenset(self._serial(t) for t in tensors(state))

    def tick(self) -> int:
        self._time += 1
        return self._time

    def _serial(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        known = self._storages.get(id(storage))
        if known is not None and known[0]() is storage:
            return known[1]
        serial = len(self.born)
        self._storages[id(storage)] = (weakref.ref(storage), serial)
        self.born[serial] = self._time
        return serial

    def value(self, tensor: Tensor) -> Value:
        serial = self._serial(tensor)
        offset, shape = int(tensor.storage_offset()), tuple(tensor.shape)
        integral = not tensor.is_floating_point() and not tensor.is_complex()
        stride = tuple(tensor.stride())
        return Value(serial, self._writes[serial], offset, shape, stride, integral)

    def values(self, tree: object) -> tuple[Value, ...]:
        return tuple(self.value(t) for t in tensors(tree))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        # What prepares the model's inputs is no part of it.
        if not self.calls or _unwatched.get():
            return func(*args, **kwargs)
        leaves = pytree.tree_leaves((args, kwargs))
        inputs = self.values(leaves)
        result = func(*args, **kwargs)
        time = self.tick()
        written = []
        schema = func._schema.arguments
        named = zip(schema, args, strict=False)
        keyed = [(item, kwargs[item.name]) for item in schema if item.name in kwargs]
        for argument, given in (*named, *keyed):
            if argument.alias_info is not None and argument.alias_info.is_write:
                written += [self._serial(t) for t in tensors(given)]
        for serial in dict.fromkeys(written):
            self._writes[serial] += 1
        arguments = tuple(leaf for leaf in leaves if not isinstance(leaf, Tensor))
        outputs = self.values(result)
        call = OperatorCall(str(func), time, inputs, outputs, arguments, tuple(written))
        self.operators.append(call)
        return result

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        place, index = len(self.calls), self._count[module]
        self.calls.append(None)  # filled in when it ends
        self._count[module] += 1
        if module is self.root:
            for name, argument in _named(module, args, kwargs):
                for tensor in tensors(argument):
                    self.arguments.setdefault(self._serial(tensor), name)
        self._open[module].append((place, index, self.tick(), self.values((args, kwargs))))

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        place, index, begin, inputs = self._open[module].pop()
        outputs = self.values(output)
        self.calls[place] = ModuleCall(module, index, begin, self.tick(), inputs, outputs)


def _named(module: nn.Module, args: Any, kwargs: Any) -> Iterator[tuple[str, object]]:
    """A call's arguments by the names of the parameters that take them."""
    try:
        names = list(inspect.signature(module.forward).parameters)
    except (TypeError, ValueError):
        names = []
    names += [f"argument {place}" for place in range(len(names), len(args))]
    yield from zip(names, args, strict=False)
    yield from kwargs.items()


def trace(model: nn.Module, run: Callable[[], object]) -> Trace:
    """Watches ``run``, which calls the model once; hooks are gone afterwards, also on errors."""
    recorder = _Recorder(model)
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # takes no such hooks
                continue
            hooks.enter_context(
                module.register_forward_pre_hook(recorder.enter, with_kwargs=True, prepend=True)
            )
            hooks.enter_context(module.register_forward_hook(recorder.leave, with_kwargs=True))
        with recorder:
            output = run()
    calls = [call for call in recorder.calls if call is not None]
    outputs = recorder.values(output)
    born, named = recorder.born, recorder.arguments
    return Trace(calls, recorder.operators, outputs, born, named, recorder.constants)
