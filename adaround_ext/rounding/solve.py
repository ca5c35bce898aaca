"""Results of problems: what is solved as one, and a result with its report for each layer."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from adaround_ext.config import AdaRoundConfig
from adaround_ext.distributed import ALONE, Ranks
from adaround_ext.grid import scale_notes
from adaround_ext.layers.matrix import MatrixLayer
from adaround_ext.presets import Settings, settings
from adaround_ext.report.layer import LayerReport
from adaround_ext.result import LayerResult
from adaround_ext.rounding.problem import Outcome, Problem


def solve(
    problems: Sequence[Problem], config: AdaRoundConfig, ranks: Ranks = ALONE
) -> list[LayerResult]:
    """Grid, search, report: a result a layer of all the problems, in their order.

    Several problems are solved as one, see :meth:`Problem.join`. ranks: those that all have this
    one problem, and share its rows.
    """
    first, *others = problems
    outcome = first.join(others).solve(config, ranks)
    chosen = settings(config, first.kind, first.weight.shape[1])
    weight_q = outcome.grid.stored(outcome.codes, first.dtype)
    results = []
    begin = 0
    for problem, layer in [(p, layer) for p in problems for layer in p.layers]:
        rows = slice(begin, begin + layer.rows)
        begin = rows.stop
        scale_rows = slice(rows.start, rows.start + 1) if _one_scale(config) else rows
        scale = outcome.grid.scale[scale_rows]
        notes = problem.notes + scale_notes(scale, config.scale_dtype)
        results.append(
            LayerResult(
                layer.weight_from_matrix(weight_q[rows]).contiguous(),
                outcome.codes[rows].contiguous(),
                scale.clone(),
                outcome.grid.zero_point[scale_rows].clone(),
                bias=None if outcome.bias is None else outcome.bias[rows].to(first.dtype),
                report=_report(problem, layer, outcome, rows, config, chosen, notes),
            )
        )
    return results


def _report(
    problem: Problem,
    layer: MatrixLayer,
    outcome: Outcome,
    rows: slice,
    config: AdaRoundConfig,
    chosen: Settings,
    notes: tuple[str, ...],
) -> LayerReport:
    """Of the layer that has these rows of the outcome."""
    counts = {name: int(count[rows].sum()) for name, count in outcome.counts.items()}
    weights = max(layer.rows * layer.cols, 1)
    improvable = outcome.row_flags.get("improvable")
    return LayerReport(
        objective=problem.kind,
        reason=problem.reason,
        preset=config.preset,
        bits=config.bits,
        starts={name: _fraction(won[rows]) for name, won in outcome.starts.items()},
        scale_candidates=chosen.scale_candidates,
        search_steps=chosen.search_steps,
        rounds=chosen.rounds,
        steps=chosen.steps,
        learning_rate=chosen.learning_rate,
        reg_weight=chosen.reg_weight,
        damping=problem.objective.damping,
        samples=problem.samples,
        losses={name: float(values[rows].sum()) for name, values in outcome.losses.items()},
        energy=float(outcome.energies[rows].sum()),
        fallback_rows=int(outcome.row_flags["fallback"][rows].sum()),
        improvable_rows=None if improvable is None else int(improvable[rows].sum()),
        notes=notes,
        seconds=dict(outcome.seconds),
        **{name: counts.get(name, 0) / weights for name in ("undecided", "flipped", "clipped")},
    )


def _one_scale(config: AdaRoundConfig) -> bool:
    """Whether a layer has one scale."""
    given = config.scale
    return config.granularity == "per_tensor" or (isinstance(given, Tensor) and given.numel() == 1)


def _fraction(mask: Tensor) -> float:
    return int(mask.count_nonzero()) / max(mask.numel(), 1)
