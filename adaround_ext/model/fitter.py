"""The walk through a model: collect, solve, go on with the quantized weights."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from adaround_ext.checks import some
from adaround_ext.distributed import Ranks
from adaround_ext.model.apply import swapped
from adaround_ext.model.checkpoint import Checkpoint
from adaround_ext.model.collector import Collector
from adaround_ext.model.mapped import Offload
from adaround_ext.model.progress import FittingBar
from adaround_ext.model.solve_units import owners_of, solved, solved_apart, take_alike
from adaround_ext.model.units import Unit
from adaround_ext.planning.plan import Target
from adaround_ext.replay.calibration import Calibration
from adaround_ext.replay.census import NewCalls, batches_to_trace
from adaround_ext.replay.recordings import Stream
from adaround_ext.replay.replay import Replay
from adaround_ext.replay.reuse import StreamTargets
from adaround_ext.replay.run import Watch
from adaround_ext.report.layer import LayerReport
from adaround_ext.result import LayerResult, QuantizedWeight

_logger = logging.getLogger("adaround_ext")
_NAMED = 8  # layers in one note
Switch = Callable[[], AbstractContextManager[object]]


@dataclass(frozen=True, eq=False)
class Fitted:
    """A target's result; ``dequantized`` is its floating-point weight where that is in a file."""

    weight: QuantizedWeight
    bias: Tensor | None
    report: LayerReport
    dequantized: Tensor | None = None


