"""Analysis of a model on its calibration data: which layers, in which order, on whose rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from torch import nn

from adaround_ext.activations.hooks import full_precision_activations
from adaround_ext.config import AdaRoundConfig
from adaround_ext.export.goal.goal import Goal
from adaround_ext.model.units import Unit, make_units
from adaround_ext.planning.overrides import Overrides
from adaround_ext.planning.plan import FilterFn, Plan, make_plan
from adaround_ext.replay.calibration import Calibration
from adaround_ext.tracing.blocks import BlockCall, Blocks, block_calls, find_blocks
from adaround_ext.tracing.dataflow import Dataflow, dataflow
from adaround_ext.tracing.merged import merge_traces
from adaround_ext.tracing.padding import PaddingMask, PaddingMasks
from adaround_ext.tracing.plain_layers import layers_that_do_more
from adaround_ext.tracing.trace import Trace, trace


@dataclass(frozen=True)
class Choices:
    """What a caller says of the layers to quantize, as :func:`adaround_ext.quantize_` has it."""

    config: AdaRoundConfig
    overrides: Overrides | None
    filter_fn: FilterFn | None
    padding_mask: PaddingMask
    activation_aware: bool = False
    blocks: Blocks = None
    goal: Goal | None = None


@dataclass
class Traces:
    """One trace of each batch in which something runs that ran in none before."""

    model: nn.Module
    data: Calibration
    by_batch: dict[int, Trace]

    def add(self, batches: Sequence[int]) -> None:
        """Watches the model on these batches too."""
        for batch in batches:
            if batch not in self.by_batch:
                self.by_batch[batch] = trace(self.model, partial(self.data.run, batch))

    def merged(self) -> Trace:
        return merge_traces(list(self.by_batch.values()))

    def unlike_layers(self) -> dict[nn.Module, str]:
        """Layers that do more than their class in any of the batches, and a reason."""
        found: dict[nn.Module, str] = {}
        with full_precision_activations(self.model):
            for batch, own in self.by_batch.items():
                found |= layers_that_do_more(own, partial(self.data.run, batch))
        return found


@dataclass(frozen=True)
class Analysis:
    """What is known of a model before anything is fitted."""

    trace: Trace
    flow: Dataflow
    masks: PaddingMasks
    plan: Plan
    units: list[Unit]
    calls: list[BlockCall]


def analyse(model: nn.Module, traces: Traces, choices: Choices) -> Analysis:
    """Raises ValueError and TypeError as :func:`make_plan` and :func:`find_blocks` do."""
    seen = traces.merged()
    flow = dataflow(seen)
    masks = PaddingMasks(choices.padding_mask, seen, flow)
    refused, complete = traces.unlike_layers(), None
    if choices.goal is not None:
        refused |= choices.goal.refused()
        complete = choices.goal.settings
    plan = make_plan(
        model, seen, choices.config, choices.overrides, choices.filter_fn,
        choices.activation_aware, refused, flow, masks, complete,
    )  # fmt: skip
    plan.notes.extend(masks.notes)
    later = [str(batch) for batch in traces.by_batch if batch != 0]
    if later:
        plan.notes.append(
            f"in calibration batches {', '.join(later)} layers run that do not run in the first "
            "one, or more often"
        )
    calls = block_calls(model, seen, find_blocks(model, seen, choices.blocks))
    return Analysis(seen, flow, masks, plan, make_units(plan.targets), calls)
