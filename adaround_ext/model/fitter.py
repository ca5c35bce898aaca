"""Fitter: the walk through a model: collect, solve, go on with the quantized weights."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor

from adaround_ext.checks import some
from adaround_ext.model.apply import with_weights
from adaround_ext.model.checkpoint import Checkpoint
from adaround_ext.model.collector import Collector
from adaround_ext.model.mapped import Offload
from adaround_ext.model.progress import FittingBar
from adaround_ext.model.solve_units import (
    alike_batches,
    assign_to_ranks,
    solve_batch,
    solve_own_units,
)
from adaround_ext.model.sweep import Switch, sweep
from adaround_ext.model.units import Unit
from adaround_ext.model.workspace import Analysis, Workspace
from adaround_ext.planning.plan import Target
from adaround_ext.replay.census import NewCalls, batches_to_trace
from adaround_ext.replay.replay import Replay
from adaround_ext.report.layer import LayerReport
from adaround_ext.result import LayerResult, QuantizedWeight

_logger = logging.getLogger("adaround_ext")
_NAMED = 8  # layers in one note


@dataclass(frozen=True, eq=False)
class Fitted:
    """A target's result; ``dequantized`` is its floating-point weight where that is in a file."""

    weight: QuantizedWeight
    bias: Tensor | None
    report: LayerReport
    dequantized: Tensor | None = None


@dataclass
class Fit:
    """What a walk comes to.

    skipped: layers that no row came to, and so why. seconds: by phase. passes: of the model over
    this process's batches.
    """

    analysis: Analysis
    fitted: dict[Target, Fitted] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"forward": 0.0, "statistics": 0.0, "solving": 0.0}
    )
    passes: int = 0