@dataclass
class Fitter:
    """Goes through all segments once; the model is as it was after every step.

    sequential: inputs come from the model with what is done quantized, targets from the
    full-precision model. without_quantizers: switches activation quantizers off, None where there
    are none. folder: for what does not fit into memory, None if it does. home: the device that
    results go to, None for that of their layers. ranks: those that do the same, and share the work.
    offload: keeps results in files, None for memory.
    """

    replay: Replay
    calibration: Calibration
    segments: Sequence[list[Unit]]
    sequential: bool
    checkpoint: Checkpoint | None
    without_quantizers: Switch | None
    folder: str | None
    home: torch.device | None
    progress: bool
    ranks: Ranks
    offload: Offload | None
    fitted: dict[Target, Fitted] = field(default_factory=dict)
    seconds: dict[str, float] = field(
        default_factory=lambda: {"forward": 0.0, "statistics": 0.0, "solving": 0.0}
    )
    skipped: dict[str, str] = field(default_factory=dict)  # layers that no row came to, and so why
    notes: list[str] = field(default_factory=list)
    resumed: int = 0

    def run(self) -> None:
        """Fits every target."""
        targets = [t for segment in self.segments for unit in segment for t in unit.targets]
        self._index = {target: i for i, target in enumerate(targets)}
        self._waiting = {module for target in targets for module in target.modules}
        self._counted = False  # whether all batches have run once, and all ranks know what ran
        self._unrepeatable: list[str] = []  # names of units
        self._unpaired: dict[str, tuple[int, int]] = {}  # rows by names of units, and of all rows
        # Weights and biases of layers that are done, and still run.
        self._pending: dict[Target, tuple[Tensor, Tensor | None]] = {}
        shown = self.progress and self.ranks.first
        with FittingBar([target.cost for target in targets], shown) as bar:
            for segment in self.segments:
                results = self._restored(segment)
                restored = set(results)
                missing = [unit for unit in segment if unit not in restored]
                if missing:
                    bar.begin([target.name for unit in missing for target in unit.targets])
                    results.update(self._fit(missing))
                for unit in segment:
                    if unit not in results:
                        self._skip(unit)
                        bar.update(unit.cost)
                        continue
                    for target, result in zip(unit.targets, results[unit], strict=True):
                        self._finish(target, result)
                        bar.finish(target.name, target.cost, result.report, unit in restored)
                self._release()
        if not self.fitted:
            raise ValueError(f"calibration must reach {targets[0].name}, got no rows of any layer")
        if self.resumed:
            self.notes.append(f"{self.resumed} layers from checkpoint_dir")
        self.notes += self._unpaired_notes() + self.replay.notes()

    def _restored(self, segment: list[Unit]) -> dict[Unit, list[LayerResult]]:
        """Results of the units that are in the checkpoint, which only the first rank has."""
        loaded = self.ranks.from_first(
            "the reading of checkpoint_dir", lambda: [self._loaded(unit) for unit in segment]
        )
        found = {}
        for unit, own in zip(segment, loaded, strict=True):
            if own is not None:
                device = self.home or unit.layers[0].weight.device
                found[unit] = [result.to(device) for result in own]
                self.resumed += len(own)
        return found

    def _loaded(self, unit: Unit) -> list[LayerResult] | None:
        if self.checkpoint is None:
            return None
        indices = [self._index[target] for target in unit.targets]
        return self.checkpoint.load(indices, torch.device("cpu"))

    def _fit(self, units: list[Unit]) -> dict[Unit, list[LayerResult]]:
        collectors = [Collector(unit, self.folder, self.ranks) for unit in units]
        started = time.perf_counter()
        self._collect_all(f"the calibration of {units[0].names}", collectors)
        collecting = sum(collector.seconds for collector in collectors)
        self.seconds["statistics"] += collecting
        self.seconds["forward"] += time.perf_counter() - started - collecting
        started = time.perf_counter()
        results = self._solve(collectors)
        self.seconds["solving"] += time.perf_counter() - started
        return results

    def _collect_all(self, what: str, collectors: list[Collector]) -> None:
        """Collects; if recordings cannot stand for blocks at one rank, none uses its own.

        NewCalls on the first pass, where batches have to be traced that were not.
        """
        census = self.replay.census

        def collect() -> tuple[str, dict[int, dict[str, int]], set[str]]:
            self._collect(collectors)
            new = {} if self._counted else census.new_calls()
            return self.replay.diverged, new, {census.layers[m] for m in census.unrepeatable}

        troubles, *others = zip(*self.ranks.exchange(what, collect), strict=True)
        new = {batch: counts for own in others[0] for batch, counts in own.items()}
        if new:
            raise NewCalls(batches_to_trace(new))
        if not self._counted:
            self.calibration.release()
            unrepeatable = set().union(*others[1])
            census.unrepeatable |= {m for m, name in census.layers.items() if name in unrepeatable}
        self._counted = True
        trouble = next((text for text in troubles if text), "")
        if trouble and not self.replay.diverged:
            self.replay.give_up(trouble)

    def _collect(self, collectors: list[Collector]) -> None:
        units = [collector.unit for collector in collectors]
        inputs = _modules(unit.targets[0] for unit in units)
        every = [wanted_by(unit) for unit in units]
        # Before anything is quantized both streams are the same.
        two = self.sequential and (bool(self.fitted) or self.without_quantizers is not None)
        source: Stream = "quantized" if two else "full"
        switch = self.without_quantizers or nullcontext
        streams: dict[Stream, tuple[Watch, Switch]] = {}
        if two:
            by_inputs = frozenset().union(*(own.inputs for own in every))
            by_outputs = frozenset().union(*(own.outputs for own in every))
            streams["full"] = Watch(by_inputs, by_outputs), switch
            streams["quantized"] = Watch(inputs=inputs), self._quantized
        else:
            streams["full"] = Watch(inputs=inputs), switch
        calls = [call for own in every for call in own.calls]
        for batch in self.replay.sweep(self._waiting, calls, streams):
            taken = {stream: watch.taken[stream] for stream, (watch, _) in streams.items()}
            for collector in collectors:
                unit = collector.unit
                x = of_calls(unit.targets[0], taken[source])
                wanted = None
                if two and unit.watches_inputs:
                    wanted = [of_calls(unit.targets[0], taken["full"])]
                elif two:
                    wanted = [_outputs(t, taken["full"]) for t in unit.targets]
                if two and not self.replay.census.unrepeatable.isdisjoint(_modules(unit.targets)):
                    wanted = None
                    if unit.names not in self._unrepeatable:
                        self._unrepeatable.append(unit.names)
                mask = self.calibration.mask(batch, unit.targets[0].padding)
                collector.add(batch, x, wanted, mask, self.calibration.segments[batch])

    def _solve(self, collectors: list[Collector]) -> dict[Unit, list[LayerResult]]:
        """All ranks share the rows of large layers, then each solves some of the others."""
        results: dict[Unit, list[LayerResult]] = {}
        owners = owners_of([collector.unit for collector in collectors], self.ranks.size)
        own: list[Collector] = []
        for alike in take_alike(collectors, self.ranks):
            batch = [collector for collector in alike if collector.finish()]
            for collector in batch:
                if collector.unpaired:
                    counts = collector.unpaired, collector.rows
                    self._unpaired[collector.unit.names] = counts
            for collector in alike:
                if collector not in batch:
                    owners.pop(collector.unit, None)
            if not batch:
                continue
            first = batch[0].unit
            if first not in owners:
                found = solved(batch, self.ranks)
                for unit, of_unit in found.items():
                    self._save(unit, of_unit)
                results |= found
            elif owners[first] == self.ranks.rank:
                own += batch
        if owners:
            apart = solved_apart(own, list(owners), self.ranks)
            for unit in owners:
                self._save(unit, apart[unit])
            results |= apart
        return results

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
            self.skipped[target.name] = "no row of the calibration data came to it"
            self._waiting.difference_update(target.modules)

    def _save(self, unit: Unit, results: list[LayerResult]) -> None:
        with self.ranks.together("the writing of checkpoint_dir"):
            for target, result in zip(unit.targets, results, strict=True):
                if self.ranks.first:
                    _logger.info("%s: %s", target.name, result.report)
                if self.checkpoint is not None:
                    self.checkpoint.save(self._index[target], result)

    def _finish(self, target: Target, result: LayerResult) -> None:
        if self.home is not None:
            result = result.to(self.home)
        weight = QuantizedWeight(result.codes, result.scale, result.zero_point, target.config.bits)
        dequantized = None
        if self.offload is not None:
            kept = self.offload.keep({"weight": result.weight_q, "codes": weight.codes})
            weight = dataclasses.replace(weight, codes=kept["codes"])
            dequantized = kept["weight"]
            result = dataclasses.replace(result, weight_q=dequantized)
        self.fitted[target] = Fitted(weight, result.bias, result.report, dequantized)
        self._waiting.difference_update(target.modules)
        if self.sequential:
            self._pending[target] = result.weight_q, result.bias

    def _release(self) -> None:
        """Floating-point weights of layers that will not run again are not needed."""
        gone = self.replay.finished()
        for target in [t for t in self._pending if gone.issuperset(t.modules)]:
            del self._pending[target]

    def _quantized(self) -> AbstractContextManager[None]:
        if self.replay.diverged:  # then all of them run
            for target in self.fitted.keys() - self._pending.keys():
                fitted = self.fitted[target]
                self._pending[target] = fitted.weight.dequantize(target.matrix), fitted.bias
        return swapped([(t, weight, bias) for t, (weight, bias) in self._pending.items()])


