"""ModelReport: files, numbers, and the text."""

from __future__ import annotations

import copy
import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from adaround_ext import AdaRoundConfig, LayerReport
from adaround_ext.report.model import LayerEntry, ModelReport

SCRIPT = "<script>alert(1)</script>"
VOID = {"meta", "br", "link", "img", "input", "hr"}


def layer_report(nearest: float = 0.02, final: float = 0.01, **changes: Any) -> LayerReport:
    return LayerReport(
        **{
            "objective": "gram",
            "reason": "as set",
            "preset": "fast",
            "bits": 4,
            "starts": {"gptq": 1.0},
            "scale_candidates": 2,
            "search_steps": 0,
            "rounds": 0,
            "steps": 0,
            "learning_rate": 0.05,
            "reg_weight": 1.0,
            "damping": 0.3,
            "samples": 64,
            "losses": {"nearest": 4 * nearest, "final": 4 * final},
            "energy": 4.0,
            "flipped": 0.125,
            "clipped": 0.01,
            "undecided": 0.0,
            "fallback_rows": 1,
            "improvable_rows": None,
            "notes": (),
            "seconds": {"search": 0.5, "total": 1.5},
        }
        | changes
    )


def layer(
    name: str = "a",
    shape: tuple[int, ...] = (8, 16),
    report: LayerReport | None = None,
    settings: dict[str, Any] | None = None,
    **changes: Any,
) -> LayerEntry:
    config = AdaRoundConfig(preset="fast", **(settings or {})).to_dict()
    values: dict[str, Any] = {
        "kind": "Linear",
        "calls": 1,
        "block": None,
        "shared_inputs": (),
        "tied": (),
    }
    return LayerEntry(
        name=name, shape=shape, config=config, report=report or layer_report(), **values | changes
    )


def model(*layers: LayerEntry, **changes: Any) -> ModelReport:
    values: dict[str, Any] = {
        "model": "Net",
        "mode": "sequential",
        "layers": layers,
        "skipped": {"embedding": "not a Linear or convolution"},
        "blocks": ("block.0", "block.1"),
        "parameters": 1000,
        "passes": 3,
        "batches": 2,
        "samples": 64,
        "notes": ("1 batch norm folded",),
        "seconds": {"calibration": 0.25, "solving": 3.0, "total": 455.0},
        "memory": {"host_before": 1 << 20, "host_peak": 3 << 30},
        "versions": {"torch": "2.13.0"},
        "seed": 7,
    }
    return ModelReport(**values | changes)


def varied() -> ModelReport:
    return model(
        layer("block.0.a", block="block.0", shared_inputs=("block.0.b",), settings={"bits": 8}),
        layer("block.0.b", block="block.0", report=layer_report(0.5, 0.3, notes=("odd", "data"))),
        layer(
            "block.1.c",
            (4, 6, 3, 3),
            layer_report(0.1, 0.04, improvable_rows=2),
            {"granularity": "per_group", "group_size": 9, "symmetric": False},
            kind="Conv2d",
            block="block.1",
            tied=("d",),
        ),
        layer("e", settings={"scale": torch.ones(8, 1), "scale_dtype": torch.bfloat16}, rows=8),
    )


@pytest.mark.parametrize("report", [varied(), model(), model(layer(SCRIPT))])
def test_round_trip(tmp_path: Path, report: ModelReport) -> None:
    assert ModelReport.from_dict(report.to_dict()) == report
    assert ModelReport.from_dict(json.loads(report.to_json())) == report
    report.save(tmp_path / "report.json")
    report.save(str(tmp_path / "report.json"))
    back = ModelReport.load(tmp_path / "report.json")
    assert back == report
    assert hash(back.blocks) == hash(report.blocks)  # tuples again
    assert os.listdir(tmp_path) == ["report.json"]


def test_dict_has_the_format_and_relative_errors() -> None:
    values = varied().to_dict()
    assert values["format"] == "adaround_ext.model_report.1"
    assert values["layers"][1]["report"]["relative"]["final"] == pytest.approx(0.3)


