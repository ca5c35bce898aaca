"""Figures in README.md and docs/measured.md are those of the files under benchmarks/results."""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.support import documents

# A cell's numbers; a row's cells, None where a cell is text; a table's rows.
Cell = tuple[float, ...] | None
Rows = list[list[Cell]]
BITS = (4, 3, 2)
PRESETS = ("fast", "balanced", "best")
_NUMBER = re.compile(r"(?<![\w.])(?:\d{1,3}(?:,\d{3})+|\d*\.\d+|\d+)(?:e-\d+)?")


def result(name: str, machine: str = "cpu-2core") -> Any:
    return json.loads(documents.read(f"benchmarks/results/{machine}/{name}.json"))


def results(name: str, machine: str = "cpu-2core") -> Any:
    return result(name, machine)["results"]


def mean(rows: Iterable[dict[str, Any]], key: str = "held_out") -> float:
    return statistics.geometric_mean([row[key] for row in rows])


def chosen(rows: Iterable[dict[str, Any]], **values: Any) -> list[dict[str, Any]]:
    return [row for row in rows if all(row[key] == value for key, value in values.items())]


def one(rows: Iterable[dict[str, Any]], **values: Any) -> dict[str, Any]:
    (row,) = chosen(rows, **values)
    return row


def span(values: Iterable[float]) -> tuple[float, ...]:
    """The least and the most, one number where both are shown as the same."""
    low, *_, high = sorted(values)
    return (low,) if round(low) == round(high) else (low, high)


def encoder_rows(runs: Iterable[tuple[str, str | None]]) -> Iterable[list[list[dict[str, Any]]]]:
    for method, mode in runs:
        yield [chosen(results("embeddings"), method=method, mode=mode, bits=b) for b in BITS]


def readme_encoder() -> Rows:
    runs = [("nearest", None), ("gptq", None), ("fast", "sequential"), ("balanced", "sequential")]
    return [
        [None, *((row["distance"],) for (row,) in rows), span(row["seconds"] for (row,) in rows)]
        for rows in encoder_rows(runs)
    ]


def encoder() -> Rows:
    modes = ("parallel", "sequential")
    runs = [("nearest", None), ("gptq", None)]
    runs += [(method, mode) for mode in modes for method in ("fast", "balanced")]
    return [
        [
            None,
            None,
            *((row["distance"],) for (row,) in rows),
            span(row["seconds"] for (row,) in rows),
            span(row["peak_mb"] for (row,) in rows) if rows[0][0]["mode"] else (),
        ]
        for rows in encoder_rows(runs)
    ]


def methods() -> Rows:
    rows = chosen(results("quality")["means"], family="minilm", granularity="channel")
    names = ("nearest", "stochastic", "descent", "gptq", "gptq-ours", *PRESETS)
    return [
        [
            None,
            *((one(rows, method=name, bits=b)["held_out"],) for b in BITS),
            (mean(chosen(rows, method=name), "seconds"),),
        ]
        for name in names
    ]


def presets() -> Rows:
    means = chosen(results("quality")["means"], family="minilm", granularity="channel")
    loop = results("quality")["reference"]
    table: Rows = []
    for name in PRESETS:
        own = [one(means, method=name, bits=b) for b in BITS]
        over = tuple(
            mean(chosen(loop, method=name, bits=b)) / mean(chosen(loop, method="reference", bits=b))
            for b in BITS
        )
        seconds: tuple[float, ...] = (mean(own, "seconds"),)
        if name == "fast":
            seconds += (mean(chosen(means, method="gptq"), "seconds"),)
        speed = mean(chosen(loop, method="reference"), "seconds") / mean(
            chosen(loop, method=name), "seconds"
        )
        table.append([None, tuple(row["held_out_of_gptq"] for row in own), over, seconds, (speed,)])
    return table


def loop() -> Rows:
    rows = results("quality")["reference"]
    layers = ("query", "attn.output", "intermediate", "output")

    def over(layer: str, bits: int) -> Cell:
        ours, theirs = (
            one(rows, layer=f"3.{layer}", bits=bits, method=name)["held_out"]
            for name in ("balanced", "reference")
        )
        return (ours / theirs,)

    return [[None, *(over(layer, bits) for bits in BITS)] for layer in layers]


def over_gptq() -> Rows:
    groups = results("quality_group")["means"]
    cnn = chosen(results("quality")["means"], family="cnn", granularity="channel")

    def row(rows: list[dict[str, Any]], key: str) -> list[Cell]:
        ratios = [tuple(one(rows, method=p, bits=b)[key] for p in PRESETS) for b in BITS]
        return [None, *ratios]

    return [
        row(groups, "held_out_of_gptq"),
        row(groups, "seconds_of_gptq"),
        row(cnn, "held_out_of_gptq"),
    ]


