"""Documents and texts of the command line: a plan, a report, two reports."""

from __future__ import annotations

from collections.abc import Iterable
from math import exp, fsum, isfinite, log
from typing import Any

from torch import nn

from adaround_ext.planning.plan import Plan
from adaround_ext.report.model import LayerEntry, ModelReport
from adaround_ext.report.text import as_bytes, as_count, as_percent, as_time

Output = tuple[dict[str, Any] | None, str]  # no document: another process has it
_TOTALS = (
    ("model", "model", str),
    ("mode", "mode", str),
    ("calibration batches", "batches", str),
    ("calibration samples", "samples", str),
    ("layers", "layers", str),
    ("bits a weight", "average_bits", "{:.2f}".format),
    ("error (geometric mean)", "relative_error", as_percent),
    ("nearest (geometric mean)", "nearest_error", as_percent),
    ("codes moved", "flipped", as_percent),
    ("time", "seconds", as_time),
    ("peak memory, host", "host_peak", as_bytes),
    ("peak memory, device", "device_peak", as_bytes),
)


def of_plan(model: nn.Module, plan: Plan, order: str, notes: list[str]) -> Output:
    """What would be quantized; order: "execution" or "definition", that of the layers."""
    total = sum(parameter.numel() for parameter in model.parameters())
    chosen = sum(target.matrix.weight.numel() for target in plan.targets)
    layers: list[dict[str, Any]] = []
    rows = [["layer", "kind", "shape", "parameters", "share", "bits"]]
    for target in plan.targets:
        weight, config = target.matrix.weight, target.config
        kind, share = type(target.matrix.layer).__name__, weight.numel() / total
        layers.append(
            {
                "name": target.name,
                "kind": kind,
                "shape": list(weight.shape),
                "parameters": weight.numel(),
                "share": share,
                "bits": config.bits,
                "granularity": config.granularity,
                "group_size": config.group_size,
                "calls": len(target.calls) if order == "execution" else None,
                "tied": [name for name, _ in target.tied],
            }
        )
        shape = " x ".join(map(str, weight.shape))
        numbers = [as_count(weight.numel()), as_percent(share), str(config.bits)]
        rows.append([target.name, kind, shape, *numbers])
    name = type(model).__name__
    document = {
        "model": name,
        "order": order,
        "parameters": total,
        "quantized_parameters": chosen,
        "layers": layers,
        "skipped": plan.skipped,
        "notes": notes + plan.notes,
    }
    count = f"{len(layers)} layer{'s' * (len(layers) != 1)} to quantize"
    of_all = f"{as_count(chosen)} of {as_count(total)} parameters"
    share_of_all = f" ({as_percent(chosen / total)})" if total else ""
    hint = "" if order == "execution" else " (with --data: of execution)"
    parts = [f"{name}: {count}, {of_all}{share_of_all}, in the order of {order}{hint}"]
    parts += [table(rows, left=3)] if layers else []
    return document, "\n\n".join([*parts, *_remarks(plan.skipped, notes + plan.notes)])


def of_report(report: ModelReport) -> Output:
    """The summary of a report, its worst layers, and what was skipped and noted."""
    worst = [{"name": e.name, "shape": list(e.shape)} | _layer(e) for e in report.worst()]
    remarks = {"skipped": report.skipped, "notes": list(report.notes)}
    document = _summary(report) | {"worst": worst} | remarks
    rows = [["worst layers", "bits", "error", "nearest", "codes moved"]]
    for item in worst:
        shares = [as_percent(item[key]) for key in ("error", "nearest", "flipped")]
        rows.append([item["name"], str(item["bits"]), *shares])
    parts = [str(report), *([table(rows)] if worst else [])]
    return document, "\n\n".join([*parts, *_remarks(report.skipped, report.notes)])


def of_two_reports(paths: tuple[str, str], first: ModelReport, second: ModelReport) -> Output:
    """Both, and layer by layer the errors of those that both have, B's also over A's."""
    left, right = ({entry.name: _layer(entry) for entry in r.layers} for r in (first, second))
    layers: list[dict[str, Any]] = [
        {"name": name, "a": a, "b": right[name], "ratio": _ratio(a["error"], right[name]["error"])}
        for name, a in left.items()
        if name in right
    ]
    ratios = [item["ratio"] for item in layers if item["ratio"] is not None]
    mean = exp(fsum(map(log, ratios)) / len(ratios)) if ratios else None
    only_a = [name for name in left if name not in right]
    only_b = [name for name in right if name not in left]
    a, b = (_summary(r) | {"path": path} for r, path in zip((first, second), paths, strict=True))
    document = {"a": a, "b": b, "ratio": mean, "layers": layers, "only_a": only_a, "only_b": only_b}

    rows = [["layer", "bits A", "bits B", "error A", "error B", "B / A"]]
    for item in layers:
        bits = [str(item[side]["bits"]) for side in "ab"]
        errors = [as_percent(item[side]["error"]) for side in "ab"]
        rows.append([item["name"], *bits, *errors, _times(item["ratio"])])
    totals = [["", "A", "B"], ["file", *paths]]
    for title, key, shown in _TOTALS:
        if a[key] is not None or b[key] is not None:
            totals.append([title, *("-" if s[key] is None else shown(s[key]) for s in (a, b))])
    totals.append(["error, B / A of both's layers", "", _times(mean)])
    parts = [table(rows)] if layers else []
    parts.append(table(totals))
    parts += [f"only in A: {', '.join(only_a)}"] if only_a else []
    parts += [f"only in B: {', '.join(only_b)}"] if only_b else []
    return document, "\n\n".join(parts)


def table(rows: list[list[str]], left: int = 1) -> str:
    """Columns two spaces apart; the first ``left`` of them begin on the left."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _summary(report: ModelReport) -> dict[str, Any]:
    return {
        "model": report.model,
        "mode": report.mode,
        "seed": report.seed,
        "layers": len(report.layers),
        "parameters": report.parameters,
        "quantized_parameters": report.quantized_parameters,
        "average_bits": report.average_bits,
        "relative_error": report.relative_error,
        "nearest_error": report.nearest_error,
        "flipped": report.flipped,
        "batches": report.batches,
        "samples": report.samples,
        "seconds": report.seconds.get("total"),
        "host_peak": report.memory.get("host_peak"),
        "device_peak": report.memory.get("device_peak"),
        "versions": report.versions,
    }


def _layer(entry: LayerEntry) -> dict[str, Any]:
    relative = entry.report.relative
    return {
        "bits": entry.config["bits"],
        "error": relative["final"],
        "nearest": relative["nearest"],
        "flipped": entry.report.flipped,
        "seconds": entry.report.seconds.get("total"),
    }


def _ratio(a: float, b: float) -> float | None:
    """b / a, or None where that says nothing."""
    return b / a if a > 0 and b > 0 and isfinite(a) and isfinite(b) else None


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.3f}"


def _remarks(skipped: dict[str, str], notes: Iterable[str]) -> list[str]:
    remarks = {
        "skipped": [f"{name or 'the model'}: {why}" for name, why in skipped.items()],
        "notes": list(notes),
    }
    return [
        "\n".join([f"{title}:", *(f"  {x}" for x in xs)]) for title, xs in remarks.items() if xs
    ]
