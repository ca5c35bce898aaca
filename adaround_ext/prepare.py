"""What is done to a model before its layers are fitted, all of it undone if the fit fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from torch import Tensor, nn

from adaround_ext.activations import ActivationConfig
from adaround_ext.attachment import attach, detach, observing
from adaround_ext.batch_norm import fold_batch_norm_
from adaround_ext.calibration import Calibration, unpadded
from adaround_ext.equalize import equalize_
from adaround_ext.placement import place
from adaround_ext.trace import Trace, trace

BatchNorm = Literal["fold", "keep"]


@dataclass
class Prepared:
    """The model's last trace, and what was done to it."""

    trace: Trace
    notes: list[str] = field(default_factory=list)


def quantize_activations_(
    model: nn.Module,
    trace: Trace,
    layers: Sequence[nn.Module],
    data: Calibration,
    config: ActivationConfig,
    undo: ExitStack,
) -> list[str]:
    """Attaches quantizers of activations, their ranges from one pass over the data; notes.

    ``undo`` gets what takes them out again.
    """
    placement = place(model, trace, layers)
    quantizers = attach(placement.places, model, config)
    undo.callback(detach, model)
    mask: Tensor | None = None
    with observing(quantizers, lambda x: unpadded(x, mask)) as observation:
        for batch in range(data.batches):
            mask = data.mask(batch)
            data.run(batch)
    observation.set_ranges()
    note = f"{len(quantizers)} quantizers of activations at {config.bits} bits"
    return [note, *placement.notes]


def prepare_(
    model: nn.Module,
    run: Callable[[], object],
    undo: ExitStack,
    batch_norm: BatchNorm,
    equalize: bool,
) -> Prepared:
    """Traces the model on one batch; folds batch norms and equalizes layers where that is asked.

    ``undo`` gets what takes the changes back. Batch norms and pairs that cannot be folded or
    equalized are noted with the reason.
    """
    prepared = Prepared(trace(model, run))
    if batch_norm == "fold":
        folded = fold_batch_norm_(model, prepared.trace, run)
        undo.callback(folded.undo)
        if folded.pairs:
            prepared.notes.append(f"{len(folded.pairs)} batch norms folded into their layers")
            prepared.trace = trace(model, run)
        prepared.notes += [f"{name} not folded: {why}" for name, why in folded.skipped.items()]
    if equalize:
        equalized = equalize_(model, prepared.trace, run)
        undo.callback(equalized.undo)
        pairs = ", ".join(f"{a} -> {b}" for a, b in equalized.pairs)
        prepared.notes.append(f"equalized: {pairs or 'no layers'}")
        reasons = Counter(equalized.skipped.values())
        prepared.notes += [f"{count} layers not equalized: {why}" for why, count in reasons.items()]
    return prepared