class Fitter:
    """Goes through all passes once; the model is as it was after every step."""

    def __init__(
        self,
        workspace: Workspace,
        analysis: Analysis,
        replay: Replay,
        passes: Sequence[list[Unit]],
        sequential: bool,
        checkpoint: Checkpoint | None = None,
        offload: Offload | None = None,
        without_quantizers: Switch | None = None,
        progress: bool = True,
    ) -> None:
        """passes: the units that are fitted on each pass of the model. sequential: inputs come from
        the model with what is done quantized, targets from the full-precision model. offload: keeps
        results in files, None for memory. without_quantizers: switches activation quantizers off,
        None where there are none."""
        self._replay, self._passes, self._sequential = replay, passes, sequential
        self._checkpoint, self._offload = checkpoint, offload
        self._without_quantizers, self._progress = without_quantizers, progress
        self._calibration, self._ranks = workspace.data, workspace.ranks
        self._folder = workspace.options.cache_dir
        self._home = workspace.home if workspace.moves else None  # None: that of each layer
        self._fit = Fit(analysis)
        targets = [target for units in passes for unit in units for target in unit.targets]
        self._index = {target: index for index, target in enumerate(targets)}
        self._waiting = {module for target in targets for module in target.modules}
        self._counted = False  # whether all batches have run once, and all ranks know what ran
        self._resumed = 0  # layers from the checkpoint
        self._unrepeatable: list[str] = []  # names of units
        self._unpaired: dict[str, tuple[int, int]] = {}  # rows by names of units, and of all rows
        # Weights and biases of layers that are done, and still run.
        self._pending: dict[Target, tuple[Tensor, Tensor | None]] = {}

    def run(self) -> Fit:
        """Fits every target.

        Raises NewCalls on the first pass, where batches have to be traced that were not.
        """
        shown = self._progress and self._ranks.first
        with FittingBar([target.cost for target in self._index], shown) as bar:
            for units in self._passes:
                self._fit_pass(units, bar)
        fit = self._fit
        if not fit.fitted:
            name = next(iter(self._index)).name
            raise ValueError(f"calibration must reach {name}, got no rows of any layer")
        if self._resumed:
            fit.notes.append(f"{self._resumed} layers from checkpoint_dir")
        fit.notes += self._unpaired_notes() + self._replay.notes()
        fit.passes = self._replay.passes
        return fit

    def _fit_pass(self, units: list[Unit], bar: FittingBar) -> None:
        results = self._restored(units)
        restored = set(results)
        missing = [unit for unit in units if unit not in restored]
        if missing:
            bar.begin([target.name for unit in missing for target in unit.targets])
            results.update(self._solved(missing))
        for unit in units:
            if unit not in results:
                self._skip(unit)
                bar.update(unit.cost)
                continue
            for target, result in zip(unit.targets, results[unit], strict=True):
                self._finish(target, result)
                bar.finish(target.name, target.cost, result.report, unit in restored)
        self._release()

    def _restored(self, units: list[Unit]) -> dict[Unit, list[LayerResult]]:
        """Results of the units that are in the checkpoint, which only the first rank has."""
        loaded = self._ranks.from_first(
            "the reading of checkpoint_dir", lambda: [self._loaded(unit) for unit in units]
        )
        restored = {}
        for unit, results in zip(units, loaded, strict=True):
            if results is not None:
                device = self._home or unit.layers[0].weight.device
                restored[unit] = [result.to(device) for result in results]
                self._resumed += len(results)
        return restored

    def _loaded(self, unit: Unit) -> list[LayerResult] | None:
        if self._checkpoint is None:
            return None
        indices = [self._index[target] for target in unit.targets]
        return self._checkpoint.load(indices, torch.device("cpu"))

    def _solved(self, units: list[Unit]) -> dict[Unit, list[LayerResult]]:
        """Results of the units that rows came to, from one pass over the data."""
        collectors = [Collector(unit, self._folder, self._ranks) for unit in units]
        seconds, started = self._fit.seconds, time.perf_counter()
        self._collect_all(f"the calibration of {units[0].names}", collectors)
        collecting = sum(collector.seconds for collector in collectors)
        seconds["statistics"] += collecting
        seconds["forward"] += time.perf_counter() - started - collecting
        started = time.perf_counter()
        results = self._solve(collectors)
        seconds["solving"] += time.perf_counter() - started
        return results

    def _collect_all(self, what: str, collectors: list[Collector]) -> None:
        """Collects; if recordings cannot stand for blocks at one rank, none uses its own."""
        census = self._replay.census

        def collect() -> tuple[str, dict[int, dict[str, int]], set[str]]:
            self._collect(collectors)
            new = {} if self._counted else census.new_calls()
            return self._replay.diverged, new, {census.layers[m] for m in census.unrepeatable}

        troubles, *others = zip(*self._ranks.exchange(what, collect), strict=True)
        new = {batch: counts for by_batch in others[0] for batch, counts in by_batch.items()}
        if new:
            raise NewCalls(batches_to_trace(new))
        if not self._counted:
            self._calibration.release()
            unrepeatable = set().union(*others[1])
            census.unrepeatable |= {m for m, name in census.layers.items() if name in unrepeatable}
        self._counted = True
        trouble = next((text for text in troubles if text), "")
        if trouble and not self._replay.diverged:
            self._replay.give_up(trouble)

    def _collect(self, collectors: list[Collector]) -> None:
        # Before anything is quantized both streams are the same.
        two = self._sequential and (bool(self._fit.fitted) or self._without_quantizers is not None)
        unrepeatable = sweep(
            self._replay, self._calibration, collectors, self._waiting,
            self._without_quantizers or nullcontext, self._quantized if two else None,
        )  # fmt: skip
        self._unrepeatable += [name for name in unrepeatable if name not in self._unrepeatable]

    def _solve(self, collectors: list[Collector]) -> dict[Unit, list[LayerResult]]:
        """All ranks share the rows of large layers, then each solves some of the others."""
        results: dict[Unit, list[LayerResult]] = {}
        rank_of = assign_to_ranks([collector.unit for collector in collectors], self._ranks.size)
        apart: list[Collector] = []  # this rank's, of units that one rank solves
        for alike in alike_batches(collectors, self._ranks):
            batch = [collector for collector in alike if self._finished(collector)]
            for collector in alike:
                if collector not in batch:
                    rank_of.pop(collector.unit, None)
            if not batch:
                continue
            rank = rank_of.get(batch[0].unit)
            if rank is None:
                shared = solve_batch(batch, self._ranks)
                self._save(shared)
                results |= shared
            elif rank == self._ranks.rank:
                apart += batch
        if rank_of:
            single = solve_own_units(apart, list(rank_of), self._ranks)
            self._save({unit: single[unit] for unit in rank_of})
            results |= single
        return results

    def _finished(self, collector: Collector) -> bool:
        """Whether rows came to a collector, which has all of them now."""
        reached = collector.finish()
        if reached and collector.unpaired:
            self._unpaired[collector.unit.names] = collector.unpaired, collector.rows
        return reached

    def _unpaired_notes(self) -> list[str]:
        notes = []
        if self._unpaired:
            shares = [f"{n} {rows / every:.0%}" for n, (rows, every) in self._unpaired.items()]
            notes.append(
                "the model chooses rows by its data: for these shares of them the full-precision "
                "model has other tokens in their place, and the layer's outputs on them were the "
                f"targets: {some(shares, _NAMED)}"
            )
        if self._unrepeatable:
            notes.append(
                "the model does not repeat itself (random numbers of a generator of its own, or "
                "state that runs leave behind), and the outputs of these layers on their inputs "
                f"were the targets: {some(self._unrepeatable, _NAMED)}"
            )
        return notes

    def _skip(self, unit: Unit) -> None:
        """Leaves a unit as it is, since nothing is known of its inputs."""
        for target in unit.targets:
            self._fit.skipped[target.name] = "no row of the calibration data came to it"
            self._waiting.difference_update(target.modules)

    def _save(self, results: dict[Unit, list[LayerResult]]) -> None:
        for unit, of_unit in results.items():
            with self._ranks.together("the writing of checkpoint_dir"):
                for target, result in zip(unit.targets, of_unit, strict=True):
                    if self._ranks.first:
                        _logger.info("%s: %s", target.name, result.report)
                    if self._checkpoint is not None:
                        self._checkpoint.save(self._index[target], result)

    def _finish(self, target: Target, result: LayerResult) -> None:
        if self._home is not None:
            result = result.to(self._home)
        weight = QuantizedWeight(result.codes, result.scale, result.zero_point, target.config.bits)
        dequantized = None
        if self._offload is not None:
            mapped = self._offload.keep({"weight": result.weight_q, "codes": weight.codes})
            weight = dataclasses.replace(weight, codes=mapped["codes"])
            dequantized = mapped["weight"]
            result = dataclasses.replace(result, weight_q=dequantized)
        self._fit.fitted[target] = Fitted(weight, result.bias, result.report, dequantized)
        self._waiting.difference_update(target.modules)
        if self._sequential:
            self._pending[target] = result.weight_q, result.bias

    def _release(self) -> None:
        """Floating-point weights of layers that will not run again are not needed."""
        gone = self._replay.finished()
        for target in [t for t in self._pending if gone.issuperset(t.modules)]:
            del self._pending[target]

    def _quantized(self) -> AbstractContextManager[None]:
        """Inside, the model has the quantized weights of what is done."""
        fitted = self._fit.fitted
        if self._replay.diverged:  # then all of them run
            for target in fitted.keys() - self._pending.keys():
                weight = fitted[target].weight.dequantize(target.matrix)
                self._pending[target] = weight, fitted[target].bias
        return with_weights([(t, weight, bias) for t, (weight, bias) in self._pending.items()])
