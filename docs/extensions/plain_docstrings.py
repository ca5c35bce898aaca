"""Docstrings of this project for Sphinx: plain text in which a line "name: ..." is an argument.

They are written to be read in an editor, so *, | and a trailing _ mean themselves there, and a name
in :func:`name` is found wherever it is.
"""

from __future__ import annotations

import inspect
import re
import sys
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

# What reStructuredText has its own meaning for and the docstrings use as such: ``code``, :role:`x`,
# also over the end of a line, and `code` as in Markdown.
_MARKED = re.compile(r"(``(?:(?!\n\n).)+?``|:[a-z]+:`[^`]+?`|(?<!`)`[^`\n]+`(?!`))", re.S)
_SPECIAL = re.compile(r"[*|\\`]|(?<=\w)_(?=\W|$)")


def escaped(text: str) -> str:
    """The text with everything but code and roles as it stands."""
    parts = _MARKED.split(text)
    return "".join(
        _marked(part) if index % 2 else _SPECIAL.sub(r"\\\g<0>", part)
        for index, part in enumerate(parts)
    )


def _marked(part: str) -> str:
    return f"`{part}`" if re.match("`[^`]", part) else part


def arguments(obj: Any) -> re.Pattern[str] | None:
    """What finds "name: " and "name, name: " of an object's arguments, where a sentence begins.

    In escaped lines, where the * that marks some names has a backslash.
    """
    try:
        names = "|".join(map(re.escape, inspect.signature(obj).parameters))
    except (TypeError, ValueError):
        return None
    one = rf"(?:{names})(?:\\\*)?"
    many = rf"{one}(?:(?:, | and ){one})*"
    return re.compile(rf"(?:^|(?<=[.;)] )){many}(?=(?: \([^)]*\))?:(?: |$))") if names else None


def process(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Names of arguments in bold; a line that begins with one begins a paragraph."""
    item = arguments(obj) if what in ("class", "function", "method") else None
    found: list[str] = []
    for line in escaped("\n".join(lines)).split("\n"):
        if item is None:
            found.append(line)
            continue
        if item.match(line):
            found.append("")
        found.append(item.sub(r"**\g<0>**", line))
    lines[:] = found


def resolve(
    app: Sphinx, env: BuildEnvironment, node: pending_xref, shown: nodes.TextElement
) -> nodes.Node | None:
    """The one page that describes a name; the name alone where the package has it, but no page."""
    if node.get("refdomain") != "py":
        return None
    name = node["reftarget"].rpartition(".")[2]
    objects = env.domains["py"].data["objects"]
    found = [full for full in objects if full.rpartition(".")[2] == name]
    if len(found) == 1:
        entry = objects[found[0]]
        return make_refnode(
            app.builder, node["refdoc"], entry.docname, entry.node_id, shown, found[0]
        )
    modules = [own for at, own in sys.modules.items() if at.partition(".")[0] == "adaround_ext"]
    return shown if any(hasattr(module, name) for module in modules) else None


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", process)
    app.connect("missing-reference", resolve)
    return {"parallel_read_safe": True}
