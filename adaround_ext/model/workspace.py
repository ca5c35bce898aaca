"""Workspace: a model and its calibration data, opened once for all that is fitted or measured."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import nn

from adaround_ext.activations.hooks import full_precision_activations
from adaround_ext.checks import check_devices, device_here
from adaround_ext.config import AdaRoundConfig
from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.export.goal.goal import Goal
from adaround_ext.model.checkpoint import model_digest
from adaround_ext.model.prepare import Prepared, prepare_
from adaround_ext.model.units import Unit, make_units
from adaround_ext.planning.candidates import FilterFn
from adaround_ext.planning.overrides import Overrides
from adaround_ext.planning.plan import Plan, make_plan
from adaround_ext.process.memory import free_device_memory, host_memory
from adaround_ext.process.omp_waits import short_waits_when_busy
from adaround_ext.replay.cache import MEMORY_BUDGET, ActivationCache
from adaround_ext.replay.calibration import Calibration, ForwardFn, single_device
from adaround_ext.replay.census import Census, NewCalls
from adaround_ext.replay.onload import Onloader
from adaround_ext.replay.replay import Replay
from adaround_ext.replay.reuse import StreamTargets
from adaround_ext.tracing.blocks import BlockCall, Blocks, block_calls, find_blocks
from adaround_ext.tracing.dataflow import Dataflow, dataflow
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.merged import merge_traces
from adaround_ext.tracing.padding import PaddingMask, PaddingMasks
from adaround_ext.tracing.plain_layers import layers_that_do_more
from adaround_ext.tracing.trace import Trace, trace
from adaround_ext.transforms.batch_norm import BatchNorm

T = TypeVar("T")
_SHARE = 4  # of a GPU's free memory one in so many bytes is for what is kept


@dataclass(frozen=True)
class WorkspaceOptions:
    """Arguments of :func:`adaround_ext.quantize_`, under their names, that other calls have too.

    quantizers_off: whether quantizers of activations that the model has are off while it is traced.
    """

    config: AdaRoundConfig
    overrides: Overrides | None = None
    filter_fn: FilterFn | None = None
    forward_fn: ForwardFn | None = None
    blocks: Blocks = None
    batch_norm: BatchNorm = "fold"
    equalize: bool = False
    activation_aware: bool = False
    padding_mask: PaddingMask = "attention_mask"
    device: torch.device | str | None = None
    memory_budget: int = MEMORY_BUDGET
    device_budget: int | None = None
    cache_dir: str | None = None
    cache_dtype: torch.dtype | None = None
    quantizers_off: bool = True


@dataclass(frozen=True)
class Analysis:
    """What the traces tell: which layers, in which order, on whose rows; before anything is fitted.

    calls: of the blocks that are carried forward, in order.
    """

    trace: Trace
    flow: Dataflow
    masks: PaddingMasks
    plan: Plan
    units: list[Unit]
    calls: list[BlockCall]


@dataclass
class Workspace:
    """A model that is open, see :func:`opened`.

    home: the device of the model, None where it has several. device: where it is run and fitted.
    device_budget: bytes of that device for what is kept. prepared: what was done to the model, from
    the run on the first batch. changes: takes back what was done. traces: by batch, of each in
    which something runs that ran in none before. digest: of the model as it came, "" without
    fingerprints. started: on the clock of :func:`time.perf_counter`. seconds: by phase.
    host_before: bytes of this process's memory when it was opened.
    """

    model: nn.Module
    options: WorkspaceOptions
    goal: Goal
    ranks: Ranks
    cache: ActivationCache
    data: Calibration
    home: torch.device | None
    device: torch.device | None
    device_budget: int
    prepared: Prepared
    changes: ExitStack
    traces: dict[int, Trace]
    digest: str
    started: float
    seconds: dict[str, float]
    host_before: int

    @property
    def moves(self) -> bool:
        """Whether the model is fitted elsewhere than where it is."""
        return self.device != self.home

    def with_all_calls(self, attempt: Callable[[Analysis], T], batches: Sequence[int] = (0,)) -> T:
        """What ``attempt`` makes of the analysis, once that has every call of every layer.

        Where an attempt meets :class:`NewCalls`, their batches are traced and it is made again.
        batches: to be traced before the first. Raises what :meth:`analyse` and attempts raise.
        """
        while True:
            analysis = self.analyse(batches)
            try:
                return attempt(analysis)
            except NewCalls as new:
                batches = new.batches

    def analyse(self, batches: Sequence[int] = ()) -> Analysis:
        """What the traces tell, with these batches traced too.

        Raises ValueError and TypeError as :func:`make_plan` and :func:`find_blocks` do.
        """
        with self.ranks.together("tracing"), _quantizers_off(self.model, self.options):
            for batch in batches:
                if batch not in self.traces:
                    self.traces[batch] = trace(self.model, partial(self.data.run, batch))
            return self._analysis()

    def _analysis(self) -> Analysis:
        options, goal = self.options, self.goal
        merged = merge_traces(list(self.traces.values()))
        flow = dataflow(merged)
        masks = PaddingMasks(options.padding_mask, merged, flow)
        reasons: dict[nn.Module, str] = {}
        with full_precision_activations(self.model):  # which are hooks that a fit knows of
            for batch, traced in self.traces.items():
                reasons |= layers_that_do_more(traced, partial(self.data.run, batch))
        reasons |= goal.refused()
        plan = make_plan(
            self.model, merged, options.config, options.overrides, options.filter_fn,
            options.activation_aware, reasons, flow, masks, goal.settings,
        )  # fmt: skip
        plan.notes.extend(masks.notes)
        later = [str(batch) for batch in self.traces if batch != 0]
        if later:
            plan.notes.append(
                f"in calibration batches {', '.join(later)} layers run that do not run in the "
                "first one, or more often"
            )
        calls = block_calls(self.model, merged, find_blocks(self.model, merged, options.blocks))
        return Analysis(merged, flow, masks, plan, make_units(plan.targets), calls)

    @contextmanager
    def replaying(
        self, analysis: Analysis, targets: Sequence[StreamTargets] = (), shared_prefix: int = 0
    ) -> Iterator[Replay]:
        """Inside, the model is on its device, and runs block after block.

        targets: what all units take that are fitted to two streams, in execution order.
        shared_prefix: how many leading calls of blocks give the same in both. After
        :class:`NewCalls` nothing is left of what was recorded.
        """
        modules = [call.call.module for call in analysis.calls]
        onloader = Onloader(self.model, modules, self.device if self.moves else None)
        census = Census(self.model, analysis.trace, self.cache.rounds)
        first_marks = None if self.moves else self.prepared.marks
        replay = Replay(
            self.model, self.data, analysis.calls, self.cache, onloader, shared_prefix,
            self.options.config.seed, census, targets, first_marks,
        )  # fmt: skip
        self.seconds["tracing"] = self._elapsed() - self.seconds["calibration"]
        try:
            with onloader:
                self.data.device = self.device
                yield replay
        except NewCalls:
            self.data.device = self.home
            replay.give_up("")
            raise

    def keep_changes(self) -> None:
        """From here on the model stays as it is now."""
        self.changes.pop_all()

    def _elapsed(self) -> float:
        return time.perf_counter() - self.started


@contextmanager
def opened(
    model: nn.Module,
    calibration: Iterable[Any],
    options: WorkspaceOptions,
    goal: Goal,
    ranks: Ranks = ALONE,
    fingerprinted: bool = False,
) -> Iterator[Workspace]:
    """A model in eval mode, prepared as options say, beside its data; afterwards it is as it was.

    Args:
        model: changed inside, and for good by :meth:`Workspace.keep_changes`.
        calibration: batches, as :func:`adaround_ext.quantize_` has them.
        options: what is asked of it; those that ``goal`` changes are changed already.
        goal: what it is to be exported for; its dtype is the model's from here on.
        ranks: those that do the same.
        fingerprinted: whether the data and the model get digests.

    Yields:
        The workspace, with the first batch traced.

    Raises:
        TypeError, ValueError: naming the argument, the rule and what came.
    """
    started = time.perf_counter()
    host_before, _ = host_memory()
    with ExitStack() as stack:
        stack.enter_context(short_waits_when_busy())
        stack.enter_context(goal.widened())
        home = single_device(model)
        device = home if options.device is None else device_here(options.device)
        check_devices(model, device)
        device_budget = _device_budget(options.device_budget, device, ranks)
        budgets = options.memory_budget, options.cache_dir, device_budget, options.cache_dtype
        cache = stack.enter_context(ActivationCache(*budgets))
        stack.enter_context(evaluation(model, options.config.seed, device))
        if device != home and home is None:
            raise ValueError(f"device must be None for a model on several devices, got {device}")
        with ranks.together("the reading of calibration"):
            batches, forward_fn = goal.batches(calibration), options.forward_fn
            data = Calibration(
                model, batches, forward_fn, options.padding_mask, cache, home, fingerprinted
            )
        seconds = {"calibration": time.perf_counter() - started}
        changes = stack.enter_context(ExitStack())
        digest = model_digest(model) if fingerprinted else ""
        with ranks.together("tracing"), _quantizers_off(model, options):
            run = partial(data.run, 0, options.config.seed)
            prepared = prepare_(model, run, changes, options.batch_norm, options.equalize)
        yield Workspace(
            model, options, goal, ranks, cache, data, home, device, device_budget, prepared,
            changes, {0: prepared.trace}, digest, started, seconds, host_before,
        )  # fmt: skip


def _device_budget(given: int | None, device: torch.device | None, ranks: Ranks) -> int:
    """One for all ranks: in parallel mode it decides on the passes."""
    free = free_device_memory(device)
    if given is None or free == 0:
        given = free // _SHARE
    return min(ranks.gather(given, "the start"))


def _quantizers_off(model: nn.Module, options: WorkspaceOptions) -> AbstractContextManager[object]:
    return full_precision_activations(model) if options.quantizers_off else nullcontext()
