"""A model's report as an HTML page and as a figure."""

from __future__ import annotations

import base64
import dataclasses
import hashlib
import os
import re
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import pytest
from jinja2 import UndefinedError

from adaround_ext.report.model import ModelReport
from adaround_ext.report.templates import render
from tests.report.test_model import SCRIPT, VOID, layer, layer_report, model, varied


class Page(HTMLParser):
    """Checks that tags are balanced, and collects text and attributes."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.count: dict[str, int] = {}
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.rows: list[list[str]] = []
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "td":
            self.rows[-1].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.count[tag] = self.count.get(tag, 0) + 1
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)
        if "td" in self.open:
            self.rows[-1][-1] += data


def many(count: int) -> ModelReport:
    return model(
        *(
            layer(f"block.{i // 4}.layer{i}", report=layer_report(0.1, (i + 1) / 5000),
                  block=f"block.{i // 4}")
            for i in range(count)
        )
    )  # fmt: skip


@pytest.mark.parametrize(
    "report",
    [varied(), model(), many(1), many(40), many(500)],
    ids=["varied", "0", "1", "40", "500"],
)
def test_page_is_whole_and_needs_nothing_else(report: ModelReport) -> None:
    html = report.to_html()
    page = Page(html)
    assert page.count.get("circle", 0) == 2 * len(report.layers)
    # The policy's meta is an attribute http-equiv, which is no address.
    assert not re.search(r"https?://|url\(|@import|<link|<img|\bsrc=|\bhref=", html)
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)
    rows = [row for row in page.rows if len(row) == 14]
    assert [row[1] for row in rows] == [e.name for e in report.worst(max(1, len(report.layers)))]
    for name in (*report.skipped, *report.notes, *report.versions.values()):
        assert escape(name) in html


def test_page_has_the_numbers_of_a_layer() -> None:
    rows = {row[1]: row for row in Page(varied().to_html()).rows if len(row) == 14}
    times = "\N{MULTIPLICATION SIGN}"
    assert rows["block.1.c"] == [
        "3", "block.1.c", "Conv2d", f" {times} ".join("4633"), "4 asym.", "9 columns", "10 %",
        "4 %", "0.40", "12.5 %", "1 %", "1", "1.50 s", "same weight as d",
    ]  # fmt: skip
    assert rows["block.0.b"][-1] == "odd; data"
    assert rows["block.0.a"][-1] == "shares inputs with b"


def test_page_trusts_no_string() -> None:
    entry = layer(
        SCRIPT,
        report=layer_report(notes=(f"note {SCRIPT}",)),
        kind=f"kind{SCRIPT}",
        block=f"block{SCRIPT}",
        tied=(f"tied{SCRIPT}",),
        shared_inputs=(f'"shared"{SCRIPT}',),
    )
    entry = dataclasses.replace(entry, config=entry.config | {"activation": f"config{SCRIPT}"})
    report = model(
        entry,
        layer("plain"),
        model=f"model{SCRIPT}",
        mode=f"mode{SCRIPT}",
        skipped={f"skipped{SCRIPT}": f"reason{SCRIPT}"},
        notes=(f"all{SCRIPT}",),
        seconds={f"seconds{SCRIPT}": 1.0, "total": 1.0},
        memory={f"memory{SCRIPT}": 1},
        versions={f"version{SCRIPT}": f"number{SCRIPT}"},
    )
    html = report.to_html()
    assert SCRIPT not in html
    assert html.count("<script>") == 1
    assert f"<code>{escape(SCRIPT)}</code>" in html
    text = "\n".join(Page(html).text)
    for word in (
        "note ", "kind", "tied", "model", "mode", "skipped", "reason", "all", "seconds", "memory",
        "version", "number", "config", '"shared"',
    ):  # fmt: skip
        assert f"{word}{SCRIPT}" in text


def test_a_name_is_no_template() -> None:
    name = "{{ 7 * 7 }}{% raw %}{# #}"
    html = model(layer(name), notes=(name,)).to_html()
    assert html.count(name) >= 3  # chart, table and notes
    assert name in model(layer(name))._repr_html_()


def test_page_without_any_error() -> None:
    exact = layer_report(0.0, 0.0, energy=0.0, seconds={})
    html = model(layer("a", report=exact), layer("b"), seconds={}, memory={}).to_html()
    Page(html)
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)
    Page(model(layer("a", report=exact)).to_html())
    broken = layer_report(float("inf"), float("nan"), flipped=float("nan"))
    html = model(layer("a", report=broken), layer("b")).to_html()
    assert not re.search(r"\b(nan|inf)\b", html, re.IGNORECASE)


def test_page_is_written(tmp_path: Path) -> None:
    html = varied().to_html(tmp_path / "report.html")
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == html
    assert os.listdir(tmp_path) == ["report.html"]


def test_page_is_plain_text() -> None:
    """Not the template engine's, which escapes what is added to it."""
    for html in (varied().to_html(), varied()._repr_html_()):
        assert type(html) is str


def test_page_and_notebook_have_one_chart() -> None:
    charts = [
        re.findall(r'<div class="chart".*?</svg></div></div>', html, re.S)
        for html in (varied().to_html(), varied()._repr_html_())
    ]
    assert len(charts[0]) == 1 and charts[0] == charts[1]


def test_page_runs_its_own_script_only() -> None:
    html = varied().to_html()
    (script,) = re.findall(r"<script>(.*?)</script>", html, re.S)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in html


def test_a_template_names_only_what_is_there() -> None:
    with pytest.raises(UndefinedError, match="'content' is undefined"):
        render("cell.html.jinja", style="")


def test_files_of_the_page_are_package_data() -> None:
    import adaround_ext.report

    settings = Path(__file__).parents[2] / "pyproject.toml"
    patterns = re.findall(r'"(report/[^"]+)"', settings.read_text(encoding="utf-8"))
    folder = Path(adaround_ext.report.__file__).parent
    files = {path for path in folder.iterdir() if path.is_file() and path.suffix != ".py"}
    assert files and files == {path for p in patterns for path in folder.parent.glob(p)}


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_figure_is_saved(tmp_path: Path, suffix: str) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / f"report.{suffix}"
    figure = varied().plot(str(path))
    start = path.read_bytes()[:200]
    assert (b"\x89PNG" if suffix == "png" else b"<?xml") in start
    error, flips, seconds = figure.axes
    assert error.get_yscale() == "log"
    assert list(error.lines[0].get_ydata()) == pytest.approx([0.02, 0.5, 0.1, 0.02])
    assert list(error.lines[1].get_ydata()) == pytest.approx([0.01, 0.3, 0.04, 0.01])
    assert [bar.get_height() for bar in flips.patches] == [12.5] * 4
    assert [bar.get_height() for bar in seconds.patches] == [1.5] * 4
    names = [label.get_text() for label in seconds.get_xticklabels()]
    assert names == [entry.name for entry in varied().layers]
    ticks = [label.get_text() for label in error.get_yticklabels()]
    assert ticks and all(f">{tick}</text>" in varied().to_html() for tick in ticks)  # as the page


@pytest.mark.parametrize("report", [model(), many(1), many(200)], ids=["0", "1", "200"])
def test_figure_of_few_and_many_layers(tmp_path: Path, report: ModelReport) -> None:
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "report.png")
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_figure_shows_no_formulas_and_errors_of_0(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    exact = layer("$\\broken{$", report=layer_report(0.0, 0.0))
    figure = model(exact, layer("b"), model="$\\broken{$").plot(tmp_path / "report.svg")
    error = figure.axes[0]
    assert error.lines[1].get_ydata()[0] == error.get_ylim()[0] > 0
