"""What readers meet in the documents: code that is whole, our column, words that they know."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator

import pytest

import adaround_ext
from adaround_ext import export, ops, reference
from tests.support import documents


@pytest.mark.parametrize("name", documents.NAMES)
def test_code_is_not_cut(name: str) -> None:
    """The site has room for 100 columns (docs/static/site.css)."""
    for block in documents.blocks(name):
        for number, line in enumerate(block.text.splitlines(), block.line):
            assert len(line) <= 100, f"{name}:{number}"


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_is_read_in_five_minutes(name: str) -> None:
    lines = documents.read(name).splitlines()
    assert len(lines) <= 150 and max(map(len, lines)) <= 120


def test_our_column_is_the_first_of_the_comparison() -> None:
    features = documents.tables("docs/compare.md")[0]
    assert features[0][:2] == ["", "adaround_ext"]
    assert {len(row) for row in features} == {len(features[0])}
    assert ["own kernels for the rounding", "C++ and CUDA"] in [row[:2] for row in features]


@pytest.mark.parametrize("word", ["exclude", "ignore", "GPU", "MoE", "mixture of experts"])
def test_guides_have_sections_of_the_words_that_are_searched(word: str) -> None:
    headings = re.findall(r"^#+ .*", documents.prose("docs/models.md"), re.M)
    assert any(re.search(rf"\b{word}\b", heading, re.I) for heading in headings)


def described() -> Iterator[tuple[str, str, object]]:
    """Kind, name and object of all that the reference describes."""
    for module in (adaround_ext, export, ops, reference):
        yield "module", module.__name__, module
        for name, item in vars(module).items():
            if name.startswith("_") or not inspect.getdoc(item) or inspect.ismodule(item):
                continue
            kind = "class" if inspect.isclass(item) else "function"
            yield kind, f"{module.__name__}.{name}", item
            if inspect.isclass(item) and item.__module__.startswith("adaround_ext"):
                for method, own in vars(item).items():
                    if not method.startswith("_") and inspect.getdoc(own):
                        yield "method", f"{module.__name__}.{name}.{method}", own


def arguments_of(text: str) -> list[str]:
    """The names that a Google docstring's section Args has entries for."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)+)", text + "\n", re.M)
    entries = re.findall(r"^    (\S[^:(]*?)(?: \([^)]*\))?:", section[1] if section else "", re.M)
    return [name.strip("*` ") for entry in entries for name in entry.split(",")]


def test_docstrings_name_the_arguments_of_functions() -> None:
    names = []
    for kind, name, item in described():
        if kind != "function" or not callable(item):
            continue
        parameters = inspect.signature(item).parameters
        listed = arguments_of(inspect.getdoc(item) or "")
        assert listed or not parameters, f"{name} has no section Args"
        assert set(listed) <= parameters.keys(), f"{name}: {listed}"
        names.append(name)
    assert {"adaround_ext.quantize_", "adaround_ext.ops.gptq"} <= set(names)
