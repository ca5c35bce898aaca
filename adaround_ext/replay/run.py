"""Runs of the model in which finished blocks are replaced by recordings, and passes of runs."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

from adaround_ext.replay.recordings import Stream, other_forwards
from adaround_ext.replay.walk import Context, Walk
from adaround_ext.tensors import tensors
from adaround_ext.tracing.blocks import BlockCall
from adaround_ext.tracing.trace import ModuleCall

Taken = dict[nn.Module, list[Tensor]]  # a tensor a call


@dataclass
class Watch:
    """What to take from some layers: tensors by layer, one a call."""

    inputs: frozenset[nn.Module] = frozenset()
    outputs: frozenset[nn.Module] = frozenset()
    taken: dict[Stream, Taken] = field(default_factory=dict)

    @property
    def layers(self) -> frozenset[nn.Module]:
        """All that something is taken from."""
        return self.inputs | self.outputs


class Pass:
    """All batches through all streams, one after the other.

    The leading block calls, up to ``open``, are done: they were recorded, or are now
    (``recording``). Those from there to ``end`` run, and none behind them.
    """

    def __init__(
        self,
        walk: Walk,
        open_call: int,
        end: int,
        waiting: set[nn.Module],
        counts: Mapping[nn.Module, int],
        streams: Mapping[Stream, tuple[Watch, Context]],
        reference: bool,
    ) -> None:
        """waiting: the layers that are not done. counts: of each watched layer the calls up to the
        last one that is needed. reference: all runs as far as it goes, and makes the census."""
        self.walk, self.open, self.end = walk, open_call, end
        self.waiting, self.counts, self.reference = waiting, counts, reference
        self.ran: set[Stream] = set()  # at least once
        self.streams = streams
        calls, ready = walk.calls, walk.ready
        running = [*calls[ready:end], *(c for c in calls[:ready] if not c.replaceable)]
        self._running: list[BlockCall] = running
        self.recording = frozenset(i for i in range(ready, open_call) if calls[i].replaceable)
        readers = [c for i, c in enumerate(calls) if i >= open_call or not c.replaceable]
        walk.recordings.needed = frozenset(index for call in readers for index in call.needs)

    def run(self, batch: int) -> None:
        """The watches get what is to be taken of a batch; twice where recordings do not stand for
        their blocks, then without any."""
        trouble = self._run_streams(batch)
        if trouble and not self.walk.diverged:
            self.walk.give_up(trouble)
            self._run_streams(batch)  # as if there had never been recordings

    def clear(self) -> None:
        """The watches forget what was taken."""
        for watch, _ in self.streams.values():
            watch.taken.clear()

    def _run_streams(self, batch: int) -> str:
        """What is wrong with the runs, "" if nothing is."""
        trouble = ""
        for stream, (watch, context) in self.streams.items():
            taken = self._reused(batch, watch) if stream == "full" else None
            if taken is None:
                self.ran.add(stream)
                running = self.walk.calls if self.walk.diverged else self._running
                self.walk.onloader.only(call.call.module for call in running)
                with context():
                    run = Run(self, batch, stream, watch)
                    taken = run.take()
                trouble = run.trouble or trouble
            watch.taken[stream] = taken
        return trouble

    def _reused(self, batch: int, watch: Watch) -> Taken | None:
        """What is to be taken of the full-precision stream, where no run is needed for it."""
        recorded = all(self.walk.recordings.has("full", batch, index) for index in self.recording)
        if self.reference or not recorded or not watch.layers:
            return None
        return self.walk.reuse.take(batch, watch.layers, self.counts)

    def call_to_record(self, batch: int) -> int | None:
        """The open block call, if its full-precision outputs can be recorded: they will not
        change."""
        members = frozenset().union(*(unit.members for unit in self.walk.reuse.open))
        if not members or self.walk.recordings.has("full", batch, self.open):
            return None
        block = self.walk.calls[self.open]
        return self.open if block.replaceable and block.layers & self.waiting <= members else None


class _Stop(BaseException):
    """All was seen; not an Exception, so that no model's own handler stops it."""


