"""Runs the model again and again up to some layers, with what is finished replaced by recordings.

A block whose layers are all done never runs again: its outputs were recorded, for each batch and
each stream, and stand for it, while the model's own code between the blocks runs as always.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext.blocks import BlockCall
from adaround_ext.cache import ActivationCache
from adaround_ext.calibration import Calibration
from adaround_ext.residence import Residence
from adaround_ext.trace import ModuleCall

Stream = Literal["full", "quantized"]
Context = Callable[[], AbstractContextManager[object]]


class _Stop(BaseException):
    """All was seen; not an Exception, so that no model's own handler stops it."""


@dataclass(frozen=True)
class _Given:
    """An output that is one of the call's own arguments; ``written`` if it was changed."""

    place: int
    written: bool


@dataclass(frozen=True)
class _Output:
    """A tensor: recorded, or no longer, where nothing reads it any more."""

    recorded: bool
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def blank(self) -> Tensor:
        empty = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=self.device)
        return empty.zero_()


@dataclass
class Watch:
    """What to take from some layers: tensors by layer, one a call."""

    inputs: frozenset[nn.Module] = frozenset()
    outputs: frozenset[nn.Module] = frozenset()
    taken: dict[Stream, dict[nn.Module, list[Tensor]]] = field(default_factory=dict)


