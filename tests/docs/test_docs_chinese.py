"""The Chinese documents say what the English ones say: code, tables, equations, figures, links."""

from __future__ import annotations

import re
from collections import Counter

import pytest

from benchmarks.paper.catalogue import EXPERIMENTS
from tests.support import documents

PAIRS = documents.PAIRS
_NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?|\.\d+")
# What has numbers of its own: targets of links, rows of tables, mathematics.
_NO_TEXT = re.compile(r"\]\([^)]*\)|^\|[^\n]*$|\$\$.*?\$\$|\$.*?\$", re.M | re.S)
_MARKER = re.compile(r"<!-- (?:/table|table: \w+) -->")


def _numbers(text: str) -> Counter[str]:
    return Counter(_NUMBER.findall(text))


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_code(english: str, chinese: str) -> None:
    ours, theirs = ([b[:2] for b in documents.blocks(name)] for name in (chinese, english))
    assert ours == theirs


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_tables(english: str, chinese: str) -> None:
    ours, theirs = documents.tables(chinese), documents.tables(english)
    assert [len(table) for table in ours] == [len(table) for table in theirs]
    for table, other in zip(ours, theirs, strict=True):
        for row, same in zip(table, other, strict=True):
            assert [_numbers(cell) for cell in row] == [_numbers(cell) for cell in same], row


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_figures_in_the_text(english: str, chinese: str) -> None:
    """A figure changes in both or in none; small whole numbers may be words in one of them."""
    texts = (_NO_TEXT.sub("", documents.prose(name)) for name in (chinese, english))
    ours, theirs = (
        Counter({n: k for n, k in _numbers(text).items() if "." in n or len(n) > 2})
        for text in texts
    )
    assert sum(theirs.values()) >= 10
    assert ours == theirs, f"more in Chinese: {ours - theirs}, in English: {theirs - ours}"


@pytest.mark.parametrize(("english", "chinese"), PAIRS)
def test_links_and_pictures(english: str, chinese: str) -> None:
    ours, theirs = set(documents.links(chinese)), set(documents.links(english))
    missing = {link for link in theirs if not {link, link.replace(".md", ".zh.md")} & ours}
    assert missing == {chinese.rpartition("/")[2]}  # the link to each other


def _equations(name: str) -> list[str]:
    text = re.findall(r"^\$\$\n(.*?)\n\$\$$", documents.prose(name), re.M | re.S)
    return [re.sub(r"\\text\{.*?\}", "", equation) for equation in text]


def test_equations() -> None:
    equations = _equations("docs/method.md")
    assert equations == _equations("docs/method.zh.md")
    tags = [tag for equation in equations for tag in re.findall(r"\\tag\{(\d+)\}$", equation)]
    assert tags == [str(number) for number in range(1, len(equations) + 1)]


@pytest.mark.parametrize("name", PAIRS[1])
def test_mathematics_in_the_text_is_seen_by_github(name: str) -> None:
    """A dollar that opens it must follow a space, and it must lie in one line."""
    text = re.sub(r"^\$\$\n.*?^\$\$$|`[^`]*`", "", documents.prose(name), flags=re.M | re.S)
    found = re.findall(r"(^|.)\$([^$]*)\$", text, flags=re.S)
    assert len(found) > 100
    for before, inside in found:
        assert before.strip() == "" and "\n" not in inside, f"{before}${inside}$"


def test_experiments_have_their_places() -> None:
    english, chinese = (documents.read(name) for name in PAIRS[1])
    assert _MARKER.findall(english) == _MARKER.findall(chinese)
    for name in EXPERIMENTS:
        assert f"<!-- table: {name} -->" in english
        assert f"(images/method_{name}.svg)" in english
        assert f"`python -m benchmarks paper {name}`" in english
