"""The Python in the documents runs as it stands, each document from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", ["README.md", "docs/models.md", "docs/deploy.md"])
def test_code_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / name).read_text(), re.M | re.S)
    assert blocks
    monkeypatch.chdir(tmp_path)
    variables: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, name, "exec"), variables)