def wanted_by(unit: Unit) -> StreamTargets:
    """What ``unit`` takes of the full-precision stream where there is another one."""
    calls = sorted((c for t in unit.targets for c in t.calls), key=lambda call: call.begin)
    if unit.watches_inputs:
        return StreamTargets(frozenset(unit.targets[0].modules), frozenset(), tuple(calls))
    return StreamTargets(frozenset(), _modules(unit.targets), tuple(calls))


def _modules(targets: Iterable[Target]) -> frozenset[nn.Module]:
    return frozenset(module for target in targets for module in target.modules)


def of_calls(target: Target, taken: Mapping[nn.Module, list[Tensor]]) -> list[Tensor]:
    """What was taken at a target, in the order of its calls."""
    found = [(taken.get(call.module, []), call.index) for call in target.calls]
    return [tensors[index] for tensors, index in found if index < len(tensors)]


def _outputs(target: Target, taken: Mapping[nn.Module, list[Tensor]]) -> list[Tensor]:
    """The same for outputs, of tied layers as if they had the first one's bias."""
    outputs = of_calls(target, taken)
    if not target.tied:
        return outputs
    shape = (-1, *[1] * (target.matrix.weight.dim() - 2))  # of a channel, for a convolution
    modules = [call.module for call in target.calls][: len(outputs)]
    for index, module in enumerate(modules):
        for layer, sign in ((module, -1), (target.matrix.layer, 1)):
            bias = getattr(layer, "bias", None)
            if module is not target.matrix.layer and bias is not None:
                outputs[index] = outputs[index] + sign * bias.detach().reshape(shape)
    return outputs
