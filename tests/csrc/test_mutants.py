"""The bugs of scripts/mutants.py still find their places; `make mutants` plants them."""

from __future__ import annotations

from pathlib import Path

import pytest

from scripts.cuda_mutants import CUDA_MUTANTS
from scripts.mutants import MUTANTS, THREADS, Mutant

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("mutant", MUTANTS + CUDA_MUTANTS, ids=lambda mutant: mutant.name)
def test_has_its_place(mutant: Mutant) -> None:
    text = (_ROOT / mutant.file).read_text()
    assert mutant.planted(text) != text
    for name in mutant.tests.split():
        assert name == THREADS or len([*_ROOT.glob(f"tests/*/test_{name}.py")]) == 1


def test_a_text_that_is_not_there_once_is_refused() -> None:
    mutant = Mutant("a bug", "file.h", "x", "y", "ops")
    for text in ("", "xx"):
        with pytest.raises(ValueError, match=r"'a bug' needs its old text once in file\.h"):
            mutant.planted(text)
