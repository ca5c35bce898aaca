"""Units: layers that share their inputs, and the passes in which units are solved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.planning.plan import Target
from adaround_ext.presets import choose_objective
from adaround_ext.rounding.gram_problem import shareable
from adaround_ext.statistics.segment import TOKENS


@dataclass(frozen=True, eq=False)
class Unit:
    """Targets that see the same patches, and so share statistics."""

    targets: tuple[Target, ...]

    @cached_property
    def sampled(self) -> bool:
        return _objective(self.targets[0])[0] == "sampled"

    @cached_property
    def from_inputs(self) -> bool:
        """Whether the full-precision inputs stand for the outputs: less to compute and to run."""
        first = self.targets[0].matrix
        linear = isinstance(first.layer, nn.Linear) and not self.sampled
        return linear and sum(layer.rows for layer in self.layers) > first.cols

    @property
    def rows_chosen(self) -> bool:
        """Whether the model's data decide which rows it gets: two streams may differ in them."""
        return self.targets[0].rows_chosen

    @property
    def watches_inputs(self) -> bool:
        """Whether it is the full-precision stream's inputs that are needed of it, not outputs."""
        return self.from_inputs or self.rows_chosen

    @property
    def names(self) -> str:
        return ", ".join(target.name for target in self.targets)

    @property
    def layers(self) -> list[MatrixLayer]:
        return [target.matrix for target in self.targets]

    @property
    def shareable(self) -> bool:
        """Whether its rows can be solved apart."""
        return all(shareable(t.matrix, t.config, _objective(t)[0]) for t in self.targets)

    @property
    def cost(self) -> float:
        """What solving it takes, in the unit of Target.cost."""
        return sum(target.cost for target in self.targets)

    def bytes(self) -> int:
        """Roughly, of what is collected."""
        first = self.targets[0].matrix
        rows = sum(layer.rows for layer in self.layers)
        moments = 8 * first.cols * (first.groups * first.cols + rows)
        return moments + 4 * TOKENS * first.cols

    def same_settings(self) -> Iterator[list[int]]:
        """Indices of the targets that are solved in one go."""
        found: dict[int, list[int]] = defaultdict(list)
        for index, target in enumerate(self.targets):
            found[id(target.config)].append(index)
        yield from found.values()


def make_units(targets: Iterable[Target]) -> list[Unit]:
    """Units in execution order."""
    found: dict[object, list[Target]] = defaultdict(list)
    for target in targets:
        matrix, config = target.matrix, target.config
        key = (
            target.inputs, type(matrix), matrix.geometry, matrix.weight.dtype, matrix.weight.device,
            config.positions, config.seed, _objective(target)[0],
        )  # fmt: skip
        found[key].append(target)
    return [Unit(tuple(group)) for group in found.values()]


def _objective(target: Target) -> tuple[str, str]:
    """Which objective, and why."""
    return choose_objective(target.config)


def sequential_segments(units: Sequence[Unit]) -> list[list[Unit]]:
    """Units that are fitted on one pass, since they see the same tensor."""
    found: dict[object, list[Unit]] = defaultdict(list)
    for unit in units:
        found[unit.targets[0].inputs].append(unit)
    return list(found.values())


def parallel_segments(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    """As many units on one pass as the budget has room for, one at least."""
    segments: list[list[Unit]] = []
    used = 0
    for unit in units:
        if not segments or used + unit.bytes() > budget:
            segments.append([])
            used = 0
        segments[-1].append(unit)
        used += unit.bytes()
    return segments
