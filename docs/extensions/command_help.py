"""The directive ``command-help``: what every command of adaround-ext says to --help."""

from __future__ import annotations

import argparse
import os

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx

from adaround_ext.cli.parser import make_parser


class CommandHelp(Directive):
    """A section a command, from the parser itself."""

    def run(self) -> list[nodes.Node]:
        os.environ["COLUMNS"] = "90"  # argparse's width
        found: list[nodes.Node] = []
        for action in make_parser()._actions:
            if not isinstance(action, argparse._SubParsersAction):
                continue
            for name, parser in action.choices.items():
                section = nodes.section(ids=[f"adaround-ext-{name}"])
                section += nodes.title(text=f"adaround-ext {name}")
                text = parser.format_help()
                section += nodes.literal_block(text, text, language="text")
                found.append(section)
        return found


def setup(app: Sphinx) -> dict[str, bool]:
    app.add_directive("command-help", CommandHelp)
    return {"parallel_read_safe": True}
