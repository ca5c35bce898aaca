"""Division of work: ranks share the rows of large layers; small ones are solved some at a time."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence

from adaround_ext.config import AdaRoundConfig
from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.linalg.precision import full_precision
from adaround_ext.model.collector import Collector
from adaround_ext.model.units import Unit
from adaround_ext.result import LayerResult
from adaround_ext.rounding.problem import Problem
from adaround_ext.rounding.solve import solve
from adaround_ext.rounding.stacked import at_once

# Of a rank's share of the work on one pass: what costs less is solved whole by one of the ranks.
_SINGLE = 8


def assign_to_ranks(units: Sequence[Unit], size: int) -> dict[Unit, int]:
    """The rank, of ``size``, that solves a unit, for those whose rows are not shared."""
    if size == 1:
        return {}
    load = [0.0] * size
    most = sum(unit.cost for unit in units) / (_SINGLE * size)
    rank_of = {}
    for unit in sorted(units, key=lambda unit: -unit.cost):
        if not unit.shareable or unit.cost <= most:
            rank_of[unit] = load.index(min(load))
            load[rank_of[unit]] += unit.cost
    return rank_of


def alike_batches(collectors: list[Collector], ranks: Ranks) -> Iterator[list[Collector]]:
    """Empties ``collectors``: those together that are solved as one, and so are freed after it.

    Together are small layers of one shape, on a GPU: elsewhere a product's bits would depend on how
    many there are. What ``ranks`` share is solved alone.
    """
    while collectors:
        first = collectors.pop(0)
        most = _at_once(first.unit) if ranks.size == 1 else 1
        kind = _kind(first.unit)
        alike = [other for other in collectors if _kind(other.unit) == kind][: most - 1]
        for other in alike:
            collectors.remove(other)
        yield [first, *alike]


def _at_once(unit: Unit) -> int:
    first, device = unit.layers[0], unit.layers[0].weight.device
    if unit.sampled or device.type != "cuda":
        return 1
    rows = sum(layer.rows for layer in unit.layers)
    return at_once(first.cols * (rows + first.groups * first.cols), device)


def _kind(unit: Unit) -> Hashable:
    """Units that agree in this have problems that agree in all but the numbers."""
    return tuple(
        (m.rows, m.cols, m.groups, m.weight.dtype, m.weight.device, m.bias is None, id(t.config))
        for t, m in zip(unit.targets, unit.layers, strict=True)
    )


def problems_of(
    batch: Sequence[Collector],
) -> Iterator[tuple[AdaRoundConfig, tuple[Problem, ...]]]:
    """The problems of a batch, those together that are solved as one, and their settings."""
    for groups in zip(*(collector.problems() for collector in batch), strict=True):
        (index, *_), _ = groups[0]
        config = batch[0].unit.targets[index].config
        for alike in zip(*(problems for _, problems in groups), strict=True):
            yield config, alike


def solve_batch(batch: Sequence[Collector], ranks: Ranks) -> dict[Unit, list[LayerResult]]:
    """The results of the targets of each unit; ``ranks`` share the rows of a batch of one."""
    results: dict[MatrixLayer, LayerResult] = {}
    with full_precision(batch[0].unit.layers[0].weight.device):
        for config, alike in problems_of(batch):
            layers = [layer for problem in alike for layer in problem.layers]
            results.update(zip(layers, solve(alike, config, ranks), strict=True))
    units = [collector.unit for collector in batch]
    return {unit: [results[layer] for layer in unit.layers] for unit in units}


def solve_own_units(
    collectors: list[Collector], units: Sequence[Unit], ranks: Ranks
) -> dict[Unit, list[LayerResult]]:
    """The results of ``units`` at every rank.

    collectors: of those that this rank solves; the list is empty afterwards.
    """
    numbers = {unit: number for number, unit in enumerate(units)}

    def solve_own() -> dict[int, list[LayerResult]]:
        by_number = {}
        for batch in alike_batches(collectors, ALONE):
            for unit, of_unit in solve_batch(batch, ALONE).items():
                by_number[numbers[unit]] = of_unit
        return by_number

    results: dict[Unit, list[LayerResult]] = {}
    for by_number in ranks.exchange("the rounding of single layers", solve_own):
        for number, of_unit in by_number.items():
            device = units[number].layers[0].weight.device
            results[units[number]] = [result.to(device) for result in of_unit]
    return results
