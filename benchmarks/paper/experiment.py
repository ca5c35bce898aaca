"""Experiment: values measured once, and the tables, the picture and claims from them."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from benchmarks.common import mean_and_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Values = dict[str, Any]  # plain values, as JSON has them


class Text(NamedTuple):
    """The same words in English and Chinese."""

    en: str
    zh: str


Cell = Text | str | int | float | None


@dataclass(frozen=True)
class Table:
    """Shown where the documents have the marker ``name``, and on the terminal by ``title``."""

    name: str
    title: str
    header: Sequence[Text | str]
    rows: Sequence[Sequence[Cell]]


Verdict = Literal["reproduced", "weaker", "not seen here"]
VERDICTS: dict[Verdict, Text] = {
    "reproduced": Text("reproduced", "已重现"),
    "weaker": Text("weaker", "较弱"),
    "not seen here": Text("not seen here", "此处未见"),
}


@dataclass(frozen=True)
class Claim:
    """What the paper says, what was measured here, and whether that is the same.

    paper: with its figures. here: with ours. effect: what ``effects`` are, one a seed, above 0
    where a seed shows what the paper says; best a share, which other networks can have as well.
    expected: the paper's, from its figures; where it has none, ``assumed``: the most there can be.
    """

    paper: Text
    here: Text
    effect: Text
    effects: Sequence[float]
    expected: float
    assumed: bool = False

    @property
    def verdict(self) -> Verdict:
        """By one rule for all claims.

        "reproduced": every seed shows it, and the mean effect is at least half of the paper's.
        "weaker": the mean effect is above 0 by more than its standard error. Else "not seen here".
        """
        mean, error = mean_and_error(self.effects)
        if min(self.effects) > 0 and mean >= self.expected / 2:
            return "reproduced"
        return "weaker" if mean > error else "not seen here"


@dataclass(frozen=True)
class Experiment:
    """One of the paper's tables or figures (``source``), measured again.

    measure: takes ``quick`` (few seeds, small sizes) and returns plain values, from which all the
    rest follows. draw: fills an empty figure of ``size`` inches.
    """

    name: str
    source: Text
    measure: Callable[[bool], Values]
    tables: Callable[[Values], list[Table]]
    claims: Callable[[Values], list[Claim]]
    draw: Callable[[Figure, Values], None]
    size: tuple[float, float] = (9.0, 4.5)


FULL = 69.68  # ResNet-18 in the paper, not quantized, %
NOT_QUANTIZED = Text("not quantized", "未量化")

SHARE = Text("share of what nearest lost", "四舍五入所失准确率的挽回比例")


def papers(better: float, worse: float) -> float:
    """Of the points that the paper's network loses at accuracy ``worse``, the share regained."""
    return 1 - (FULL - better) / (FULL - worse)


def papers_logarithms(accuracy: float) -> float:
    """The same over nearest's 23.99 %, in logarithms, as a share of that with its own images."""
    nearest, some, whole = (math.log(FULL - one) for one in (23.99, accuracy, 68.71))
    return (nearest - some) / (nearest - whole)


def pm(values: Sequence[float], digits: int = 2) -> str:
    """Mean ± standard error over seeds."""
    mean, error = mean_and_error(values)
    return f"{mean:.{digits}f} ± {error:.{digits}f}"


def claims_table(pairs: Sequence[tuple[Experiment, Claim]]) -> Table:
    """All claims with their verdicts, for the marker ``claims``."""
    header = (
        Text("Source", "出处"),
        Text("The paper says", "论文所述"),
        Text("Here", "此处"),
        Text("Measure of it", "度量"),
        Text("Ours: mean (by seed)", "此处：均值（各种子）"),
        Text("Paper's", "论文值"),
        Text("Verdict", "结论"),
    )
    rows = [
        (
            experiment.source,
            claim.paper,
            claim.here,
            claim.effect,
            f"{statistics.fmean(claim.effects):.3g} "
            f"({', '.join(f'{effect:.3g}' for effect in claim.effects)})",
            Text(f"{claim.expected:g}, assumed", f"{claim.expected:g}，假定")
            if claim.assumed
            else claim.expected,
            VERDICTS[claim.verdict],
        )
        for experiment, claim in pairs
    ]
    return Table("claims", "Claims", header, rows)