def digits() -> Rows:
    rows = results("digits")["rows"]

    def accuracy(**values: Any) -> Cell:
        found = [row["accuracy"] for row in chosen(rows, **values)]
        return statistics.mean(found), statistics.stdev(found) / math.sqrt(len(found))

    table: Rows = []
    for net in ("residual", "separable"):
        for bits in BITS:
            for granularity in ("per_tensor", "per_channel"):
                same = {"net": net, "bits": bits, "granularity": granularity}
                first = bits == 4 and granularity == "per_tensor"
                full = accuracy(method="full", **same) if first else ()
                others = ("nearest", "reference", "fast", "balanced")
                cells = [accuracy(method=name, **same) for name in others]
                table.append([None, (bits,), None, full, *cells])
    return table


def networks() -> Rows:
    small = [results(f"shapes_{name}_256")[0] for name in ("resnet18", "mobilenet_v2")]
    large = results("shapes_cnn", "h200")
    rows = [(row, row["peak_mb"]) for row in small]
    rows += [(row, row["device_peak_mb"]) for row in large]
    return [
        [None, (row["samples"],), None, (row["seconds"],), (peak / 1000,)] for row, peak in rows
    ]


def layers() -> Rows:
    return [
        [
            None,
            None,
            (row["held_out_nearest"],),
            (row["held_out"],),
            (row["seconds"],),
            () if row["held_out_reference"] is None else (row["held_out_reference"],),
            (row["reference_seconds"],),
        ]
        for row in results("convolutions") + results("layer", "h200")
    ]


def step() -> Rows:
    table: Rows = []
    for row in chosen(results("ops"), op="rounding_step_"):
        size = math.prod(row["shape"])
        loss = row["seconds"]["compiled backward, fused Adam"]["median"] * 1e9 / size
        ns = row["ns_per_weight"]
        floor = row["floor_ns_per_weight_out_of_cache"]
        values = (ns["ours"], ns["eager"], loss, ns["compiled"], floor)
        table.append([None, *((value,) for value in values)])
    return table


def exports() -> Rows:
    files = ("deploy_minilm", "deploy_digits")

    def errors(file: str, form: str, runner: str) -> list[float]:
        rows = [row for row in results(file) if "quantized activations" not in row["settings"]]
        runs = [run for row in chosen(rows, format=form) for run in row.get("runs", [])]
        return [run["relative_error"] for run in chosen(runs, runner=runner)]

    def worst(form: str, *runners: str) -> list[Cell]:
        cells = [[errors(file, form, name) for name in runners] for file in files]
        return [tuple(max(found) for found in cell if found) for cell in cells]

    def default(runner: str) -> Cell:
        ranges = [errors(file, "onnx", runner) for file in files]
        return tuple(value for found in ranges for value in (min(found), max(found)))

    aimet: dict[str, float] = {"MiniLM": 0.0, "digits": 0.0}
    for row in results("aimet_peer"):
        if "activations" not in row["case"]:
            net = next(name for name in aimet if row["case"].startswith(name))
            aimet[net] = max(aimet[net], row["aimet"])
    encodings = worst("aimet", "onnxruntime with AIMET encodings")
    cells: list[tuple[list[Cell], Cell]] = [
        (worst("safetensors", "load_quantized", "QuantLinear, QuantConv"), ()),
        (worst("onnx", "onnxruntime, accuracy level 0"), default("onnxruntime, default")),
        (worst("onnx", "openvino, float32"), default("openvino, default")),
        (worst("compressed-tensors", "transformers"), ()),
        (worst("torchao", "torch.export"), ()),
        ([(*(own or ()), b) for own, b in zip(encodings, aimet.values(), strict=True)], ()),
        (worst("gguf", "gguf-py"), ()),
    ]
    return [[None, None, *errors_of_both, last] for errors_of_both, last in cells]


def versions() -> Rows:
    return [
        [None, None, None, *((row[key],) for key in ("passed", "skipped", "failed"))]
        for row in result("compatibility")
    ]


# By the beginnings of their first lines.
MEASURED: dict[str, Callable[[], Rows]] = {
    "| | inputs from |": encoder,
    "| method |": methods,
    "| preset |": presets,
    "| layer of block 3 |": loop,
    "| `fast` / `balanced` / `best` |": over_gptq,
    "| network | bits |": digits,
    "| shapes of |": networks,
    "| layer | on |": layers,
    "| weight |": step,
    "| format |": exports,
    "| Python | torch |": versions,
}
TABLES = {("docs/measured.md", head): rows for head, rows in MEASURED.items()}
TABLES["README.md", "| | 4 bits |"] = readme_encoder


