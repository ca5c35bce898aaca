"""The Python in the documents runs as it stands, each document from top to bottom."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support import documents

transformers = pytest.importorskip("transformers")  # the guides load models of it

# All of their Python is that of the English documents, as test_docs_chinese.py sees to.
CHINESE = {chinese for _, chinese in documents.PAIRS}
LANGUAGES = {"python", "py", "sh", "", "{toctree}"}
RUN = [n for n in documents.NAMES if documents.blocks(n, "python") and n not in CHINESE]


@pytest.fixture
def processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torchrun tells a process: here it is the only one."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("name", RUN)
def test_code_runs(
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    one_thread: None,
    processes: None,
) -> None:
    monkeypatch.chdir(tmp_path)
    if name == "docs/models.md":
        (tmp_path / "scratch").mkdir()
        _large_model(tmp_path / "llama-70b")
    variables: dict[str, object] = {}
    try:
        for block in documents.blocks(name, "python"):
            # The lines of tracebacks are the document's.
            text = "\n" * (block.line - 1) + block.text
            exec(compile(text, name, "exec"), variables)
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _large_model(folder: Path) -> None:
    """Not as large as its name."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    transformers.LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)


@pytest.mark.parametrize("name", documents.NAMES)
def test_code_has_a_known_language(name: str) -> None:
    for block in documents.blocks(name):
        assert block.language in LANGUAGES, f"{name}:{block.line}"
        if block.language != "py":  # of other packages, which are not installed
            continue
        compile(block.text, name, "exec")
        assert "adaround_ext" not in block.text, f"{name}:{block.line} could run"


def test_there_are_guides_to_run() -> None:
    assert {"README.md", "docs/method.md", "docs/cnn.md", "docs/transformer.md"} <= set(RUN)
