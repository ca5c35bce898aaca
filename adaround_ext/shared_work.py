"""Who solves what: ranks share the rows of large layers, and each solves some small layers."""

from __future__ import annotations

from collections.abc import Sequence

from adaround_ext.collect import Collector, Unit
from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.precision import full_precision
from adaround_ext.result import LayerResult
from adaround_ext.solve import solve_all

# Of a rank's share of the work on one pass: what costs less is solved whole by one of the ranks.
_SINGLE = 8


def owners_of(units: Sequence[Unit], size: int) -> dict[Unit, int]:
    """The rank, of ``size``, that solves a unit, for those whose rows are not shared."""
    if size == 1:
        return {}
    load = [0.0] * size
    most = sum(unit.cost for unit in units) / (_SINGLE * size)
    owners = {}
    for unit in sorted(units, key=lambda unit: -unit.cost):
        if not unit.shareable or unit.cost <= most:
            owners[unit] = load.index(min(load))
            load[owners[unit]] += unit.cost
    return owners


def solved(collector: Collector, ranks: Ranks) -> list[LayerResult]:
    """The results of a unit's targets; ``ranks`` share its rows."""
    unit = collector.unit
    results: dict[int, LayerResult] = {}
    with full_precision(unit.layers[0].weight.device):
        for part, problems in collector.problems():
            targets = [unit.targets[i] for i in part]
            found = solve_all([t.matrix for t in targets], problems, targets[0].config, ranks)
            results.update(zip(part, found, strict=True))
    return [results[index] for index in range(len(unit.targets))]


def solved_apart(
    own: list[Collector], units: Sequence[Unit], ranks: Ranks
) -> dict[Unit, list[LayerResult]]:
    """The results of ``units`` at every rank; each is ``own`` at one, which empties that list."""
    numbers = {unit: number for number, unit in enumerate(units)}

    def solve() -> dict[int, list[LayerResult]]:
        found = {}
        while own:  # and each one's statistics are freed after it
            collector = own.pop(0)
            found[numbers[collector.unit]] = solved(collector, ALONE)
        return found

    results: dict[Unit, list[LayerResult]] = {}
    for part in ranks.exchange("the rounding of single layers", solve):
        for number, found in part.items():
            device = units[number].layers[0].weight.device
            results[units[number]] = [result.to(device) for result in found]
    return results
