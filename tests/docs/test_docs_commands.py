"""Commands, links and messages in the documents are those of the project."""

from __future__ import annotations

import argparse
import ast
import importlib.util
import re
import runpy
import shlex
import sys
from collections.abc import Iterator
from functools import cache

import pytest

import adaround_ext.export
from adaround_ext.cli.parser import make_parser
from benchmarks import __main__ as benchmarks
from benchmarks.paper.catalogue import EXPERIMENTS
from tests.support import documents

_NAMES = documents.NAMES
_RUNNERS = ("python", "adaround-ext", "torchrun", "make", "pip")


def _commands(name: str) -> Iterator[list[str]]:
    """The words of every command: lines of shell blocks, and code in the text that is one."""
    lines = [line for block in documents.blocks(name, "sh") for line in block.text.splitlines()]
    lines += [" ".join(span.split()) for span in re.findall(r"`([^`]+)`", documents.prose(name))]
    for line in lines:
        try:
            words = shlex.split(line, comments=True)
        except ValueError:  # a quotation mark of the text
            continue
        while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # of the environment
            words.pop(0)
        if "|" in words:  # one of several
            words = words[: words.index("|")]
        if len(words) > 1 and words[0] in _RUNNERS:
            yield words


@pytest.mark.parametrize("name", _NAMES)
def test_commands_exist(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for words in _commands(name):
        if words[0] == "make":
            _check_make(words[1:])
        elif words[0] == "pip":
            _check_extras(words)
        elif words[0] == "adaround-ext":
            _check_ours(words[1:])
        elif "-m" in words:
            module, *arguments = words[words.index("-m") + 1 :]
            if module == "adaround_ext":
                _check_ours(arguments)
            else:
                _check_module(module, arguments, monkeypatch)


def _check_make(arguments: list[str]) -> None:
    targets = re.findall(r"^([a-z]+):", documents.read("Makefile"), re.M)
    for argument in arguments:
        assert "=" in argument or argument in targets, f"make has no {argument}"


def _check_extras(words: list[str]) -> None:
    project = documents.read("pyproject.toml")
    for group in re.findall(r"(?:adaround_ext|\.)\[([a-z,-]+)\]", " ".join(words)):
        for extra in group.split(","):
            assert re.search(rf"^{extra} = \[", project, re.M), f"there is no extra {extra}"


def _check_ours(arguments: list[str]) -> None:
    """The whole command is one that the parser takes, where it is whole."""
    command, *rest = arguments
    actions = make_parser()._actions
    (subparsers,) = (a for a in actions if isinstance(a, argparse._SubParsersAction))
    assert command in subparsers.choices, f"adaround-ext has no {command}"
    known = subparsers.choices[command]._option_string_actions
    for argument in rest:
        assert not argument.startswith("-") or argument in known, f"{command} has no {argument}"
    if len(rest) > 1 and "--help" not in rest:
        make_parser().parse_args(arguments)


def _check_module(module: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    if module in ("sphinx", "pytest", "venv"):
        return
    assert importlib.util.find_spec(module) is not None, f"there is no {module}"
    command = (module,)
    if module == "benchmarks" and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        assert name in (*benchmarks.SUITE, *benchmarks.OTHERS), f"there is no benchmark {name}"
        command = (module, name)
    for argument in arguments:
        if argument.startswith("--"):
            assert argument in _help(command, monkeypatch), f"{command} has no {argument}"
        elif command == ("benchmarks", "paper"):
            assert argument in EXPERIMENTS, f"there is no experiment {argument}"


_helps: dict[tuple[str, ...], str] = {}


def _help(command: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a module, given the rest of the command, says to --help."""
    module, *arguments = command
    if command not in _helps:
        said: list[str] = []
        monkeypatch.setattr(sys, "argv", [*command, "--help"])
        monkeypatch.setattr(
            argparse.ArgumentParser,
            "_print_message",
            lambda self, text, file=None: said.append(text),
        )
        with pytest.raises(SystemExit):
            if module == "benchmarks":
                benchmarks.main([*arguments, "--help"])
            else:
                runpy.run_module(module, run_name="__main__")
        monkeypatch.undo()
        _helps[command] = "".join(said)
    return _helps[command]


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        'pip install "adaround_ext[nothing]"',
        "adaround-ext nothing out",
        "adaround-ext quantize ./bert --data text.txt --nothing",
        "adaround-ext quantize ./bert --data text.txt",  # without --output
        "python -m examples.nothing",
        "python -m examples.embeddings --nothing",
        "python -m benchmarks nothing",
        "python -m benchmarks ranks --nothing",
        "python -m benchmarks paper nothing",
    ],
)
def test_a_wrong_command_is_noticed(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents, "blocks", lambda *_: [documents.Block("sh", command, 1)])
    monkeypatch.setattr(documents, "prose", lambda name: "")
    with pytest.raises((AssertionError, SystemExit)):
        test_commands_exist("README.md", monkeypatch)


@pytest.mark.parametrize("name", _NAMES)
def test_links_lead_somewhere(name: str) -> None:
    for link in documents.links(name):
        path, _, anchor = link.partition("#")
        file = (documents.ROOT / name).parent / path if path else documents.ROOT / name
        assert file.exists(), f"{name} leads to {link}"
        if anchor:
            assert anchor in _anchors(file.read_text(encoding="utf-8")), f"{name} leads to {link}"


@pytest.mark.parametrize("name", _NAMES)
def test_names_stand_in_the_files_that_they_lead_to(name: str) -> None:
    text = documents.read(name)
    for shown, path in re.findall(r"\[`([\w.]+)`\]\(([\w./]+\.(?:py|h|cu|cpp))\)", text):
        file = (documents.ROOT / name).parent / path
        if "/" not in shown and shown != path and not shown.endswith(file.suffix):
            last = shown.rpartition(".")[2]
            assert re.search(rf"\b{last}\b", file.read_text(encoding="utf-8")), f"{shown}: {path}"


def test_public_names_have_a_page() -> None:
    pages = "".join(path.read_text() for path in (documents.ROOT / "docs/api").glob("*.rst"))
    names = [f"adaround_ext.{name}" for name in adaround_ext.__all__]
    names += [f"adaround_ext.export.{name}" for name in adaround_ext.export.__all__]
    names += ["adaround_ext.ops", "adaround_ext.reference"]
    for path in (documents.ROOT / "adaround_ext/export").rglob("*.py"):
        functions = re.findall(r"^def ((?:export|to)_\w+)", path.read_text(), re.M)
        place = path.parent.name if path.stem == "export" else path.stem
        if path.stem not in ("formats", "goal", "targets"):
            names += [f"adaround_ext.export.{place}.{function}" for function in functions]
    described = re.findall(r"^\.\. (?:auto\w+|py:data):: (\S+)$", pages, re.M)
    ends = {name.rpartition(".")[2] for name in described}
    for name in names:
        assert name in described or (name.count(".") < 3 and name.rpartition(".")[2] in ends), name


def _anchors(text: str) -> list[str]:
    """The names that GitHub gives headings."""
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    return [re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles]


@cache
def _messages() -> tuple[str, ...]:
    """The texts in the sources: f-strings with … for what differs."""
    found: list[str] = []
    for path in (documents.ROOT / "setup.py", *documents.ROOT.glob("adaround_ext/**/*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (p.value if isinstance(p, ast.Constant) else "…" for p in node.values)
                found.append("".join(map(str, parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return tuple(found)


def test_messages_are_those_of_the_package() -> None:
    quoted = [
        row[0].strip("`")
        for table in documents.tables("docs/troubleshooting.md")
        for row in table[1:]
        if row[0].startswith("`")
    ]
    quoted += re.findall(r"^\*\*`(.+?)`", documents.prose("docs/troubleshooting.md"), re.M)
    assert len(quoted) > 40
    for message in quoted:
        assert _is_said(message), message


def test_a_message_that_nobody_says_is_noticed() -> None:
    assert not _is_said("inputs must be larger than they are, got …")


def _is_said(message: str) -> bool:
    """Whether the sources have all parts of a message."""
    # It is often put together: of the argument's name, a rule, and what came.
    for part in (part.strip("… ():") for part in re.split("…|, got", message)):
        forms = {part, part.partition(" ")[2], part.partition(" must be ")[2]}
        whole = [form for form in forms if form == part or len(form) > 10]
        if part and not any(form in text for form in whole for text in _messages()):
            return False
    return True
