"""The frame of the experiments on the paper's claims: verdicts, tables, commands, results."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

pytest.importorskip("sklearn")  # the digits
pytest.importorskip("matplotlib")
from benchmarks.paper import main as cli
from benchmarks.paper import pages
from benchmarks.paper.catalogue import EXPERIMENTS
from benchmarks.paper.experiment import Claim, Experiment, Table, Text, claims_table

pytestmark = pytest.mark.usefixtures("one_thread")


def _claim(*effects: float, expected: float) -> Claim:
    text = Text("a", "甲")
    return Claim(text, text, text, effects, expected)


@pytest.mark.parametrize(
    ("effects", "verdict"),
    [
        ((0.5, 0.5, 0.5), "reproduced"),
        ((0.5, 0.5, 0.49), "weaker"),  # the mean is below half of the paper's
        ((2.0, 2.0, -0.1), "weaker"),  # one seed does not show it
        ((0.1, -0.1, 0.1), "not seen here"),  # within its standard error
        ((-1.0, -1.0, -1.0), "not seen here"),
        ((0.0, 0.0, 0.0), "not seen here"),
        ((float("nan"),), "not seen here"),
    ],
)
def test_verdict(effects: tuple[float, ...], verdict: str) -> None:
    assert _claim(*effects, expected=1.0).verdict == verdict


ROWS = [(Text("up \\1", "上"), "1.5"), ("x", 2.0)]
TABLE = Table("two", "Two", (Text("method", "方法"), "loss"), ROWS)


def test_markdown() -> None:
    assert pages.markdown(TABLE, "en") == (
        "| method | loss |\n| :-- | --: |\n| up \\1 | 1.5 |\n| x | 2 |\n"
    )
    mixed = Table("m", "M", ("a", "b"), [("x", "100 draws"), ("y", "all draws")])
    assert "| :-- | :-- |" in pages.markdown(mixed, "en")  # words, though one begins with a number
    assert pages.markdown(TABLE, "zh").startswith("| 方法 | loss |\n| :-- | --: |\n| 上 | 1.5 |\n")


def test_only_the_marked_lines_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = "# A\n\n<!-- table: one -->\n| kept |\n<!-- /table -->\n\n<!-- table: two -->\n"
    after = "<!-- /table -->\n\n| no table of ours |\n<!-- /table -->\nEnd, without a newline"
    (tmp_path / "method.md").write_text(f"{before}| old |\n| older |\n{after}")
    pages.write([TABLE, dataclasses.replace(TABLE, name="three")], tmp_path)
    text = (tmp_path / "method.md").read_text()
    assert text == before + pages.markdown(TABLE, "en") + after
    pages.write([TABLE], tmp_path)
    assert (tmp_path / "method.md").read_text() == text
    said = capsys.readouterr().err
    assert "has no marker for the table three" in said
    assert "method.zh.md does not exist" in said
    assert not (tmp_path / "method.zh.md").exists()


def test_no_marker_without_an_end() -> None:
    text = "<!-- table: two -->\n<!-- table: one -->\n<!-- /table -->\n"
    assert pages.replaced(text, "two", "") is None
    assert pages.replaced(text, "on", "") is None


def _toy(value: float) -> Experiment:
    return Experiment(
        "toy",
        Text("table 0", "表 0"),
        lambda quick: {"value": value, "quick": quick},
        lambda values: [Table("toy", "Toy", ("a",), [(str(values["value"]),)])],
        lambda values: [_claim(values["value"], expected=1.0)],
        lambda figure, values: figure.subplots().plot([0, values["value"]]) and None,
    )


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Documents with markers, and the toy as the only experiment."""
    (tmp_path / "docs").mkdir()
    marked = "".join(f"<!-- table: {name} -->\n<!-- /table -->\n" for name in ("toy", "claims"))
    for name in pages.PAGES.values():
        (tmp_path / "docs" / name).write_text(marked)
    monkeypatch.setattr(pages, "DOCS", tmp_path / "docs")
    monkeypatch.setattr(cli, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(cli, "EXPERIMENTS", {"toy": _toy(1.25)})
    return tmp_path


def _files(folder: Path) -> dict[str, bytes]:
    found = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in found}


def test_quick_writes_nothing(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = _files(folders)
    cli.main(["--quick"])
    assert _files(folders) == before
    assert "1.25" in capsys.readouterr().out


def test_output_is_elsewhere(folders: Path) -> None:
    before = _files(folders)
    cli.main(["--quick", "--output", str(folders / "own")])
    assert set(_files(folders)) - set(before) == {"own/toy.json", "own/method_toy.svg"}
    assert before.items() <= _files(folders).items()


def test_full_run_and_tables(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cli.main(["toy"])
    document = json.loads((folders / "results" / "toy.json").read_text())
    assert document["results"] == {"value": 1.25, "quick": False}
    assert document["machine"]["torch_threads"] == 1
    assert "commit" in document["machine"]
    assert document["command"] == "python -m benchmarks paper toy"
    first = _files(folders)
    assert b"1.25" in first["docs/method.md"] and b"1.25" in first["docs/method.zh.md"]
    assert "已重现".encode() in first["docs/method.zh.md"]
    monkeypatch.setattr(cli, "EXPERIMENTS", {"toy": _toy(9.0)})  # which must not be measured
    cli.main(["--tables"])
    assert _files(folders) == first  # the picture too


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["toy", "nothing"], "no experiment nothing: there are toy"),
        (["--tables", "--quick"], "--tables measures nothing"),
        (["--tables"], "has no results of any experiment"),
        (["--tables", "toy"], "has no results of toy"),
        (["--output", "{folder}/docs/method.md"], "File exists"),
        (["--output", "{folder}/docs/method.md/own"], "Not a directory"),
    ],
)
def test_what_cannot_be_done_is_said_before_anything_is_measured(
    arguments: list[str],
    said: str,
    folders: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "measured", lambda *_: pytest.fail("measured"))
    with pytest.raises(SystemExit) as stopped:
        cli.main([argument.format(folder=folders) for argument in arguments])
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_a_name_given_twice_is_measured_once(
    folders: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cli.main(["--quick", "toy", "toy"])
    assert capsys.readouterr().out.count("Toy") == 1


@pytest.mark.parametrize(("language", "name"), pages.PAGES.items())
def test_documents_show_the_results(language: pages.Language, name: str) -> None:
    """Each stored result's tables stand in the documents as they follow from it, and all claims."""
    text = (pages.DOCS / name).read_text()
    tables: list[Table] = []
    claims: list[tuple[Experiment, Claim]] = []
    for experiment in EXPERIMENTS.values():
        values = cli.read(cli.RESULTS / f"{experiment.name}.json")
        assert values is not None, f"there are no results of {experiment.name}"
        tables += experiment.tables(values)
        claims += [(experiment, claim) for claim in experiment.claims(values)]
    for table in (*tables, claims_table(claims)):
        assert pages.replaced(text, table.name, pages.markdown(table, language)) == text
