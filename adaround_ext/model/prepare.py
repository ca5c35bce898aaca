"""Preparation of a model before its layers are fitted, all of it undone if the fit fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

from torch import Tensor, nn

from adaround_ext.activations.hooks import attach, detach, observing
from adaround_ext.activations.placement import Place, place
from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.checks import check_flag
from adaround_ext.replay.calibration import Calibration, unpadded
from adaround_ext.replay.census import input_checksums
from adaround_ext.replay.checksums import InputChecksums
from adaround_ext.tracing.dataflow import Dataflow
from adaround_ext.tracing.padding import PaddingMasks
from adaround_ext.tracing.trace import Trace, trace
from adaround_ext.transforms.batch_norm import BatchNorm, fold_batch_norm_
from adaround_ext.transforms.equalize import equalize_


@dataclass
class Prepared:
    """The model's last trace, and what was done to it."""

    trace: Trace
    marks: InputChecksums  # of that run
    notes: list[str] = field(default_factory=list)

    @staticmethod
    def of(model: nn.Module, run: Callable[[], object]) -> Prepared:
        """Watches a run on the first batch."""
        with input_checksums(model, 0) as marks:
            return Prepared(trace(model, run), marks)

    def again(self, model: nn.Module, run: Callable[[], object]) -> None:
        """Watches another run, of the model as it is now."""
        later = Prepared.of(model, run)
        self.trace, self.marks = later.trace, later.marks


def quantize_activations_(
    model: nn.Module,
    trace: Trace,
    layers: Sequence[nn.Module],
    data: Calibration,
    config: ActivationConfig,
    undo: ExitStack,
    flow: Dataflow,
    masks: PaddingMasks,
) -> list[str]:
    """Attaches quantizers of activations, their ranges from one pass over the data; notes.

    ``undo`` gets what takes them out again.
    """
    placement = place(model, trace, layers)
    places = placement.places
    quantizers = attach(places, model, config)
    undo.callback(detach, model)
    padding = {item.name: masks.name_of(_positions(model, trace, flow, item)) for item in places}
    batch = 0

    def counted(name: str, x: Tensor) -> Tensor:
        return unpadded(x, data.mask(batch, padding[name]))

    with observing(quantizers, counted) as observation:
        for batch in range(data.batches):
            data.run(batch)
    observation.set_ranges()
    note = f"{len(quantizers)} quantizers of activations at {config.bits} bits"
    return [note, *placement.notes]


def _positions(model: nn.Module, trace: Trace, flow: Dataflow, place: Place) -> frozenset[str]:
    """The model's arguments whose positions the values of a place have."""
    modules = dict(model.named_modules())
    values = [
        value
        for site in place.sites
        for call in trace.calls_of(modules[site.module])
        for index, value in enumerate(call.inputs if site.kind == "input" else call.outputs)
        if index in site.tensors
    ]
    return frozenset().union(*(flow.inputs.get(v.storage, frozenset()) for v in values))


def prepare_(
    model: nn.Module,
    run: Callable[[], object],
    undo: ExitStack,
    batch_norm: BatchNorm,
    equalize: bool,
) -> Prepared:
    """Traces the model on one batch; folds batch norms and equalizes layers where that is asked.

    ``undo`` gets what takes the changes back. Batch norms and pairs that cannot be folded or
    equalized are noted with the reason. ValueError that names ``equalize``.
    """
    check_flag("equalize", equalize)
    prepared = Prepared.of(model, run)
    if batch_norm == "fold":
        folded = fold_batch_norm_(model, prepared.trace, run)
        undo.callback(folded.undo)
        if folded.pairs:
            prepared.notes.append(f"{len(folded.pairs)} batch norms folded into their layers")
            prepared.again(model, run)
        prepared.notes += [f"{name} not folded: {why}" for name, why in folded.skipped.items()]
    if equalize:
        equalized = equalize_(model, prepared.trace, run)
        undo.callback(equalized.undo)
        pairs = ", ".join(f"{a} -> {b}" for a, b in equalized.pairs)
        prepared.notes.append(f"equalized: {pairs or 'no layers'}")
        reasons = Counter(equalized.skipped.values())
        prepared.notes += [f"{count} layers not equalized: {why}" for why, count in reasons.items()]
        if equalized.pairs:
            prepared.again(model, run)
    return prepared
