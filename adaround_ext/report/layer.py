"""What happened to a layer: numbers, for people and as JSON."""

from __future__ import annotations

import dataclasses
import json
from typing import Any


@dataclasses.dataclass(frozen=True)
class LayerReport:
    """The result of one layer in numbers.

    losses: the reconstruction loss on the calibration data, the squared output error summed over
    output channels and averaged over samples and positions, for the weights as they are stored
    (but "soft"), all with the same treatment of the bias: "nearest", "floor", "ceil" and
    "stochastic" (one draw, up with the probability of the fraction) on the starting grid; each
    start after its search; "soft" (at the end of the annealing) and "hard" (AdaRound's own
    decision); and "final". The preset "fast" leaves out the simple rules, which would take as long
    as the rest, and for the Gram objective the starts.
    energy: the same of the full-precision outputs without bias (sampled: of the outputs that the
    loss sees); ``relative`` divides by it.
    starts: the share of rows in which each start was the best. damping: of the Gram matrix.
    flipped: share of the weights whose code is not that of rounding to nearest. clipped: share
    outside the grid's range. undecided: share with .05 < h(V) < .95 at the end of the annealing.
    fallback_rows: rows in which rounding to nearest was better and was kept.
    improvable_rows: rows in which a change of a single code would lower the (damped) loss: 0
    certifies a minimum. None for the sampled objective.
    reason: why this objective was chosen. notes: what is unusual about the calibration data, the
    scales or the bias.
    seconds: of each part and in total, of all layers that were solved together.
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
        """Plain values."""
        return dataclasses.asdict(self) | {"relative": self.relative}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LayerReport:
        """The inverse of :meth:`to_dict`."""
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
        from adaround_ext.report.notebook import layer_fragment

        return layer_fragment(self)

    def __str__(self) -> str:
        relative = self.relative
        return (
            f"{self.objective}, {self.preset}, {self.bits} bits: relative output error "
            f"{relative['final']:.3g} (nearest {relative['nearest']:.3g}), "
            f"{self.flipped:.1%} of codes moved, {self.seconds['total']:.2f} s"
        )
