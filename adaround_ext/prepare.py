"""What is done to a model before its layers are fitted, all of it undone if the fit fails."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from adaround_ext.batch_norm import fold_batch_norm_
from adaround_ext.equalize import equalize_
from adaround_ext.trace import Trace, trace

BatchNorm = Literal["fold", "keep"]


@dataclass
class Prepared:
    """The model's last trace, and what was done to it."""

    trace: Trace
    notes: list[str] = field(default_factory=list)


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
        prepared.notes.append(
            "equalized: " + (", ".join(f"{a} -> {b}" for a, b in equalized.pairs) or "no layers")
        )
    return prepared