class Run:
    """The model on one batch in one stream, up to where all was seen that is to be taken.

    Its methods are the hooks of layers and the forwards of blocks meanwhile. ``trouble`` says what
    the model does that recordings do not go with.
    """

    def __init__(self, in_pass: Pass, batch: int, stream: Stream, watch: Watch) -> None:
        self._pass, self._walk = in_pass, in_pass.walk
        self._batch, self._stream = batch, stream
        self._watched = watch.layers
        self.trouble = ""
        reuse = self._walk.reuse
        later = [unit for unit in reuse.open if not unit.members & self._watched]
        ahead = later if stream == "full" and reuse.has_room else []
        self._inputs = watch.inputs.union(*(unit.inputs for unit in ahead))
        self._outputs = watch.outputs.union(*(unit.outputs for unit in ahead))
        counts = {**in_pass.counts, **call_counts(c for unit in ahead for c in unit.calls)}
        # Calls that are still to be seen, by layer, and a block call that is still to be recorded.
        self._unseen = {m: counts.get(m, 0) for m in self._inputs | self._outputs}
        takes_all = stream == "full" and len(ahead) == len(later)  # what the open units need
        self._awaited = in_pass.call_to_record(batch) if takes_all else None
        # Also what is behind the last block, and all layers.
        self._whole = in_pass.reference and stream == "full"
        self._layer_calls: dict[nn.Module, int] = defaultdict(int)  # so far
        self._block_calls: dict[nn.Module, int] = defaultdict(int)
        self._latest = -1  # of the block calls
        self._depth = 0  # blocks that are running
        self._taken: Taken = defaultdict(list)

    def take(self) -> Taken:
        """Runs the model; what was watched of it."""
        walk = self._walk
        walk.recordings.next_run()
        if self._whole:
            walk.census.begin(self._batch)
        with ExitStack() as hooks:
            layers = {**self._unseen, **dict.fromkeys(walk.census.layers if self._whole else ())}
            for layer in layers:
                handle = layer.register_forward_pre_hook(self._before_layer, with_kwargs=True)
                hooks.enter_context(handle)
                if layer in self._outputs:
                    hooks.enter_context(layer.register_forward_hook(self._after_layer))
            if self._whole:
                hooks.enter_context(walk.onloader.while_running())
            if not walk.diverged:
                modules = [call.call.module for call in walk.calls]
                hooks.enter_context(other_forwards(modules, self._forward_of_block))
                if self._stream == "quantized":
                    hooks.enter_context(walk.reuse.playing(self._batch))
            with suppress(_Stop):
                walk.run_model(self._batch)  # the same draws in both streams
        return self._taken

    def _before_layer(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._stream == "full":
            self._compare(layer, next(tensors((args, kwargs)), None))
        if layer in self._inputs:
            self._take(layer, _argument(args, kwargs))
        if layer not in self._outputs:
            self._count(layer)

    def _after_layer(self, layer: nn.Module, args: object, output: Tensor) -> None:
        self._take(layer, output)
        self._count(layer)

    def _compare(self, layer: nn.Module, x: Tensor | None) -> None:
        """That a layer of the full-precision stream gets what it got in the first pass."""
        census, call = self._walk.census, self._layer_calls[layer]
        if self._pass.reference:
            census.note(self._batch, layer, call, x)
            return
        if self._walk.diverged or x is None:
            return
        if not census.checksums.same(self._batch, layer, call, x):
            self._stop(f"{census.layers[layer]} gets other inputs then in batch {self._batch}")

    def _take(self, layer: nn.Module, value: Tensor) -> None:
        if layer in self._watched:
            self._taken[layer].append(value.detach().clone())
        else:
            self._walk.reuse.keep(self._batch, layer, self._layer_calls[layer], value)

    def _count(self, layer: nn.Module) -> None:
        self._layer_calls[layer] += 1
        self._unseen[layer] = self._unseen.get(layer, 0) - 1
        self._stop_if_done()

    def _stop_if_done(self) -> None:
        if self._whole or self._awaited is not None:
            return
        if not any(count > 0 for count in self._unseen.values()):
            raise _Stop

    def _stop(self, trouble: str) -> NoReturn:
        self.trouble = trouble
        raise _Stop

    def _forward_of_block(
        self, module: nn.Module, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            return self._call_block(module, partial(self._run_block, forward), args, kwargs)

        return call

    def _run_block(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        self._depth += 1
        try:
            return forward(*args, **kwargs)
        finally:
            self._depth -= 1

    def _call_block(
        self,
        module: nn.Module,
        run: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """Plays the call, runs it, or runs and records it."""
        recordings, key = self._walk.recordings, (self._stream, self._batch)
        index = self._walk.number_of(module, self._block_calls[module])
        self._check_order(module, index)
        if index is not None and index >= self._pass.end and not self._whole:
            raise _Stop
        if index is not None and index < self._pass.open and self._is_recorded(index):
            for inner, calls in self._walk.calls[index].inside.items():
                self._block_calls[inner] += calls
            return recordings.play(*key, index, (args, kwargs))
        self._block_calls[module] += 1
        if index is None or (index not in self._pass.recording and index != self._awaited):
            return run(*args, **kwargs)
        output = recordings.record(*key, index, run, args, kwargs)
        if index == self._awaited:
            self._awaited = None
            self._stop_if_done()
        return output

    def _check_order(self, module: nn.Module, index: int | None) -> None:
        """That a batch takes the way that the first one took, or leaves out a part of it."""
        if index is None and self._depth:  # inside a block that runs
            return
        calls = self._walk.calls
        if index is not None and index > self._latest and not self._depth:
            self._latest = index
            done = index < self._walk.ready and calls[index].replaceable
            if not done or self._is_recorded(index):
                return
        name = next(c.name for c in calls if c.call.module is module)
        trouble = f"{name} is called in another order or more often in batch {self._batch}"
        if not self._pass.reference:
            self._stop(trouble)
        self.trouble = trouble  # when the census has seen the whole run

    def _is_recorded(self, index: int) -> bool:
        return self._walk.recordings.has(self._stream, self._batch, index)


def call_counts(calls: Iterable[ModuleCall]) -> dict[nn.Module, int]:
    """How often each module is called up to its last of these calls."""
    counts: dict[nn.Module, int] = {}
    for call in calls:
        counts[call.module] = max(counts.get(call.module, 0), call.index + 1)
    return counts


def _argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one tensor that a layer is called with."""
    value = args[0] if args else next(iter(kwargs.values()))
    assert isinstance(value, Tensor)
    return value
