"""Sweep: one pass over all batches, which brings the inputs of some units to their collectors."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

from torch import Tensor, nn

from adaround_ext.model.collector import Collector
from adaround_ext.model.units import Unit
from adaround_ext.planning.plan import Target
from adaround_ext.replay.calibration import Calibration
from adaround_ext.replay.recordings import Stream
from adaround_ext.replay.replay import Replay
from adaround_ext.replay.reuse import StreamTargets
from adaround_ext.replay.run import Watch

Switch = Callable[[], AbstractContextManager[object]]


def sweep(
    replay: Replay,
    data: Calibration,
    collectors: Sequence[Collector],
    waiting: set[nn.Module],
    full: Switch = nullcontext,
    quantized: Switch | None = None,
) -> list[str]:
    """Runs the model on all batches; units whose layers get other inputs each time, by name.

    waiting: the layers that are not done. full: inside it the model is the full-precision one.
    quantized: inside it what is done is quantized, where inputs come from there and the
    full-precision model gives the targets; None where both streams are the same.
    """
    targets = [targets_of(collector.unit) for collector in collectors]
    inputs = modules_of(collector.unit.targets[0] for collector in collectors)
    streams: dict[Stream, tuple[Watch, Switch]] = {"full": (Watch(inputs=inputs), full)}
    if quantized is not None:
        by_inputs = frozenset().union(*(each.inputs for each in targets))
        by_outputs = frozenset().union(*(each.outputs for each in targets))
        streams["full"] = Watch(by_inputs, by_outputs), full
        streams["quantized"] = Watch(inputs=inputs), quantized
    calls = [call for each in targets for call in each.calls]
    source: Stream = "full" if quantized is None else "quantized"
    unrepeatable: dict[str, None] = {}
    for batch in replay.sweep(waiting, calls, streams):
        taken = {stream: watch.taken[stream] for stream, (watch, _) in streams.items()}
        for collector in collectors:
            unit = collector.unit
            x = tensors_of_calls(unit.targets[0], taken[source])
            y = None if quantized is None else _target_tensors(unit, taken["full"])
            if y is not None and modules_of(unit.targets) & replay.census.unrepeatable:
                unrepeatable[unit.names], y = None, None
            mask = data.mask(batch, unit.targets[0].padding)
            collector.add(batch, x, y, mask, data.segments[batch])
    return list(unrepeatable)


def targets_of(unit: Unit) -> StreamTargets:
    """What ``unit`` takes of the full-precision stream where there is another one."""
    calls = sorted((c for t in unit.targets for c in t.calls), key=lambda call: call.begin)
    if unit.watches_inputs:
        return StreamTargets(frozenset(unit.targets[0].modules), frozenset(), tuple(calls))
    return StreamTargets(frozenset(), modules_of(unit.targets), tuple(calls))


def modules_of(targets: Iterable[Target]) -> frozenset[nn.Module]:
    return frozenset(module for target in targets for module in target.modules)


def tensors_of_calls(target: Target, taken: Mapping[nn.Module, list[Tensor]]) -> list[Tensor]:
    """What was taken at a target, in the order of its calls."""
    places = [(taken.get(call.module, []), call.index) for call in target.calls]
    return [tensors[index] for tensors, index in places if index < len(tensors)]


def _target_tensors(unit: Unit, taken: Mapping[nn.Module, list[Tensor]]) -> list[list[Tensor]]:
    """The unit's targets, as :meth:`Collector.add` has them."""
    if unit.watches_inputs:
        return [tensors_of_calls(unit.targets[0], taken)]
    return [_outputs(target, taken) for target in unit.targets]


def _outputs(target: Target, taken: Mapping[nn.Module, list[Tensor]]) -> list[Tensor]:
    """A target's outputs, of tied layers as if they had the first one's bias."""
    outputs = tensors_of_calls(target, taken)
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
