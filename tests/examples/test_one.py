"""The first examples run as they are, and their last line holds."""

from __future__ import annotations

import re

import pytest

from examples import one_layer


def numbers(text: str) -> list[float]:
    """Those of the last line."""
    return [float(one) for one in re.findall(r"\d+\.\d+(?:e-\d+)?", text.splitlines()[-1])]


def test_one_layer(capsys: pytest.CaptureFixture[str]) -> None:
    one_layer.main()
    printed = capsys.readouterr().out
    assert printed.startswith("gram, balanced, 4 bits: relative output error")
    (error,) = numbers(printed)
    assert 0 < error < 0.003  # rounding to nearest has 0.004


def test_one_model(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("sklearn")
    from examples import one_model

    one_model.main()
    printed = capsys.readouterr().out
    assert "2 layers at 3." in printed
    before, after = numbers(printed)
    assert before > 90 and after > before - 2
