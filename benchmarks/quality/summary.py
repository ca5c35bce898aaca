"""Results in few numbers: geometric means over layers, tables, targets."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import common
from benchmarks.common import Target
from benchmarks.quality.methods import TITLES

Rows = list[dict[str, Any]]
# The most that the held-out error may be of GPTQ's, and of the reference's on its rows.
_MOST_OF_GPTQ = {"fast": 1.0, "balanced": 0.85, "best": 0.80}
_MOST_OF_REFERENCE = {"balanced": 0.75, "best": 0.70}
_LEAST_SPEEDUP = {"balanced": 30.0, "best": 10.0}
_MOST_GPTQ_SECONDS = 2.0  # of fast
_NAMES = {"minilm": "MiniLM's Linear layers", "cnn": "The CNN's convolutions"}


def means(layers: Rows) -> Rows:
    """Geometric means over layers by family, granularity, bits and method; ratios to GPTQ's."""
    groups = _grouped(layers, ("family", "granularity", "bits", "method"))
    averages = []
    for (family, granularity, bits, method), rows in groups.items():
        row = {
            "family": family,
            "granularity": granularity,
            "bits": bits,
            "method": method,
            "layers": len(rows),
        }
        base = groups.get((family, granularity, bits, "gptq"))
        for key in ("held_out", "calibration", "seconds"):
            row[key] = _mean(rows, key)
            row[f"{key}_of_gptq"] = None if base is None else row[key] / _mean(base, key)
        averages.append(row)
    return averages


def of_reference(rows: Rows, key: str, method: str, bits: int | None = None) -> float | None:
    """The method's geometric mean over the reference's, on the reference's rows; None if unknown.

    ``key`` is "held_out" or "seconds"; over all bits where these are None.
    """
    chosen = [row for row in rows if bits in (None, row["bits"])]
    ours, other = (
        [row for row in chosen if row["method"] == name] for name in (method, "reference")
    )
    if not ours or any(row[key] is None for row in ours + other):
        return None
    return _mean(ours, key) / _mean(other, key)


def print_tables(results: dict[str, Rows]) -> None:
    for (family, granularity), rows in _grouped(
        results["means"], ("family", "granularity")
    ).items():
        scales = "a scale for each channel" if granularity == "channel" else "groups of 128 columns"
        _print_means(f"{_NAMES[family]} ({rows[0]['layers']}), {scales}", rows)
    if results["reference"]:
        _print_reference(results["reference"])
    if results["model"]:
        _print_model(results["model"])


def targets(results: dict[str, Rows]) -> list[Target]:
    """Those whose numbers were measured."""
    main = [
        row
        for row in results["means"]
        if (row["family"], row["granularity"]) == ("minilm", "channel")
    ]
    goals = []
    for row in main:
        if row["method"] in _MOST_OF_GPTQ and row["held_out_of_gptq"] is not None:
            name = f"{row['method']}, {row['bits']} bits, held-out error over GPTQ's"
            most = _MOST_OF_GPTQ[row["method"]]
            goals.append(Target(name, row["held_out_of_gptq"], most=most))
    fast = [row["seconds_of_gptq"] for row in main if row["method"] == "fast"]
    if fast and None not in fast:
        value = common.geometric_mean(fast)
        goals.append(Target("fast, seconds over GPTQ's", value, most=_MOST_GPTQ_SECONDS))
    goals += _reference_targets(results["reference"]) + _model_targets(results["model"])
    if results["layers"]:
        differing = sum(not row["repeats_agree"] for row in results["layers"])
        goals.append(Target("roundings that differ when repeated", differing, most=0))
    return goals


def _reference_targets(rows: Rows) -> list[Target]:
    goals = []
    for method, most in _MOST_OF_REFERENCE.items():
        for bits in _distinct(rows, "bits"):
            value = of_reference(rows, "held_out", method, bits)
            if value is not None:
                name = f"{method}, {bits} bits, held-out error over the reference's"
                goals.append(Target(name, value, most=most))
    for method, least in _LEAST_SPEEDUP.items():
        seconds = of_reference(rows, "seconds", method)
        if seconds is not None:
            name = f"{method}, times faster than the reference"
            goals.append(Target(name, 1 / seconds, least=least))
    return goals


def _model_targets(rows: Rows) -> list[Target]:
    distances = {(row["bits"], row["method"]): row["held_out"] for row in rows}
    goals = []
    for (bits, method), distance in distances.items():
        if method in ("balanced", "best") and (bits, "gptq") in distances:
            name = f"{method}, {bits} bits, 1 - cosine of embeddings over GPTQ's"
            goals.append(Target(name, distance / distances[bits, "gptq"], most=1.0))
    return goals


def _print_means(title: str, rows: Rows) -> None:
    def columns(row: dict[str, Any]) -> list[Any]:
        return [row["held_out"], row["held_out_of_gptq"], row["calibration"], row["seconds"]]

    names = ["held-out", "/GPTQ", "calibration", "s"]
    _print_by_bits(f"{title}: relative output error, geometric means", rows, names, columns)


def _print_reference(rows: Rows) -> None:
    for bits, some in _grouped(rows, ("bits",)).items():
        layers = _distinct(some, "layer")
        table = []
        for method in _distinct(some, "method"):
            of_method = {row["layer"]: row for row in some if row["method"] == method}
            over = [of_reference(some, key, method) for key in ("held_out", "seconds")]
            table.append(
                [
                    TITLES[method],
                    *(of_method[layer]["held_out"] for layer in layers),
                    over[0],
                    _mean(list(of_method.values()), "seconds"),
                    None if over[1] is None else 1 / over[1],
                ]
            )
        counts = sorted({row["rows"] for row in some})
        title = (
            f"The first {', '.join(map(str, counts))} rows, {bits[0]} bits: held-out error, and "
            "seconds of a whole layer (reference: extrapolated)"
        )
        header = ["method", *layers, "/reference", "s", "times faster"]
        common.print_table(title, header, table)


def _print_model(rows: Rows) -> None:
    names = ["held-out", "unused calibration"]
    title = f"Mean 1 - cosine of sentence embeddings, {rows[0]['layers']} layers replaced"
    _print_by_bits(title, rows, names, lambda row: [row["held_out"], row["calibration_unused"]])


def _print_by_bits(
    title: str, rows: Rows, names: Sequence[str], columns: Callable[[dict[str, Any]], list[Any]]
) -> None:
    """A line for each method, columns for each number of bits."""
    bits = _distinct(rows, "bits")
    table = []
    for method in _distinct(rows, "method"):
        of_method = {row["bits"]: columns(row) for row in rows if row["method"] == method}
        table.append([TITLES[method], *(cell for b in bits for cell in of_method[b])])
    first, *others = names
    header = ["method"]
    for count in bits:
        header += [f"{count} bits {first}", *others]
    common.print_table(title, header, table)


def _grouped(rows: Rows, keys: tuple[str, ...]) -> dict[tuple[Any, ...], Rows]:
    groups: dict[tuple[Any, ...], Rows] = defaultdict(list)
    for row in rows:
        groups[tuple(row[key] for key in keys)].append(row)
    return dict(groups)


def _distinct(rows: Rows, key: str) -> list[Any]:
    return list(dict.fromkeys(row[key] for row in rows))


def _mean(rows: Rows, key: str) -> float:
    return common.geometric_mean([row[key] for row in rows])
