"""Units: layers that share their inputs, and the passes in which units are solved."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from torch import nn

from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.planning.plan import Target
from adaround_ext.rounding.gram_problem import shareable
from adaround_ext.statistics.segment import TOKENS


@dataclass(frozen=True, eq=False)
class Unit:
    """Targets that see the same patches, and so share statistics."""

    targets: tuple[Target, ...]

    @cached_property
    def sampled(self) -> bool:
        return self.targets[0].objective == "sampled"

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
        return all(shareable(t.matrix, t.config, t.objective) for t in self.targets)

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
        by_config: dict[int, list[int]] = defaultdict(list)
        for index, target in enumerate(self.targets):
            by_config[id(target.config)].append(index)
        yield from by_config.values()


def make_units(targets: Iterable[Target]) -> list[Unit]:
    """Units in execution order."""
    groups: dict[object, list[Target]] = defaultdict(list)
    for target in targets:
        matrix, config = target.matrix, target.config
        key = (
            target.inputs, type(matrix), matrix.geometry, matrix.weight.dtype, matrix.weight.device,
            config.positions, config.seed, target.objective,
        )  # fmt: skip
        groups[key].append(target)
    return [Unit(tuple(group)) for group in groups.values()]


def sequential_passes(units: Sequence[Unit]) -> list[list[Unit]]:
    """A pass of the model for all units that see the same tensor."""
    passes: dict[object, list[Unit]] = defaultdict(list)
    for unit in units:
        passes[unit.targets[0].inputs].append(unit)
    return list(passes.values())


def parallel_passes(units: Sequence[Unit], budget: int) -> list[list[Unit]]:
    """As many units on one pass as the budget, in bytes, has room for, one at least."""
    passes: list[list[Unit]] = []
    used = 0
    for unit in units:
        if not passes or used + unit.bytes() > budget:
            passes.append([])
            used = 0
        passes[-1].append(unit)
        used += unit.bytes()
    return passes
