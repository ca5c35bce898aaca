"""A model of which little was quantized says so first, wherever its numbers are shown."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import quantize_, sensitivity
from adaround_ext.report.coverage import FEW, few_quantized
from adaround_ext.report.model import ModelReport
from tests.report.test_model import SCRIPT, layer, model
from tests.support.cli_fixtures import Run

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {"preset": "fast", "progress": False}


class Words(nn.Module):
    """Most of it is an embedding, some is nobody's, and one layer is not called."""

    def __init__(self, words: int = 500, tied: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(words, 16)
        self.first, self.second = nn.Linear(16, 32), nn.Linear(32, 16)
        self.idle = nn.Linear(16, 16)
        self.experts = nn.Parameter(torch.randn(1, 16, 16))
        self.head = nn.Linear(16, words, bias=False)
        if tied:
            self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(self.embedding(x)).relu())
        return self.head(x @ self.experts[0])  # type: ignore[no-any-return]


def ids() -> Tensor:
    return torch.randint(0, 500, (8, 6))


def test_the_note_names_the_largest_and_their_reasons(caplog: pytest.LogCaptureFixture) -> None:
    net = Words(tied=True)
    report = quantize_(net, ids(), **FAST)
    (note,) = (note for note in report.notes if note.startswith(FEW))
    assert report.notes[0] == note
    assert note == (
        f"{FEW}: 1024 of 9600 were (10.7 %); of the others 8000 in embedding: Embedding is not "
        "supported; 272 in idle: it was not called: nothing is known of its inputs; 256 in the "
        "model: Words is not supported"
    )
    (record,) = (r for r in caplog.records if r.levelno == logging.WARNING)
    assert (record.name, record.getMessage()) == ("adaround_ext", note)
    lines = str(report).splitlines()
    assert lines[1].startswith(f"  WARNING      {FEW}: 1024 of 9600")
    assert max(map(len, lines)) <= 100 and len(lines) <= 18
    assert " ".join(" ".join(lines[1:4]).split()) == f"WARNING {note}"
    assert f'<p class="warning">{FEW}' in report.to_html()
    assert f'<p class="warning">{FEW}' in report._repr_html_()
    assert ModelReport.from_dict(report.to_dict()) == report


@pytest.mark.parametrize(
    ("settings", "left"),
    [
        ({"overrides": {"head": "skip"}}, "8000 in head: overrides say skip"),
        ({"overrides": {"head": "skip", "second": "skip"}}, "8528 in head and 1 more: overrides"),
        ({"filter_fn": lambda module, name: name != "head"}, "head: filter_fn returned False"),
    ],
    ids=["skip", "several", "filter"],
)
def test_what_was_left_alone_by_request_counts(settings: dict[str, Any], left: str) -> None:
    report = quantize_(Words(), ids(), **settings, **FAST)
    assert report.warning is not None and left in report.warning


def test_most_is_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    report = quantize_(Words(), ids(), **FAST)  # the head is as large as the embedding
    assert 2 * report.quantized_parameters > report.parameters
    assert report.warning is None and "WARNING" not in str(report)
    assert not any(note.startswith(FEW) for note in report.notes)
    assert 'class="warning"' not in report.to_html()
    assert not caplog.records


def test_half_is_enough() -> None:
    half = model(layer("a", (8, 16)), parameters=256)
    assert half.warning is None
    less = model(layer("a", (8, 16)), parameters=257)
    assert less.warning == f"{FEW}, see report.skipped"  # of a report that has no such note
    assert str(less).splitlines()[1] == f"  WARNING      {less.warning}"
    marked = model(layer("a", (8, 16)), parameters=900, notes=("other", f"{FEW}: {SCRIPT}"))
    assert marked.warning == f"{FEW}: {SCRIPT}"
    assert SCRIPT not in marked.to_html() and SCRIPT not in marked._repr_html_()


def test_shared_parameters_count_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Embedding(10, 4), nn.Embedding(10, 4))
    net[2].weight = net[1].weight
    (note,) = few_quantized(net, [net[0].weight], {"1": "why"})
    assert note == f"{FEW}: 16 of 56 were (28.6 %); of the others 40 in 1: why"
    assert few_quantized(net, [net[1].weight], {}) == []


def test_sensitivity_says_it_too() -> None:
    result = sensitivity(Words(tied=True), ids(), bits=(4, 8), average_bits=5, progress=False)
    assert result.notes[0].startswith(f"{FEW}: 1024 of 9600")
    assert str(result).splitlines()[1].startswith(f"  WARNING      {FEW}: 1024 of")
    assert FEW in result._repr_html_()
    assert "WARNING" not in str(sensitivity(Words(), ids(), bits=(4,), progress=False))


def test_the_command_line_says_it_once(run: Run, folder: Any) -> None:
    code = (
        "from tests.report.test_coverage import Words, ids\n\n"
        "def tied():\n    return Words(tied=True)\n"
    )
    (folder / "words.py").write_text(code)
    command = ["quantize", "words:tied", "--data", "words:ids", "--preset", "fast"]
    status, out, err = run(*command, "--output", "out")
    assert status == 0
    assert FEW in out and FEW not in err
    status, out, err = run(*command, "--output", "quiet", "--quiet")
    assert (status, out, err) == (0, "", "")
