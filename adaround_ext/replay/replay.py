"""Runs the model again and again up to some layers, with what is finished replaced by recordings.

A block whose layers are all done never runs again: its outputs were recorded, for each batch and
each stream, and stand for it, while the model's own code between the blocks runs as always. Where
that turns out to change what the model does, everything runs again for every layer instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NoReturn

from torch import Tensor, nn

from adaround_ext.replay.cache import ActivationCache
from adaround_ext.replay.calibration import Calibration
from adaround_ext.replay.census import Census, input_checksums
from adaround_ext.replay.checksums import InputChecksums
from adaround_ext.replay.onload import Onloader
from adaround_ext.replay.recordings import Recordings, Stream, other_forwards
from adaround_ext.replay.reuse import BlockReuse, StreamTargets
from adaround_ext.tensors import tensors
from adaround_ext.tracing.blocks import BlockCall
from adaround_ext.tracing.trace import ModuleCall

Context = Callable[[], AbstractContextManager[object]]


class _Stop(BaseException):
    """All was seen; not an Exception, so that no model's own handler stops it."""


@dataclass
class Watch:
    """What to take from some layers: tensors by layer, one a call."""

    inputs: frozenset[nn.Module] = frozenset()
    outputs: frozenset[nn.Module] = frozenset()
    taken: dict[Stream, dict[nn.Module, list[Tensor]]] = field(default_factory=dict)

    @property
    def layers(self) -> frozenset[nn.Module]:
        """All that something is taken from."""
        return self.inputs | self.outputs


