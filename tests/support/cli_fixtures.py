"""What the tests of the command line share: models and data in files, and a way to run commands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaround_ext.cli.main import main

NETS = """
import torch
from torch import nn

print("the module is imported")

def net():
    layers = [nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)]
    return nn.Sequential(*layers)

class Backwards(nn.Module):
    def __init__(self):
        super().__init__()
        self.last, self.first, self.idle = nn.Linear(4, 2), nn.Linear(3, 4), nn.Linear(2, 2)
    def forward(self, x):
        return self.last(self.first(x))

def images():
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(8, 2, 4, 4, generator=generator) for _ in range(2)]

def rows():
    return (torch.randn(5, 3) for _ in range(2))

def flat():
    return nn.Flatten()

def nothing():
    return []

def broken():
    raise RuntimeError("no weights\\nto be found")

def number():
    return 3

def interrupted():
    raise KeyboardInterrupt
"""
WORDS = [
    *[
        "the",
        "a",
        "cat",
        "dog",
        "bird",
        "sees",
        "hears",
        "likes",
        "small",
        "big",
        "red",
        "old",
        "house",
        "tree",
    ],
    ".",
    ",",
]
FAST = ["--preset", "fast", "--quiet"]
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs a command: (exit status, standard output, standard error)."""

    def run(*argv: object) -> tuple[int, str, str]:
        try:
            status = main([str(arg) for arg in argv])
        except SystemExit as stopped:
            status = int(stopped.code or 0)
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a module ``nets_of_the_cli``."""
    (tmp_path / "nets_of_the_cli.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "nets_of_the_cli", raising=False)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    return tmp_path


def save_tokenizer(path: Path, *special: str, marked: bool = False) -> int:
    """A tokenizer of words, with [CLS] and [SEP] around a text where it is marked; its size."""
    tokenizers = pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    vocabulary = {word: i for i, word in enumerate([*special, *WORDS])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="[UNK]"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    if marked:
        ends = [(end, vocabulary[end]) for end in ("[CLS]", "[SEP]")]
        backend.post_processor = tokenizers.processors.TemplateProcessing(
            single="[CLS] $A [SEP]", special_tokens=ends
        )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="[PAD]", unk_token="[UNK]"
    ).save_pretrained(path)
    return len(vocabulary)


def save_model(path: Path, name: str, dtype: torch.dtype = torch.float32, **sizes: Any) -> Path:
    """A Hugging Face directory of a tiny model of this class, with a tokenizer."""
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    settings: dict[str, Any] = {
        "vocab_size": save_tokenizer(path, "[FIRST]", "[PAD]", "[UNK]"),
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    torch.manual_seed(1)
    kind(kind.config_class(**(settings | sizes))).to(dtype).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory in bfloat16: a tiny Llama and a tokenizer of words."""
    path = tmp_path_factory.mktemp("models") / "llama"
    return save_model(
        path, "LlamaForCausalLM", torch.bfloat16, hidden_size=64, intermediate_size=96
    )


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face directory: a tiny BERT and a tokenizer of words."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path_factory.mktemp("models") / "bert"
    size = save_tokenizer(path, "[PAD]", "[UNK]", "[CLS]", "[SEP]", marked=True)
    torch.manual_seed(1)
    config = transformers.BertConfig(
        vocab_size=size,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=20,
    )
    transformers.BertModel(config).eval().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 words."""
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    drawn = torch.randint(len(WORDS), (200,), generator=torch.Generator().manual_seed(3))
    path.write_text(" ".join(WORDS[int(i)] for i in drawn))
    return path