def table_of(name: str, head: str) -> list[list[str]]:
    """The rows of the one table of a document whose first line begins with ``head``."""
    cells = [cell.strip() for cell in head.strip("|").split("|")]
    (rows,) = (table for table in documents.tables(name) if table[0][: len(cells)] == cells)
    return rows[1:]


def shows(text: str, value: float) -> bool:
    """Whether a number is the value rounded to its last digit, above 1,000 to the last but 0."""
    mantissa, _, exponent = text.replace(",", "").partition("e")
    whole, _, decimals = mantissa.partition(".")
    zeros = len(whole) - len(whole.rstrip("0")) if len(whole) > 3 and not decimals else 0
    unit = 10.0 ** (int(exponent or 0) - len(decimals) + zeros)
    return abs(float(f"{mantissa}e{exponent or 0}") - value) <= 0.5001 * unit


@pytest.mark.parametrize(("name", "head"), TABLES)
def test_tables(name: str, head: str) -> None:
    rows, expected = table_of(name, head), TABLES[name, head]()
    assert len(rows) == len(expected)
    for row, values in zip(rows, expected, strict=True):
        for cell, numbers in zip(row, values, strict=True):
            if numbers is None:
                continue
            said = _NUMBER.findall(cell)
            assert len(said) == len(numbers), f"{row}: {cell} is {numbers}"
            for text, value in zip(said, numbers, strict=True):
                assert shows(text, value), f"{row}: {text} is {value}"


def test_all_tables_of_figures_are_compared() -> None:
    assert len(documents.tables("docs/measured.md")) == len(MEASURED) + 1  # that of the files
    assert len(documents.tables("README.md")) == 1


def test_files_and_commits() -> None:
    """The last table has the commit and day of each file, and all files of the other tables."""
    rows = table_of("docs/measured.md", "| file |")
    for link, command, commit, day in rows:
        match = re.fullmatch(r"\[(.+)\]\(\.\./benchmarks/results/(.+)\)", link)
        assert match is not None and match[1] == match[2] and command
        document = json.loads(documents.read(f"benchmarks/results/{match[1]}"))
        if isinstance(document, list):
            assert (commit, day) == ("in each row", "")
            continue
        machine = document["machine"]
        changes = "" if machine["commit_is_clean"] else " and changes"
        assert commit == f"`{machine['commit'][:7]}`{changes}", match[1]
        assert day == machine["time"][:10], match[1]
    files = {row[0].rpartition("/")[2].rstrip(")") for row in rows}
    named = set(re.findall(r"`(?:h200/)?(\w+\.json)`", documents.prose("docs/measured.md")))
    assert named <= files


def test_figures_in_the_text() -> None:
    text = " ".join(documents.prose("docs/measured.md").split())
    rows = results("digits")["rows"]
    ratios: dict[bool, list[float]] = {True: [], False: []}
    for row in chosen(rows, method="balanced", seed=0):
        same = {key: row[key] for key in ("net", "bits", "granularity")}
        ours, theirs = (
            sum(r["error"] for r in chosen(rows, method=name, **same))
            for name in ("balanced", "reference")
        )
        ratios[row["bits"] == 2].append(ours / theirs)
    low, high = ratios[True], ratios[False]
    said = (
        f"has {min(high):.2f} to {max(high):.2f} of the reference's at 4 and 3 bits and "
        f"{min(low):.2f} to {max(low):.2f} at 2"
    )
    assert said in text
    fused = [row["matmul_nbits"] for row in results("deploy_minilm") if "matmul_nbits" in row]
    assert {sum(row[key] for row in fused) for key in ("products", "matmul_nbits")} == {180}
    assert "all 180 exported Linears" in text
    step_rows = chosen(results("ops"), op="rounding_step_", in_cache=False)
    assert max(row["ours_over_floor"] for row in step_rows) < 1.4


def test_the_result_that_the_readme_begins_with() -> None:
    text = " ".join(documents.prose("README.md").split())
    rows = chosen(results("embeddings"), bits=4)
    own = one(rows, method="balanced", mode="sequential")
    over = own["distance"] / one(rows, method="gptq")["distance"]
    assert f"{over:.2f} of GPTQ's error, after {own['seconds']:.0f} seconds" in text


@pytest.mark.parametrize(
    ("text", "value", "equal"),
    [
        (".0136", 0.01364, True),
        (".0136", 0.01366, False),
        ("1,200", 1160.0, True),
        ("1,200", 1260.0, False),
        ("1.8e-6", 1.84e-6, True),
        ("1.8e-6", 1.9e-6, False),
        ("0", 0.0, True),
        ("0", 1e-6, True),
        ("13", 12.6, True),
        ("10", 14.0, False),
    ],
)
def test_a_number_is_compared_to_its_last_digit(text: str, value: float, equal: bool) -> None:
    assert shows(text, value) == equal
