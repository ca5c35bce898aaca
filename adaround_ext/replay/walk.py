"""State of a walk through a model's blocks: what is recorded, and how far it is."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from torch import nn

from adaround_ext.replay.calibration import Calibration
from adaround_ext.replay.census import Census
from adaround_ext.replay.onload import Onloader
from adaround_ext.replay.recordings import Recordings
from adaround_ext.replay.reuse import BlockReuse
from adaround_ext.tracing.blocks import BlockCall

Context = Callable[[], AbstractContextManager[object]]


@dataclass
class Walk:
    """The state that all passes over the batches share.

    ready: so many leading calls are recorded, and their layers are all done. diverged: why
    recordings cannot stand for blocks, if they cannot.
    """

    calibration: Calibration
    seed: int
    calls: list[BlockCall]
    recordings: Recordings
    reuse: BlockReuse
    onloader: Onloader
    census: Census
    ready: int = field(default=0, init=False)
    diverged: str = field(default="", init=False)

    def __post_init__(self) -> None:
        self._numbers = {(c.call.module, c.call.index): i for i, c in enumerate(self.calls)}

    def number_of(self, module: nn.Module, index: int) -> int | None:
        """The block call's number that is this call of a module; None where it is none."""
        return self._numbers.get((module, index))

    def run_model(self, batch: int) -> None:
        """The model on one batch, with the same random draws each time."""
        self.calibration.run(batch, self.seed + batch)

    def leading_without(self, layers: set[nn.Module]) -> int:
        """How many leading calls have none of these layers."""
        for index, call in enumerate(self.calls):
            if call.layers & layers:
                return index
        return len(self.calls)

    def finished(self) -> set[nn.Module]:
        """The layers that will not run again."""
        if self.diverged:
            return set()
        before, after = self.calls[: self.ready], self.calls[self.ready :]
        running = {m for call in after for m in call.layers}
        running |= {m for call in before if not call.replaceable for m in call.layers}
        return {m for call in before for m in call.layers} - running

    def give_up(self, trouble: str) -> None:
        """From now on nothing is replaced. The batches before were as they should be."""
        self.diverged = trouble
        self.recordings.clear()
        self.reuse.clear()
