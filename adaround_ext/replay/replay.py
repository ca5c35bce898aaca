"""Replay: which passes of a model, up to which layers, with finished blocks replaced (run.py).

A block whose layers are all done never runs again: its outputs were recorded, for each batch and
each stream, and stand for it, while the model's own code between the blocks runs as always. Where
that turns out to change what the model does, everything runs again for every layer instead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import nn

from adaround_ext.replay.cache import ActivationCache
from adaround_ext.replay.calibration import Calibration
from adaround_ext.replay.census import Census, input_checksums
from adaround_ext.replay.checksums import InputChecksums
from adaround_ext.replay.onload import Onloader
from adaround_ext.replay.recordings import Recordings, Stream
from adaround_ext.replay.reuse import BlockReuse, StreamTargets
from adaround_ext.replay.run import Pass, Watch, call_counts
from adaround_ext.replay.walk import Context, Walk
from adaround_ext.tracing.blocks import BlockCall
from adaround_ext.tracing.trace import ModuleCall


class Replay:
    """One model on all calibration batches, block after block."""

    def __init__(
        self,
        model: nn.Module,
        calibration: Calibration,
        calls: list[BlockCall],
        cache: ActivationCache,
        onloader: Onloader,
        shared_prefix: int,
        seed: int,
        census: Census,
        units: Sequence[StreamTargets] = (),
        first: InputChecksums | None = None,
    ) -> None:
        """shared_prefix: how many leading calls give the same in all streams. census: made by the
        first pass. units: all that are to be fitted to two streams, in execution order. first: of
        an earlier run of the first batch, None where that was on another device."""
        recordings, reuse = Recordings(cache, shared_prefix), BlockReuse(cache, units, calls)
        self._walk = Walk(calibration, seed, calls, recordings, reuse, onloader, census)
        self._model, self._cache, self._first = model, cache, first
        self.census = census
        self.passes = 0

    @property
    def diverged(self) -> str:
        """Why recordings cannot stand for blocks, if they cannot."""
        return self._walk.diverged

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
        return self._walk.finished()

    def give_up(self, trouble: str) -> None:
        """From now on nothing is replaced. The batches before were as they should be."""
        self._walk.give_up(trouble)

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
        walk = self._walk
        ready = walk.leading_without(waiting)
        unwatched = {stream: (Watch(), context) for stream, (_, context) in streams.items()}
        for index in range(walk.ready + 1, ready):
            if walk.diverged:
                break
            walk.reuse.enter(None, waiting)
            for _ in self._pass(Pass(walk, index, index, waiting, {}, unwatched, not self.passes)):
                pass
        until = max(call.end for call in calls)
        end = sum(block.call.begin < until for block in walk.calls)
        if not walk.diverged:
            walk.reuse.enter(walk.calls[ready] if ready < len(walk.calls) else None, waiting)
        counts = call_counts(calls)
        yield from self._pass(Pass(walk, ready, end, waiting, counts, streams, not self.passes))

    def _pass(self, current: Pass) -> Iterator[int]:
        walk = self._walk
        batches = walk.calibration.local_batches
        for batch in batches:
            current.run(batch)
            if current.reference and batch == batches[0]:
                self._check_repeats(batch, current)
            yield batch
            current.clear()
        self.passes += len(current.ran)
        walk.ready = current.open
        walk.recordings.forget()
        walk.reuse.leave()

    def _check_repeats(self, batch: int, current: Pass) -> None:
        """What differs between two runs of one batch, where two streams are to be compared."""
        if not self._walk.reuse.units:
            return
        context = current.streams["full"][1]
        first = self._first if batch == 0 else None
        second = self.census.checksums
        if self._cache.rounds and current.recording:  # the census saw rounded outputs
            second = self._checksums(batch, context)
        first = first or self._checksums(batch, context)
        differing = first.differing(second, batch)
        if differing:  # another thread of the process may have drawn random numbers meanwhile
            again = self._checksums(batch, context)
            differing &= again.differing(self._checksums(batch, context), batch)
        self.census.unrepeatable |= differing

    def _checksums(self, batch: int, context: Context) -> InputChecksums:
        """Of one run with nothing replaced."""
        whole_model = self._walk.onloader.while_running()
        with input_checksums(self._model, batch) as checksums, context(), whole_model:
            self._walk.run_model(batch)
        return checksums
