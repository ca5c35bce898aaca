"""How results show themselves: in one line where they are looked at, as HTML in a notebook."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaround_ext import LayerResult, ModelReport, Sensitivity, optimize_layer, quantize_
from tests.report.test_model import SCRIPT, layer, layer_report, model, varied
from tests.report.test_page import Page, many

pytestmark = pytest.mark.usefixtures("one_thread")


def solved(module: nn.Module, *shape: int, **settings: Any) -> LayerResult:
    return optimize_layer(module, torch.randn(64, *shape), preset="fast", **settings)


@pytest.mark.parametrize(
    ("module", "shape", "settings", "said"),
    [
        (nn.Linear(16, 300), (16,), {"bits": 4}, "weight 300x16: 300x16 codes of 4 bits, a scale "
         "per channel"),
        (nn.Linear(16, 8), (16,), {"bits": 3, "granularity": "per_tensor"}, "3 bits, a scale per "
         "tensor"),
        (nn.Linear(16, 8), (16,), {"granularity": "per_group", "group_size": 4}, "per 4 columns"),
        (nn.Linear(16, 1), (16,), {}, "weight 1x16: 1x16 codes of 4 bits, a scale per channel"),
        (nn.Conv2d(2, 6, 3), (2, 5, 5), {"bits": 8}, "weight 6x2x3x3: 6x18 codes of 8 bits"),
    ],
)  # fmt: skip
def test_a_result_is_one_line(
    module: nn.Module, shape: tuple[int, ...], settings: dict[str, Any], said: str
) -> None:
    result = solved(module, *shape, **settings)
    text = repr(result)
    assert text.startswith("LayerResult(") and said in text and "tensor(" not in text
    assert len(text) < 120 and "\n" not in text
    relative = result.report.relative
    assert f"error {relative['nearest']:.3g} -> {relative['final']:.3g})" in text
    assert len(repr([result, result])) < 240


def test_what_a_layer_keeps_is_one_line() -> None:
    net = nn.Sequential(nn.Linear(8, 4))
    report = quantize_(net, torch.randn(32, 8), bits=3, preset="fast", progress=False)
    assert (
        repr(net[0].quantized_weight) == "QuantizedWeight(4x8 codes of 3 bits, a scale per channel)"
    )
    assert repr(report).startswith("ModelReport(Sequential: 1 layer at ")
    assert repr(report.layers[0]).startswith(
        "LayerEntry(0: Linear 4x8, 3 bits, a scale per channel"
    )
    assert max(len(repr(thing)) for thing in (report, report.layers, report.layers[0])) < 200


def test_a_report_of_many_layers_is_one_line() -> None:
    assert len(repr(many(500))) < 200 and "\n" not in repr(many(500))
    assert repr(layer_report(0.5, 0.25)) == "LayerReport(gram, fast, 4 bits, error 0.5 -> 0.25)"
    none = "ModelReport(Net: 0 layers at 0.00 bits a weight, error none; print it for more)"
    assert repr(model()) == none


def test_the_text_says_where_to_look() -> None:
    lines = str(varied()).splitlines()
    assert "  skipped      1, see report.skipped" in lines
    assert "  notes        1, see report.notes" in lines


def sensitivity(**changes: Any) -> Sensitivity:
    values: dict[str, Any] = {
        "model": "Net",
        "layers": ("a", "b"),
        "weights": {"a": 32, "b": 64},
        "bits": (2, 4),
        "local": {"a": {2: 0.5, 4: 0.1}, "b": {2: 0.2, 4: 0.01}},
        "network": {"a": {2: 0.5, 4: 0.1}, "b": {2: 0.2, 4: 0.01}},
        "average_bits": 3.0,
        "batches": 2,
        "notes": (),
    }
    return Sensitivity(**values | changes)


def test_sensitivity_shows_itself() -> None:
    assert repr(sensitivity()) == "Sensitivity(Net: 2 layers at 2, 4 bits; print it for more)"
    assert "notes" not in str(sensitivity())
    assert str(sensitivity(notes=("odd", "data"))).endswith("  notes: 2, see its notes")
    rows = Page(sensitivity()._repr_html_()).rows
    assert rows[1:] == [["a", "32", "50 %", "10 %", "4"], ["b", "64", "20 %", "1 %", "2"]]
    assert [len(row) for row in Page(sensitivity(average_bits=None)._repr_html_()).rows[1:]] == [
        4,
        4,
    ]


@pytest.mark.parametrize("report", [varied(), model(), many(1), many(60)], ids=str)
def test_a_notebook_shows_the_report(report: ModelReport) -> None:
    html = report._repr_html_()
    page = Page(html)
    assert page.count.get("circle", 0) == 2 * len(report.layers)
    assert not {"html", "body", "script", "button", "iframe"} & page.count.keys()
    assert not re.search(r"https?://|url\(|@import|<link|<img|\bsrc=|\bhref=", html)
    rows = [row for row in page.rows if len(row) == 14]
    assert [row[1] for row in rows] == [e.name for e in report.worst(max(1, len(report.layers)))]
    for text in (*report.skipped, *report.notes):
        assert text in html


def test_a_notebook_is_not_restyled() -> None:
    """All rules are nested in one for the report's own class."""
    html = varied()._repr_html_()
    (style,) = re.findall(r"<style>(.*?)</style>", html, re.S)
    assert style.startswith(".adaround-report {") and style.endswith("}")
    depth, outside = 0, 0
    for letter in style:
        depth += {"{": 1, "}": -1}.get(letter, 0)
        outside += depth == 0
    assert (depth, outside) == (0, len(".adaround-report ") + 1)
    assert ":root" not in style and not re.search(r"(?<!& )\bbody \{", style)


