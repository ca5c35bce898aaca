"""Layer report: what happened to a layer, in numbers, as text and as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from adaround_ext.report.text import as_percent


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The result of one layer in numbers.

    Losses are the reconstruction loss on the calibration data: the squared output error summed over
    output channels and averaged over samples and positions, for the weights as they are stored (but
    "soft"), all with the same treatment of the bias.

    Attributes:
        objective: "gram" or "sampled".
        reason: Why this objective was chosen.
        preset: The settings' preset.
        bits: Of a code.
        starts: The share of rows in which each start was the best.
        scale_candidates: How many scales were tried for each row.
        search_steps: Of the tabu search, a row.
        rounds: How often scales were refitted and the search repeated.
        steps: Of the annealing.
        learning_rate: Of the annealing.
        reg_weight: Of the annealing's regularizer.
        damping: Of the Gram matrix.
        samples: Of the calibration data.
        losses: "nearest", "floor", "ceil" and "stochastic" (one draw, up with the probability of
            the fraction) on the starting grid; each start after its search; "soft" (at the end of
            the annealing) and "hard" (AdaRound's own decision); and "final". The preset "fast"
            leaves out the simple rules, which would take as long as the rest, and for the Gram
            objective the starts.
        energy: The same of the full-precision outputs without bias (sampled: of the outputs that
            the loss sees); ``relative`` divides by it.
        flipped: Share of the weights whose code is not that of rounding to nearest.
        clipped: Share of the weights outside the grid's range.
        undecided: Share with .05 < h(V) < .95 at the end of the annealing.
        fallback_rows: Rows in which rounding to nearest was better and was kept.
        improvable_rows: Rows in which a change of a single code would lower the (damped) loss: 0
            certifies a minimum. None for the sampled objective.
        notes: What is unusual about the calibration data, the scales or the bias.
        seconds: Of each part and in total, of all layers that were solved together.
    """

    objective: str
    reason: str
    preset: str
    bits: int
    starts: dict[str, float]
    scale_candidates: int
    search_steps: int
    rounds: int
    steps: int
    learning_rate: float
    reg_weight: float
    damping: float
    samples: int
    losses: dict[str, float]
    energy: float
    flipped: float
    clipped: float
    undecided: float
    fallback_rows: int
    improvable_rows: int | None
    notes: tuple[str, ...]
    seconds: dict[str, float]

    @property
    def relative(self) -> dict[str, float]:
        """Each loss divided by the energy of the full-precision outputs."""
        return {
            name: loss / self.energy if self.energy else 0.0 for name, loss in self.losses.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """The fields and ``relative`` as plain values."""
        return dataclasses.asdict(self) | {"relative": self.relative}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerReport:
        """The inverse of :meth:`to_dict`.

        Args:
            values: A dict that :meth:`to_dict` made, also after a way through JSON.

        Raises:
            KeyError: It has no notes.
            TypeError: Another field is missing.
        """
        names = {field.name for field in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        return cls(**known | {"notes": tuple(values["notes"])})  # JSON has lists only

    def to_json(self) -> str:
        """:meth:`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2)

    @property
    def change(self) -> str:
        """The relative error of rounding to nearest and the final one, in words."""
        relative = self.relative
        return f"error {relative['nearest']:.3g} -> {relative['final']:.3g}"

    def __repr__(self) -> str:
        return f"LayerReport({self.objective}, {self.preset}, {self.bits} bits, {self.change})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        from adaround_ext.report.templates import table_in_cell

        rows = [
            [name, f"{self.losses[name]:.4g}", as_percent(share)]
            for name, share in self.relative.items()
        ]
        head = ["weights", "loss", "of the outputs' energy"]
        return table_in_cell(str(self), head, rows, self.notes)

    def __str__(self) -> str:
        relative = self.relative
        return (
            f"{self.objective}, {self.preset}, {self.bits} bits: relative output error "
            f"{relative['final']:.3g} (nearest {relative['nearest']:.3g}), "
            f"{self.flipped:.1%} of codes moved, {self.seconds['total']:.2f} s"
        )