class Replay:
    """One model on all calibration batches, block after block."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        calls: list[BlockCall],
        cache: ActivationCache,
        residence: Residence,
        common: int,
        seed: int,
    ) -> None:
        """common: how many leading calls give the same in all streams."""
        self._residence = residence
        self._model, self._calibration, self._cache, self._seed = model, calibration, cache, seed
        self._common = common
        self._calls = calls
        self._numbers = {(c.call.module, c.call.index): i for i, c in enumerate(calls)}
        self._templates: dict[tuple[Stream, int, int], tuple[list[Any], Any]] = {}
        self._recording: frozenset[int] = frozenset()
        self._needed: frozenset[int] = frozenset()
        self._ready = 0  # leading calls whose layers are all done, and that are recorded
        self._end = 0  # of the calls that this pass runs
        self._stream: Stream = "full"
        self._batch = 0
        self._seen: dict[nn.Module, int] = {}
        self.passes = 0

    def finished(self) -> set[nn.Module]:
        """The layers that will not run again."""
        ready = self._ready
        running = {m for c in self._calls[ready:] for m in c.layers}
        running |= {m for c in self._calls[:ready] if not c.replaceable for m in c.layers}
        return {m for c in self._calls[:ready] for m in c.layers} - running

    def _leading(self, waiting: set[nn.Module]) -> int:
        for index, call in enumerate(self._calls):
            if call.layers & waiting:
                return index
        return len(self._calls)

    def sweep(
        self,
        waiting: set[nn.Module],
        calls: Sequence[ModuleCall],
        streams: Mapping[Stream, tuple[Watch, Context]],
    ) -> Iterator[int]:
        """All batches through all streams, up to the last call that is watched.

        waiting: the layers that are not done. calls: of the layers that are watched. Yields each
        batch's number, when the watches hold what was taken. What is done by now is recorded on
        the way; of several blocks, as when a run is resumed, all but the last on own passes.
        """
        ready = self._leading(waiting)
        record = {stream: (Watch(), context) for stream, (_, context) in streams.items()}
        for index in range(self._ready + 1, ready):
            for _ in self._pass(index, index, {}, record):
                pass
        counts = {call.module: call.index + 1 for call in calls}  # the last of a module's counts
        until = max(call.end for call in calls)
        end = sum(c.call.begin < until for c in self._calls)
        yield from self._pass(ready, end, counts, streams)

    def _pass(
        self,
        ready: int,
        end: int,
        counts: Mapping[nn.Module, int],
        streams: Mapping[Stream, tuple[Watch, Context]],
    ) -> Iterator[int]:
        """One pass over all batches up to block call ``end``, the first ``ready`` recorded."""
        newly = range(self._ready, ready)
        self._end = end
        running = [c for c in self._calls[self._ready : end]]
        running += [c for c in self._calls[: self._ready] if not c.replaceable]
        self._residence.only(c.call.module for c in running)
        self._recording = frozenset(i for i in newly if self._calls[i].replaceable)
        users = [c for i, c in enumerate(self._calls) if i >= ready or not c.replaceable]
        self._needed = frozenset(i for c in users for i in c.needs)
        self.passes += len(streams)
        for batch in range(self._calibration.batches):
            for stream, (watch, context) in streams.items():
                with context():
                    watch.taken[stream] = self._run(batch, stream, watch, counts)
            yield batch
            for watch, _ in streams.values():
                watch.taken.clear()
        self._ready = ready
        self._forget()

    def _forget(self) -> None:
        """Drops the recordings that nothing needs, but for their shapes."""
        for key, (template, spec) in self._templates.items():
            if key[2] not in self._needed and key in self._cache:
                self._cache.drop(key)
                self._templates[key] = [_dropped(item) for item in template], spec

    def _run(
        self, batch: int, stream: Stream, watch: Watch, counts: Mapping[nn.Module, int]
    ) -> dict[nn.Module, list[Tensor]]:
        taken: dict[nn.Module, list[Tensor]] = defaultdict(list)
        left = {m: counts[m] for m in watch.inputs | watch.outputs}
        self._batch, self._stream, self._seen = batch, stream, defaultdict(int)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if module in watch.inputs:
                taken[module].append(_argument(args, kwargs).detach().clone())
            if module not in watch.outputs:
                count(module)

        def after(module: nn.Module, args: object, output: Tensor) -> None:
            taken[module].append(output.detach().clone())
            count(module)

        def count(module: nn.Module) -> None:
            left[module] -= 1
            if not any(n > 0 for n in left.values()):
                raise _Stop

        torch.manual_seed(self._seed + batch)  # both streams see the same draws
        with ExitStack() as hooks:
            for module in left:
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                if module in watch.outputs:
                    hooks.enter_context(module.register_forward_hook(after))
            hooks.enter_context(self._replaced())
            with suppress(_Stop):
                self._calibration.run(batch)
        return taken

    @contextmanager
    def _replaced(self) -> Iterator[None]:
        """Every block goes through :meth:`_call`."""
        modules = {c.call.module: c.call.module.__dict__.get("forward") for c in self._calls}
        try:
            for module in modules:
                module.forward = self._wrapped(module, module.forward)
            yield
        finally:
            for module, own in modules.items():
                module.__dict__.pop("forward", None)
                if own is not None:
                    module.forward = own

    def _wrapped(self, module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        def replaced(*args: Any, **kwargs: Any) -> Any:
            index = self._numbers.get((module, self._seen[module]))
            if index is not None and index >= self._end:
                raise _Stop
            key = self._key(-1 if index is None else index)
            if index is not None and key in self._templates:
                for inner, calls in self._calls[index].inside.items():
                    self._seen[inner] += calls
                return self._play(key, (args, kwargs))
            self._seen[module] += 1
            if index is None or index not in self._recording:
                return forward(*args, **kwargs)
            given = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
            versions = [_version(t) for t in given]
            output = forward(*args, **kwargs)
            self._record(key, output, given, versions)
            return self._cache.rounded(output)  # the same now as when it will be read

        return replaced

    def _key(self, index: int) -> tuple[Stream, int, int]:
        return ("full" if index < self._common else self._stream), self._batch, index

    def _record(
        self, key: tuple[Stream, int, int], output: Any, given: list[Tensor], versions: list[int]
    ) -> None:
        leaves, spec = pytree.tree_flatten(output)
        template: list[Any] = []
        kept: list[Tensor] = []
        for leaf in leaves:
            place = next((i for i, t in enumerate(given) if t is leaf), None)
            needed = isinstance(leaf, Tensor) and key[2] in self._needed
            if place is not None:
                written = needed and _version(leaf) != versions[place]
                template.append(_Given(place, written))
                kept += [leaf] if written else []
            elif isinstance(leaf, Tensor):
                template.append(_output(leaf, recorded=needed))
                kept += [leaf] if needed else []
            else:
                template.append(leaf)
        self._templates[key] = template, spec
        if kept:
            self._cache.put(key, kept)

    def _play(self, key: tuple[Stream, int, int], arguments: object) -> Any:
        template, spec = self._templates[key]
        given = [t for t in pytree.tree_leaves(arguments) if isinstance(t, Tensor)]
        kept = iter(self._cache.get(key) if key in self._cache else ())
        leaves: list[Any] = []
        for item in template:
            if isinstance(item, _Output):
                leaves.append(next(kept) if item.recorded else item.blank())
            elif isinstance(item, _Given):
                tensor = given[item.place]
                leaves.append(tensor.copy_(next(kept)) if item.written else tensor)
            else:
                leaves.append(item)
        return pytree.tree_unflatten(leaves, spec)


def _output(tensor: Tensor, recorded: bool) -> _Output:
    dense = torch.empty_like(tensor, device="meta")
    return _Output(recorded, tensor.shape, dense.stride(), tensor.dtype, tensor.device)


def _dropped(item: object) -> object:
    if isinstance(item, _Output):
        return dataclasses.replace(item, recorded=False)
    return dataclasses.replace(item, written=False) if isinstance(item, _Given) else item


def _version(tensor: object) -> int:
    return tensor._version if isinstance(tensor, Tensor) and not tensor.is_inference() else 0


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor that a layer is called with."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value