class Replay:
    """One model on all calibration batches, block after block."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        calls: list[BlockCall],
        cache: ActivationCache,
        onloader: Onloader,
        common: int,
        seed: int,
        census: Census,
        units: Sequence[StreamTargets] = (),
        first: InputChecksums | None = None,
    ) -> None:
        """common: how many leading calls give the same in all streams. census: made by the first
        pass. units: all that are to be fitted to two streams, in execution order. first: of an
        earlier run of the first batch, None where that was on another device."""
        self._onloader = onloader
        self._model, self._calibration, self._cache, self._seed = model, calibration, cache, seed
        self._calls = calls
        self._numbers = {(c.call.module, c.call.index): i for i, c in enumerate(calls)}
        self._recordings = Recordings(cache, common)
        self._recording: frozenset[int] = frozenset()
        self._reuse = BlockReuse(cache, units, calls)
        self._ready = 0  # leading calls whose layers are all done, and that are recorded
        self._open = 0  # the call that this pass runs in part
        self._end = 0  # of the calls that this pass runs
        self._awaited: int | None = None  # a call to the end of which this run still has to come
        self._ran: set[Stream] = set()  # in this pass
        self._left: dict[nn.Module, int] = {}  # calls that this run still has to see, by module
        self._stream: Stream = "full"
        self._batch = 0
        self._seen: dict[nn.Module, int] = {}
        self._last = -1  # of the calls in this run
        self._depth = 0  # blocks that are running
        self._waiting: set[nn.Module] = set()
        self.census = census
        self._first = first
        self._running: Sequence[BlockCall] = calls  # in this pass
        self._reference = False  # this pass makes the census
        self._trouble = ""
        self.diverged = ""  # why recordings cannot stand for blocks, if they cannot
        self.passes = 0

    def notes(self) -> list[str]:
        """What whoever reads the result should know of the walk."""
        if not self.diverged:
            return []
        return [
            "the model ran from its start for every layer, as recorded outputs cannot stand "
            f"for blocks that are done: {self.diverged}"
        ]

    def finished(self) -> set[nn.Module]:
        """The layers that will not run again."""
        if self.diverged:
            return set()
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
        self._waiting = waiting
        ready = self._leading(waiting)
        record = {stream: (Watch(), context) for stream, (_, context) in streams.items()}
        for index in range(self._ready + 1, ready):
            if self.diverged:
                break
            self._reuse.enter(None, waiting)
            for _ in self._pass(index, index, {}, record):
                pass
        until = max(call.end for call in calls)
        end = sum(c.call.begin < until for c in self._calls)
        if not self.diverged:
            self._reuse.enter(self._calls[ready] if ready < len(self._calls) else None, waiting)
        yield from self._pass(ready, end, _counts(calls), streams)

    def _pass(
        self,
        ready: int,
        end: int,
        counts: Mapping[nn.Module, int],
        streams: Mapping[Stream, tuple[Watch, Context]],
    ) -> Iterator[int]:
        """One pass over all batches up to block call ``end``, the first ``ready`` recorded."""
        newly = range(self._ready, ready)
        # Once all runs as far as it goes, to see what every layer gets.
        self._reference = self.passes == 0
        self._open, self._end = ready, end
        running = [c for c in self._calls[self._ready : end]]
        running += [c for c in self._calls[: self._ready] if not c.replaceable]
        self._running = self._calls if self.diverged else running
        self._recording = frozenset(i for i in newly if self._calls[i].replaceable)
        users = [c for i, c in enumerate(self._calls) if i >= ready or not c.replaceable]
        self._recordings.needed = frozenset(i for c in users for i in c.needs)
        self._ran.clear()
        for batch in self._calibration.local_batches:
            self._streams(batch, counts, streams)
            if self._trouble and not self.diverged:
                self.give_up(self._trouble)
                self._streams(batch, counts, streams)  # as if there had never been recordings
            if self._reference and batch == self._calibration.local_batches[0]:
                self._check_repeats(batch, streams["full"][1])
            yield batch
            for watch, _ in streams.values():
                watch.taken.clear()
        self.passes += len(self._ran)
        self._ready = ready
        self._recordings.forget()
        self._reuse.leave()

    def _streams(
        self,
        batch: int,
        counts: Mapping[nn.Module, int],
        streams: Mapping[Stream, tuple[Watch, Context]],
    ) -> None:
        for stream, (watch, context) in streams.items():
            taken = self._taken_before(batch, watch, counts) if stream == "full" else None
            if taken is None:
                self._ran.add(stream)
                self._onloader.only(c.call.module for c in self._running)
                with context():
                    taken = self._run(batch, stream, watch, counts)
            watch.taken[stream] = taken

    def _taken_before(
        self, batch: int, watch: Watch, counts: Mapping[nn.Module, int]
    ) -> dict[nn.Module, list[Tensor]] | None:
        """What this pass wants of the full-precision stream, where no run is needed for it."""
        recorded = all(self._recordings.has("full", batch, index) for index in self._recording)
        if self._reference or not recorded or not watch.layers:
            return None
        return self._reuse.take(batch, watch.layers, counts)

    def _check_repeats(self, batch: int, context: Context) -> None:
        """What differs between two runs of one batch, where two streams are to be compared."""
        if not self._reuse.units:
            return
        first = self._first if batch == 0 else None
        second = self.census.checksums
        if self._cache.rounds and self._recording:  # the census saw rounded outputs
            second = self._checksums_of(batch, context)
        first = first or self._checksums_of(batch, context)
        differing = first.differing(second, batch)
        if differing:  # another thread of the process may have drawn random numbers meanwhile
            again = self._checksums_of(batch, context)
            differing &= again.differing(self._checksums_of(batch, context), batch)
        self.census.unrepeatable |= differing

    def _checksums_of(self, batch: int, context: Context) -> InputChecksums:
        with input_checksums(self._model, batch) as sums, context(), self._onloader.while_running():
            self._calibration.run(batch, self._seed + batch)
        return sums

    def give_up(self, trouble: str) -> None:
        """From now on nothing is replaced. The batches before were as they should be."""
        self.diverged = trouble
        self._running = self._calls
        self._recordings.clear()
        self._reuse.clear()

    def _stop(self, trouble: str) -> NoReturn:
        self._trouble = trouble
        raise _Stop

    def _run(
        self, batch: int, stream: Stream, watch: Watch, counts: Mapping[nn.Module, int]
    ) -> dict[nn.Module, list[Tensor]]:
        taken: dict[nn.Module, list[Tensor]] = defaultdict(list)
        watched = watch.layers
        later = [unit for unit in self._reuse.open if not unit.members & watched]
        ahead = later if stream == "full" and self._reuse.has_room else []
        inputs = watch.inputs.union(*(unit.inputs for unit in ahead))
        outputs = watch.outputs.union(*(unit.outputs for unit in ahead))
        counts = dict(counts) | _counts(call for unit in ahead for call in unit.calls)
        left = self._left = {m: counts.get(m, 0) for m in inputs | outputs}
        sees_all = stream == "full" and len(ahead) == len(later)  # what the open units want
        self._awaited = self._to_record(batch) if sees_all else None
        self._batch, self._stream, self._seen = batch, stream, defaultdict(int)
        self._last, self._depth = -1, 0
        self._recordings.next_run()
        whole = self._reference and stream == "full"
        times: dict[nn.Module, int] = defaultdict(int)

        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if stream == "full":
                self._compare(module, times[module], next(tensors((args, kwargs)), None))
            if module in inputs:
                take(module, _argument(args, kwargs))
            if module not in outputs:
                count(module)

        def after(module: nn.Module, args: object, output: Tensor) -> None:
            take(module, output)
            count(module)

        def take(module: nn.Module, value: Tensor) -> None:
            if module in watched:
                taken[module].append(value.detach().clone())
            else:
                self._reuse.keep(batch, module, times[module], value)

        def count(module: nn.Module) -> None:
            times[module] += 1
            left[module] = left.get(module, 0) - 1
            if not whole:
                self._stop_if_done()

        if whole:
            self.census.begin(batch)
        with ExitStack() as hooks:
            for module in {**left, **dict.fromkeys(self.census.layers if whole else ())}:
                hooks.enter_context(module.register_forward_pre_hook(before, with_kwargs=True))
                if module in outputs:
                    hooks.enter_context(module.register_forward_hook(after))
            if whole:
                hooks.enter_context(self._onloader.while_running())
            if not self.diverged:
                hooks.enter_context(self._replaced(whole))
                if stream == "quantized":
                    hooks.enter_context(self._reuse.playing(batch))
            with suppress(_Stop):
                self._calibration.run(batch, self._seed + batch)  # the same draws in both streams
        return taken

    def _to_record(self, batch: int) -> int | None:
        """The open block, if its full-precision outputs can be recorded: they will not change."""
        members = frozenset().union(*(unit.members for unit in self._reuse.open))
        if not members or self._recordings.has("full", batch, self._open):
            return None
        block = self._calls[self._open]
        return self._open if block.replaceable and block.layers & self._waiting <= members else None

    def _stop_if_done(self) -> None:
        if self._awaited is None and not any(n > 0 for n in self._left.values()):
            raise _Stop

    def _compare(self, layer: nn.Module, call: int, x: Tensor | None) -> None:
        batch = self._batch
        if self._reference:
            self.census.note(batch, layer, call, x)
            return
        noted = self.diverged or x is None or self.census.checksums.same(batch, layer, call, x)
        if not noted:
            self._stop(f"{self.census.layers[layer]} gets other inputs then in batch {batch}")

    def _replaced(self, whole: bool) -> AbstractContextManager[None]:
        """Every block goes through :meth:`_wrapped`; ``whole``: also those behind the last one."""
        modules = [call.call.module for call in self._calls]
        return other_forwards(modules, partial(self._wrapped, whole))

    def _wrapped(
        self, whole: bool, module: nn.Module, forward: Callable[..., Any]
    ) -> Callable[..., Any]:
        def live(*args: Any, **kwargs: Any) -> Any:
            self._depth += 1
            try:
                return forward(*args, **kwargs)
            finally:
                self._depth -= 1

        def replaced(*args: Any, **kwargs: Any) -> Any:
            index = self._numbers.get((module, self._seen[module]))
            self._check_order(module, index)
            if index is not None and index >= self._end and not whole:
                raise _Stop
            if index is not None and index < self._open and self._recorded(index):
                for inner, calls in self._calls[index].inside.items():
                    self._seen[inner] += calls
                return self._recordings.play(self._stream, self._batch, index, (args, kwargs))
            self._seen[module] += 1
            if index is None or (index not in self._recording and index != self._awaited):
                return live(*args, **kwargs)
            output = self._recordings.record(self._stream, self._batch, index, live, args, kwargs)
            if index == self._awaited:
                self._awaited = None
                if not whole:
                    self._stop_if_done()
            return output

        return replaced

    def _check_order(self, module: nn.Module, index: int | None) -> None:
        """That a batch takes the way that the first one took, or leaves out a part of it."""
        if index is None and self._depth:  # inside a block that runs
            return
        if index is not None and index > self._last and not self._depth:
            self._last = index
            done = index < self._ready and self._calls[index].replaceable
            if not done or self._recorded(index):
                return
        name = next(c.name for c in self._calls if c.call.module is module)
        trouble = f"{name} is called in another order or more often in batch {self._batch}"
        if not self._reference:
            self._stop(trouble)
        self._trouble = trouble  # when the census has seen the whole run

    def _recorded(self, index: int) -> bool:
        return self._recordings.has(self._stream, self._batch, index)


def _counts(calls: Iterable[ModuleCall]) -> dict[nn.Module, int]:
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
