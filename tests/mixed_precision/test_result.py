"""What sensitivity returns: predictions, files, the table and the heat map."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path

import pytest
from torch import Tensor

from adaround_ext import Sensitivity
from tests.support.sensitive_models import Branches

pytestmark = pytest.mark.usefixtures("one_thread")


def test_predicted(branches: tuple[Branches, Tensor, Sensitivity]) -> None:
    _, _, result = branches
    chosen = {**dict.fromkeys(result.layers, 4), "fragile": 8}
    expected = sum(result.network[n][b] for n, b in chosen.items())
    assert result.predicted(chosen) == pytest.approx(expected)
    with pytest.raises(ValueError, match=r"exactly the layers, differs in \['first', 'other'\]"):
        result.predicted({"other" if n == "first" else n: b for n, b in chosen.items()})
    with pytest.raises(ValueError, match="got 5 for fragile"):
        result.predicted({**chosen, "fragile": 5})
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        result.worst(0)


def test_files(branches: tuple[Branches, Tensor, Sensitivity], tmp_path: Path) -> None:
    _, _, result = branches
    path = tmp_path / "sensitivity.json"
    result.save(path)
    assert Sensitivity.load(path) == result
    assert Sensitivity.load(path).suggest(3) == result.suggest(3)
    assert list(tmp_path.iterdir()) == [path]
    values = json.loads(path.read_text())
    for change, message in (
        ({"format": "other"}, "format 'adaround_ext.sensitivity.1', got 'other'"),
        ({"more": 1}, "unknown 'more'"),
        ({"bits": [2, 3, 4]}, "a number for each of"),
        ({"weights": {"first": 3}}, "must have the layers as keys"),
        ({"batches": "2"}, "batches must be int, got str"),
    ):
        path.write_text(json.dumps(values | change))
        with pytest.raises(ValueError, match=f"written by Sensitivity.save: .*{message}"):
            Sensitivity.load(path)


def test_the_table(branches: tuple[Branches, Tensor, Sensitivity]) -> None:
    _, _, result = branches
    lines = str(result).splitlines()
    assert lines[1].split() == [
        "layer",
        "weights",
        "2",
        "bits",
        "3",
        "bits",
        "4",
        "bits",
        "8",
        "bits",
    ]
    assert [line.split()[0] for line in lines[2:]] == list(result.worst())
    assert len({len(line) for line in lines[1:]}) == 1
    values = result.to_dict() | {"average_bits": 3.0}
    lines = str(Sensitivity.from_dict(values)).splitlines()
    assert [int(line.split()[-1]) for line in lines[2:-1]] == [
        result.suggest(3)[name] for name in result.worst()
    ]
    assert "chosen for at most 3 bits" in lines[-1]


def test_the_heat_map(
    branches: tuple[Branches, Tensor, Sensitivity],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("matplotlib")
    _, _, result = branches
    path = tmp_path / "map.png"
    figure = result.plot(path)
    assert path.read_bytes().startswith(b"\x89PNG")
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == list(result.layers)
    shown = axes.images[0].get_array()
    assert shown.tolist() == [list(result.network[name].values()) for name in result.layers]
    names = tuple(f"layer.{i}" for i in range(130))
    errors = {name: {2: math.inf, 4: 0.0} for name in names}
    many = Sensitivity("$Many", names, dict.fromkeys(names, 1), (2, 4), errors, errors, None, 1, ())
    assert (
        not many.plot(tmp_path / "many.svg")
        .axes[0]
        .get_yticklabels()[0]
        .get_text()
        .startswith("layer")
    )
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="adaround_ext with its extra 'demo'"):
        result.plot()
