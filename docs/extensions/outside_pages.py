"""Pages for documents that lie outside of docs, and links to them as GitHub has them."""

from __future__ import annotations

import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent.parent
PAGES = {
    "readme": "README.md",
    "readme.zh": "README.zh.md",
    "contributing": "CONTRIBUTING.md",
    "changelog": "CHANGELOG.md",
}
_LINK = re.compile(r"(?<=\]\()(?!https?:|#)([^)\s]+)")


def read(app: Sphinx, docname: str, source: list[str]) -> None:
    """The document in the place of the page that stands for it; its links from docs."""
    if docname in PAGES:
        path = ROOT / PAGES[docname]
        app.env.note_dependency(str(path))
        source[0] = _LINK.sub(lambda link: _from_docs(link[1]), path.read_text())
    else:
        source[0] = _LINK.sub(lambda link: _page(link[1]), source[0])


def _from_docs(link: str) -> str:
    return link.removeprefix("docs/") if link.startswith("docs/") else _page(f"../{link}")


def _page(link: str) -> str:
    """The page that stands for a document outside, or the link itself."""
    for page, document in PAGES.items():
        if link.partition("#")[0] == f"../{document}":
            return link.replace(f"../{document}", f"{page}.md")
    return link


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("source-read", read)
    return {"parallel_read_safe": True}