def test_failed_save_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    model().save(path)

    def fail(*arguments: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        varied().save(path)
    assert os.listdir(tmp_path) == ["report.json"]
    assert ModelReport.load(path) == model()


def test_load_of_no_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        ModelReport.load(tmp_path / "report.json")


@pytest.mark.parametrize(
    "content", [b"", b"{}", b"[]", b"3", b"\xff\xfe\x00", b'{"format": 1}', b"[" * 100_000]
)
def test_load_of_another_file(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "report.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"report\.json must be a file written by ModelReport"):
        ModelReport.load(path)


@pytest.mark.parametrize(
    ("where", "value", "message"),
    [
        (("format",), "adaround_ext.layer.2", "of format 'adaround_ext.model_report.1', got 'ada"),
        (("extra",), 1, "unknown 'extra'"),
        (("seed",), None, "seed must be int"),
        (("seed",), True, "seed must be int"),
        (("model",), 3, "model must be str"),
        (("layers",), {}, "layers must be a list"),
        (("notes",), "note", "notes must be a list"),
        (("blocks",), [1], r"blocks\[0\] must be str"),
        (("skipped",), [], "skipped must be a dict"),
        (("seconds", "total"), "long", "seconds.total must be float"),
        (("layers", 0, "shape"), [2.5], r"layers\[0\].shape\[0\] must be int"),
        (("layers", 0, "extra"), 1, r"layers\[0\] must .* unknown 'extra'"),
        (("layers", 1, "config", "extra"), 1, r"layers\[1\].config must .* unknown 'extra'"),
        (("layers", 1, "report", "extra"), 1, r"layers\[1\].report must .* unknown 'extra'"),
        (("layers", 1, "report"), 1, r"layers\[1\].report must be a dict"),
    ],
)
def test_refused_values(where: tuple[Any, ...], value: Any, message: str) -> None:
    values = json.loads(varied().to_json())
    target = values
    for key in where[:-1]:
        target = target[key]
    target[where[-1]] = value
    with pytest.raises(ValueError, match=message):
        ModelReport.from_dict(values)


@pytest.mark.parametrize("inside", [(), ("layers", 0), ("layers", 0, "report")])
def test_missing_keys_are_refused(inside: tuple[Any, ...]) -> None:
    values = json.loads(varied().to_json())
    target = values
    for key in inside:
        target = target[key]
    for name in set(target) - {"relative"}:
        removed = target.pop(name)
        message = "got None" if name == "format" else f"got missing '{name}'"
        with pytest.raises(ValueError, match=message):
            ModelReport.from_dict(copy.deepcopy(values))
        target[name] = removed
    assert ModelReport.from_dict(values) == varied()


@pytest.mark.parametrize(
    ("shape", "settings", "changes", "bits"),
    [
        ((8, 16), {"granularity": "per_tensor"}, {}, 4 * 128 + 32),
        ((8, 16), {}, {}, 4 * 128 + 8 * 32),
        ((8, 16), {"scale_dtype": torch.float16}, {}, 4 * 128 + 8 * 16),
        ((8, 16), {"bits": 3, "symmetric": False}, {}, 3 * 128 + 8 * (32 + 3)),
        ((8, 16), {"granularity": "per_group", "group_size": 4}, {}, 4 * 128 + 32 * 32),
        (
            (8, 16),
            {
                "granularity": "per_group",
                "group_size": 8,
                "symmetric": False,
                "bits": 2,
                "scale_dtype": torch.bfloat16,
            },
            {},
            2 * 128 + 16 * (16 + 2),
        ),
        ((6, 4, 3, 3), {}, {"kind": "Conv2d"}, 4 * 216 + 6 * 32),
        # [in, out / groups, *kernel]: a row for each output channel.
        ((6, 4, 3, 3), {}, {"kind": "ConvTranspose2d"}, 4 * 216 + 4 * 32),
        ((6, 4, 3, 3), {}, {"kind": "ConvTranspose2d", "rows": 8}, 4 * 216 + 8 * 32),
    ],
)
def test_average_bits(
    shape: tuple[int, ...], settings: dict[str, Any], changes: dict[str, Any], bits: int
) -> None:
    report = model(layer(shape=shape, settings=settings, **changes))
    weights = torch.Size(shape).numel()
    assert report.quantized_parameters == weights
    assert report.average_bits == bits / weights


def test_average_bits_of_several_layers() -> None:
    report = model(layer("a", (8, 16)), layer("b", (2, 4), settings={"bits": 8}))
    assert report.average_bits == (4 * 128 + 8 * 32 + 8 * 8 + 2 * 32) / 136
    assert model(layer(shape=(0, 16))).average_bits == 0.0


def test_tied_weights_count_once() -> None:
    first = layer("a", (8, 16), tied=("b",))
    alone = model(first)
    both = model(first, layer("b", (8, 16), tied=("a",)))
    assert alone.quantized_parameters == both.quantized_parameters == 128
    assert alone.average_bits == both.average_bits == 6.0


def test_errors_are_geometric_means() -> None:
    report = model(layer(report=layer_report(0.4, 0.1)), layer(report=layer_report(0.1, 0.001)))
    assert report.relative_error == pytest.approx(0.01)
    assert report.nearest_error == pytest.approx(0.2)
    exact = layer(report=layer_report(0.0, 0.0))
    assert model(*report.layers, exact).relative_error == pytest.approx(0.01)
    assert model(exact).relative_error == model().nearest_error == 0.0


def test_flipped_is_weighted() -> None:
    first = layer("a", (8, 16), layer_report(flipped=0.5))
    assert model(first, layer("b", (8, 48), layer_report(flipped=0.1))).flipped == 0.2


def test_worst_layers_come_first() -> None:
    errors = {"a": 0.2, "b": 0.01, "c": 0.5, "d": 0.2, "e": float("nan")}
    report = model(*(layer(name, report=layer_report(1.0, e)) for name, e in errors.items()))
    assert "".join(entry.name for entry in report.worst()) == "ecadb"
    assert [entry.name for entry in report.worst(2)] == ["e", "c"]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        report.worst(0)


def test_text_has_the_numbers() -> None:
    text = str(varied())
    assert len(text.splitlines()) <= 15
    for piece in (
        "Net: 4 layers at",
        f"{varied().average_bits:.2f} bits",
        "sequential, seed 7",
        "600 of 1000 parameters",
        "64 samples in 2 batches, 3 passes",
        f"{varied().relative_error / varied().nearest_error:.2f} times nearest's",
        "7 min 35 s (solving 3.00 s, calibration 0.25 s)",
        "host 3.00 GiB",
        "block.0.b: 30 % (nearest 50 %)",
        "block.1.c: 4 % (nearest 10 %)",
        "skipped      1",
    ):
        assert piece in text
    assert str(model()).startswith("Net: 0 layers")


@pytest.mark.parametrize("module", ["adaround_ext.model_report", "adaround_ext.report.model"])
def test_pickles_of_earlier_versions(module: str) -> None:
    """They name the classes where they stood."""
    report = varied()
    data = pickle.dumps(report, protocol=0)
    assert pickle.loads(data) == report
    for name in ("LayerEntry", "ModelReport"):
        assert f"cadaround_ext\n{name}\n".encode() in data
        data = data.replace(f"cadaround_ext\n{name}\n".encode(), f"c{module}\n{name}\n".encode())
    assert pickle.loads(data) == report
