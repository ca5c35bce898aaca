"""Summary: the report of a model from what its fit came to."""

from __future__ import annotations

import logging
import time

from adaround_ext.model.checkpoint import plain_config, versions
from adaround_ext.model.fitter import Fit, Fitted
from adaround_ext.model.units import Unit
from adaround_ext.model.workspace import Workspace
from adaround_ext.planning.plan import Target
from adaround_ext.process.memory import device_memory, host_memory
from adaround_ext.report.coverage import few_quantized
from adaround_ext.report.model import LayerEntry, ModelReport

_logger = logging.getLogger("adaround_ext")


def summarize(workspace: Workspace, fit: Fit, mode: str, passes: int) -> ModelReport:
    """The report of a model whose workspace is closed; warns of one that is hardly quantized.

    passes: over all batches, of the process that made most.
    """
    model, plan, calls = workspace.model, fit.analysis.plan, fit.analysis.calls
    seconds = workspace.seconds | fit.seconds
    seconds["total"] = time.perf_counter() - workspace.started
    weights = [target.matrix.layer.get_parameter("weight") for target in fit.fitted]
    skipped = plan.skipped | fit.skipped
    few = few_quantized(model, weights, skipped)
    for note in few if workspace.ranks.first else ():
        _logger.warning("%s", note)
    notes = few + workspace.goal.notes + workspace.data.notes + workspace.prepared.notes
    return ModelReport(
        model=type(model).__name__,
        mode=mode,
        layers=_entries(fit),
        skipped=skipped,
        blocks=tuple(dict.fromkeys(call.name for call in calls if len(call.layers) > 1)),
        parameters=sum(p.numel() for p in model.parameters()),
        passes=passes,
        batches=workspace.data.batches,
        samples=workspace.data.samples,
        notes=(*notes, *plan.notes, *fit.notes),
        seconds=seconds,
        memory=_memory(workspace),
        versions=versions(),
        seed=workspace.options.config.seed,
    )


def _memory(workspace: Workspace) -> dict[str, int]:
    """Bytes: the process's before and at most, the cache's by place, and a GPU's at most."""
    memory = {"host_before": workspace.host_before, "host_peak": host_memory()[1]}
    memory |= {f"cache_{place}": size for place, size in workspace.cache.peak.items()}
    device = workspace.device
    if device is not None and device.type == "cuda":
        memory["device_peak"] = device_memory(device)
    else:
        del memory["cache_device"]
    return memory


def _entries(fit: Fit) -> tuple[LayerEntry, ...]:
    """Of each layer that is quantized, unit by unit."""
    calls = fit.analysis.calls
    block = {m: call.name for call in calls for m in call.layers if m is not call.call.module}
    return tuple(
        _entry(target, unit, block.get(target.matrix.layer), fit.fitted[target])
        for unit in fit.analysis.units
        for target in unit.targets
        if target in fit.fitted
    )


def _entry(target: Target, unit: Unit, block: str | None, fitted: Fitted) -> LayerEntry:
    return LayerEntry(
        name=target.name,
        kind=type(target.matrix.layer).__name__,
        shape=tuple(target.matrix.weight.shape),
        calls=len(target.calls),
        block=block,
        shared_inputs=tuple(t.name for t in unit.targets if t is not target),
        tied=tuple(name for name, _ in target.tied),
        config=plain_config(target),
        report=fitted.report,
        rows=target.matrix.rows,
    )
