"""Merged traces: what runs in any of several batches, each call once."""

from __future__ import annotations

import dataclasses
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from functools import reduce

from torch import nn

from adaround_ext.tracing.trace import ModuleCall, Trace, Value

_Key = tuple[nn.Module, int]


def merge_traces(traces: Sequence[Trace]) -> Trace:
    """One trace with all calls of the traces; a call that several have is that of the first.

    What is new in another trace is put where it came between the calls that both have. Storages
    keep apart, so a call that several have also has its inputs and outputs there (``repeats``).
    """
    return reduce(_merge, traces)


def _merge(first: Trace, other: Trace) -> Trace:
    ticks = 2 + max((call.end for call in other.calls), default=0)
    first = _retimed(first, lambda time: time * ticks)
    known = {(call.module, call.index): call for call in first.calls}
    other = _retimed(_moved(other, len(first.born)), _places(known, other))
    again = {(call.module, call.index): call for call in other.calls}
    calls = [call for key, call in again.items() if key not in known]
    for key, call in known.items():
        repeats = (again[key],) if key in again else ()
        calls.append(dataclasses.replace(call, repeats=(*call.repeats, *repeats)))
    merged = dataclasses.replace(
        first,
        calls=sorted(calls, key=lambda call: call.begin),
        operators=sorted(first.operators + other.operators, key=lambda op: op.time),
        outputs=(*first.outputs, *other.outputs),
        born=first.born | other.born,
        arguments=first.arguments | other.arguments,
        constants=first.constants | other.constants,
    )
    times = sorted(set(_times(merged)))
    return _retimed(merged, {time: number for number, time in enumerate(times)}.__getitem__)


def _moved(trace: Trace, by: int) -> Trace:
    """The same with other numbers of storages."""

    def values(old: tuple[Value, ...]) -> tuple[Value, ...]:
        return tuple(dataclasses.replace(v, storage=v.storage + by) for v in old)

    return dataclasses.replace(
        trace,
        calls=[
            dataclasses.replace(c, inputs=values(c.inputs), outputs=values(c.outputs))
            for c in trace.calls
        ],
        operators=[
            dataclasses.replace(
                op,
                inputs=values(op.inputs),
                outputs=values(op.outputs),
                written=tuple(storage + by for storage in op.written),
            )
            for op in trace.operators
        ],
        outputs=values(trace.outputs),
        born={storage + by: time for storage, time in trace.born.items()},
        arguments={storage + by: name for storage, name in trace.arguments.items()},
        constants=frozenset(storage + by for storage in trace.constants),
    )


def _places(known: dict[_Key, ModuleCall], other: Trace) -> Callable[[int], int]:
    """From times in another trace to times in the first: right before the next event that both have
    in one order, so behind what the first has alone, as the experts of a mixture come."""
    events = []
    for call in other.calls:
        twin = known.get((call.module, call.index))
        if twin is not None:
            events += [(call.begin, twin.begin), (call.end, twin.end)]
    there, here = [0], [0]
    for time, twin_time in sorted(events):
        if twin_time > here[-1]:
            there.append(time)
            here.append(twin_time)

    def place(time: int) -> int:
        following = min(bisect_left(there, time), len(there) - 1)
        return here[following] + time - there[following]

    return place


def _retimed(trace: Trace, place: Callable[[int], int]) -> Trace:
    def moved(call: ModuleCall) -> ModuleCall:
        repeats = tuple(map(moved, call.repeats))
        begin, end = place(call.begin), place(call.end)
        return dataclasses.replace(call, begin=begin, end=end, repeats=repeats)

    return dataclasses.replace(
        trace,
        calls=list(map(moved, trace.calls)),
        operators=[dataclasses.replace(op, time=place(op.time)) for op in trace.operators],
        born={storage: place(time) for storage, time in trace.born.items()},
    )


def _times(trace: Trace) -> Iterator[int]:
    for call in trace.calls:
        for one in (call, *call.repeats):
            yield from (one.begin, one.end)
    yield from (operator.time for operator in trace.operators)
    yield from trace.born.values()
