"""Parity reports: the errors of an export's outputs, and whether they are what is promised."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from adaround_ext.checks import some


@dataclass(frozen=True)
class OutputParity:
    """One output, over all batches, against the simulated model's.

    Attributes:
        shape: Of the output, in the first batch.
        max_error: The largest error of an element.
        relative_error: ||a - b||_2 / ||b||_2, b the simulated model's output.
        agreement: The share of the vectors along the last dimension whose largest element is at the
            same place; None for integer outputs.
    """

    shape: tuple[int, ...]
    max_error: float
    relative_error: float
    agreement: float | None


@dataclass(frozen=True)
class RunnerParity:
    """One way of running an export, and what it gave.

    Attributes:
        kind: The export format.
        runner: The runtime and its settings.
        exact: Whether it promises equality.
        note: What differs where it does not, and what restores equality.
        outputs: One for each tensor of the output.
        allowed: The relative error up to which it is right: the tolerance where equality is
            promised, else what arithmetic in 16 bits leaves open, else None: nothing is promised.
        changed: Parameters of a 16-bit model that it has with other bits, which are wrong whatever
            the outputs are.
    """

    kind: str
    runner: str
    exact: bool
    note: str
    outputs: tuple[OutputParity, ...]
    allowed: float | None = None
    changed: tuple[str, ...] = ()

    @property
    def relative_error(self) -> float:
        """The relative error of the worst output."""
        return max((output.relative_error for output in self.outputs), default=0.0)

    @property
    def ok(self) -> bool:
        """Whether it gives what it promises."""
        within = self.allowed is None or self.relative_error <= self.allowed
        return within and not self.changed

    def __str__(self) -> str:
        if not self.ok:
            verdict = "WRONG"
        elif self.allowed is None:
            verdict = "differs"
        else:
            verdict = "equal" if self.exact else f"equal up to {self.allowed:.2g}"
        lines = [f"  {self.kind}, {self.runner}: {verdict}"]
        for index, output in enumerate(self.outputs):
            agree = "" if output.agreement is None else f", argmax {output.agreement:.2%} equal"
            lines.append(
                f"    output {index} {list(output.shape)}: relative error "
                f"{output.relative_error:.2g}, largest {output.max_error:.2g}{agree}"
            )
        if self.changed:
            lines.append(f"    other weights than the model's: {some(self.changed)}")
        if self.note:
            lines.append(f"    {self.note}")
        return "\n".join(lines)


@dataclass(frozen=True)
class ParityReport:
    """All that :func:`adaround_ext.verify` ran; ``ok`` is whether it gave what it promises.

    Attributes:
        model: The class of the simulated model.
        batches: How many were compared.
        tolerance: The relative error that counts as equal.
        runs: One for each way of running each export.
        notes: Which parameter of ``forward`` got what of a batch, where that is not plain.
    """

    model: str
    batches: int
    tolerance: float
    runs: tuple[RunnerParity, ...]
    notes: tuple[str, ...] = ()

    @property
    def ok(self) -> bool:
        """Whether outputs are equal up to the tolerance, or to what 16 bits allow."""
        return all(run.ok for run in self.runs)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return asdict(self) | {"ok": self.ok}

    def __str__(self) -> str:
        lines = [
            f"{self.model}: exported and simulated model on {self.batches} batches, "
            f"{'equal' if self.ok else 'NOT EQUAL'} where equality is promised "
            f"(relative error at most {self.tolerance:g})",
            *(f"  {note}" for note in self.notes),
        ]
        lines += map(str, self.runs)
        return "\n".join(lines)