def test_a_notebook_trusts_no_string() -> None:
    entry = layer(SCRIPT, report=layer_report(notes=(f"note {SCRIPT}",)), kind=f"kind{SCRIPT}")
    skipped = {f"skipped{SCRIPT}": f"reason{SCRIPT}"}
    report = model(entry, model=f"model{SCRIPT}", notes=(f"all{SCRIPT}",), skipped=skipped)
    found = sensitivity(
        model=SCRIPT, layers=(SCRIPT,), weights={SCRIPT: 8}, notes=(SCRIPT,),
        local={SCRIPT: {2: 1.0, 4: 0.5}}, network={SCRIPT: {2: 1.0, 4: 0.5}},
    )  # fmt: skip
    reports = layer_report(notes=(SCRIPT,), objective=SCRIPT, losses={"nearest": 1.0, "final": 0.5,
                                                                       SCRIPT: 1.0})  # fmt: skip
    for thing in (report, found, reports):
        html = thing._repr_html_()
        assert SCRIPT not in html and "&lt;script&gt;" in html
        Page(html)


def test_a_layer_in_a_notebook() -> None:
    result = solved(nn.Linear(16, 8), 16)
    rows = Page(result._repr_html_()).rows
    assert [row[0] for row in rows[1:]] == list(result.report.losses)
    assert result._repr_html_() == result.report._repr_html_()


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no browser")
@pytest.mark.parametrize("width", [1000, 1200, 1400])
def test_the_table_fits_the_page(width: int, tmp_path: Path) -> None:
    """In a browser: nothing of the notes, which come last, is beyond the edge."""
    shapes = {"Linear": (3072, 768), "Conv2d": (256, 256, 3, 3)}
    entries = [
        layer(f"encoder.layers.{i}.attention.output.dense", shape, kind=kind,
              settings={"symmetric": False, "granularity": "per_group", "group_size": 48},
              report=layer_report(notes=("144 positions for 256 columns: the matrix is singular",)),
              shared_inputs=("encoder.layers.0.attention.self.value",))
        for i, (kind, shape) in enumerate(shapes.items())
    ]  # fmt: skip
    html = re.sub(r"<meta http-equiv[^>]*>", "", model(*entries).to_html())
    html += (
        "<script>const own = document.querySelector('.wide'); document.body.dataset.beyond = "
        "own.scrollWidth - own.clientWidth;</script>"
    )
    (tmp_path / "page.html").write_text(html)
    command = ["chromium", "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path}", f"--window-size={width},900"]
    shown = subprocess.run(
        [*command, (tmp_path / "page.html").as_uri()], capture_output=True, text=True, check=True
    )
    assert 'data-beyond="0"' in shown.stdout
