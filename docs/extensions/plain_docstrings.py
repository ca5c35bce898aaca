"""Docstrings of this project for Sphinx: plain text in which a line "name: ..." is an argument.

They are written to be read in an editor, so *, | and a trailing _ mean themselves there, and a name
in :func:`name` is found wherever it is.
"""

from __future__ import annotations

import re
import sys
from typing import Any

from docutils import nodes
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.nodes import make_refnode

# What reStructuredText has its own meaning for and the docstrings use as such: ``code``, :role:`x`.
_MARKED = re.compile(r"(``.+?``|:[a-z]+:`.+?`)")
_SPECIAL = re.compile(r"[*|\\`]|(?<=\w)_(?=\W|$)")
_ITEM = re.compile(r"([a-z]\w*\*?(?:(?:, | and )[a-z]\w*\*?)*): (?=\S)")


def escaped(line: str) -> str:
    """The line with everything but code and roles as it stands."""
    parts = _MARKED.split(line)
    return "".join(
        part if index % 2 else _SPECIAL.sub(r"\\\g<0>", part) for index, part in enumerate(parts)
    )


def process(app: Sphinx, what: str, name: str, obj: object, options: Any, lines: list[str]) -> None:
    """A paragraph of its own for every argument, its name in bold."""
    found: list[str] = []
    for line in lines:
        item = _ITEM.match(line)
        if item is None:
            found.append(escaped(line))
            continue
        found += ["", f"**{item[1].replace('*', chr(92) + '*')}**: {escaped(line[item.end() :])}"]
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
