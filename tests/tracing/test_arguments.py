"""Which parameter of a model gets which value of a batch, in all calls that take batches."""

from __future__ import annotations

import re
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaround_ext import export_model, quantize_, sensitivity, verify
from adaround_ext.tracing.arguments import Arguments
from tests.support.export_models import quantized

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"preset": "fast", "bits": 4, "progress": False}
IDS, MASK = torch.arange(32).view(4, 8), torch.ones(4, 8, dtype=torch.int64)
X, Y, IMAGE = torch.randn(4, 8), torch.randn(4, 8), torch.randn(4, 3, 8, 8)
LABEL = torch.tensor([3, 0, 2, 1])
Example = namedtuple("Example", ("image", "label"))


class Takes(nn.Module):
    """Returns what it is given."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.forward = forward  # type: ignore[method-assign]


def one(x):
    return x * 1.0


def masked(ids, mask=None):
    return ids * 1


def required(x, t):
    return x


def labelled(ids, mask=None, labels=None):
    return ids


def pair(pair):
    first, second = pair
    return first @ second.mT


def triple(values):
    a, b, c = values
    return a @ b.mT @ c


def features(features):
    return features["ids"] * features["mask"]


def typed(x: Tensor):
    return x


def swallowing(ids=None, mask=None, **named):
    return named["other"] if ids is None else ids * 1


def anything(*values, **named):
    return values[0]


def inner(*values):
    (x,) = values
    return x


def images(images, targets=None):
    return images[0]


def boxed(images, boxes=None):
    return images[0]


@pytest.mark.parametrize(
    ("forward", "batch", "args", "kwargs", "note"),
    [
        # A label behind what the model takes.
        (masked, (IDS, MASK, LABEL), (IDS, MASK), {}, r"mask; value 3 \(int64 \[4\]\).*label"),
        (masked, [IDS, MASK, LABEL, LABEL], (IDS, MASK), {}, "value 3.*label.*value 4.*label"),
        (masked, (IDS, MASK, X), (IDS, MASK), {}, r"value 3 \(float32 \[4, 8\]\): no parameter"),
        (one, (X, LABEL), (X,), {}, r"value 1 \(.*\) -> x; value 2 .*label, left out"),
        (one, (X, torch.rand(4)), (X,), {}, "value 2 .*: no parameter is left for it, left out"),
        (typed, (X, Y), (X,), {}, "value 2 .*left out"),
        (one, Example(IMAGE, LABEL), (IMAGE,), {}, "label, left out"),
        # A label that would go to a parameter with a default.
        (masked, (IDS, LABEL), (IDS,), {}, r"value 2 \(int64 \[4\]\): taken as label, left out"),
        (masked, (IMAGE, LABEL.int()), (IMAGE,), {}, "int32.*label"),
        (masked, (IMAGE, LABEL.numpy()), (IMAGE,), {}, "int64.*label"),
        (masked, (IMAGE, [3, 0, 2, 1]), (IMAGE,), {}, "list.*label"),
        (masked, (IMAGE, LABEL, ["a", "b", "c", "d"]), (IMAGE,), {}, "value 2.*label.*value 3"),
        (labelled, (IDS, MASK, LABEL), (IDS, MASK, LABEL), {}, "value 3 .* -> labels"),
        (labelled, (IDS, LABEL), (IDS,), {}, "label, left out"),
        (images, ([IMAGE[0], IMAGE[1]], [1, 2]), ([IMAGE[0], IMAGE[1]], [1, 2]), {}, "-> targets"),
        (boxed, ([IMAGE[0], IMAGE[1]], [1, 2]), ([IMAGE[0], IMAGE[1]],), {}, "label, left out"),
        # The same integers where they are needed, or are no label.
        (required, (X, LABEL), (X, LABEL), {}, None),
        (required, (X, LABEL, LABEL), (X, LABEL), {}, "-> t; value 3 .*label"),
        (masked, (IDS, MASK), (IDS, MASK), {}, "value 2 .* -> mask"),
        (masked, (IDS, LABEL[:3]), (IDS, LABEL[:3]), {}, "-> mask"),
        (masked, (X, torch.rand(4)), None, {}, "-> mask"),
        (one, (LABEL,), (LABEL,), {}, None),
        (one, X, (X,), {}, None),
        # A tuple or a mapping for one parameter.
        (pair, (X, Y), ((X, Y),), {}, "-> pair, as one argument"),
        (pair, [X, Y, LABEL], ([X, Y],), {}, "-> pair, as one argument; value 3 .*label"),
        (pair, ((X, Y), LABEL), ((X, Y),), {}, "label, left out"),
        (pair, ((X, Y),), ((X, Y),), {}, None),
        (features, {"ids": IDS, "mask": MASK}, ({"ids": IDS, "mask": MASK},), {}, "-> features"),
        (features, ({"ids": IDS, "mask": MASK}, LABEL), ({"ids": IDS, "mask": MASK},), {}, "label"),
        # Mappings.
        (masked, {"ids": IDS, "mask": MASK}, (), {"ids": IDS, "mask": MASK}, None),
        (masked, {"ids": IDS, "label": LABEL}, (), {"ids": IDS}, r"label \(int64.*\): taken as"),
        (labelled, {"ids": IDS, "labels": LABEL}, (), {"ids": IDS, "labels": LABEL}, None),
        (swallowing, {"other": IDS}, (), {"other": IDS}, None),
        (anything, {"ids": IDS, "labels": 1}, (), {"ids": IDS, "labels": 1}, None),
        (masked, ({"ids": IDS, "mask": MASK}, LABEL), (), {"ids": IDS, "mask": MASK}, "holds all"),
        (required, ((X, LABEL), LABEL), (X, LABEL), {}, "holds all"),
        # Whatever the model says of it itself.
        (anything, (X, LABEL), (X, LABEL), {}, r"value 2 .* -> \*args"),
        (inner, (X, LABEL), (X,), {}, "label, left out"),
    ],
)  # fmt: skip
def test_readings(
    forward: Callable[..., Any], batch: Any, args: Any, kwargs: dict[str, Any], note: str | None
) -> None:
    reader = Arguments(Takes(forward), "calibration")
    given, named = reader.of(batch)
    assert _plain(given) == _plain(tuple(batch) if args is None else args)
    assert _plain(named) == _plain(kwargs)
    assert reader.of(batch)[1].keys() == named.keys()
    if note is None:
        assert reader.notes == []
    else:
        (said,) = reader.notes  # once
        assert re.search(f"^calibration: .*{note}", said), said


def _plain(tree: Any) -> Any:
    """With tensors and arrays as lists, which can be compared."""
    if isinstance(tree, (Tensor, np.ndarray)):
        return tree.tolist()
    if isinstance(tree, dict):
        return {key: _plain(value) for key, value in tree.items()}
    return [_plain(value) for value in tree] if isinstance(tree, (tuple, list)) else tree


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("labels", [(), (1,), (1, 1)])
def test_tuples_whatever_the_batch_size(size: int, labels: tuple[int, ...]) -> None:
    label = [torch.zeros(size, dtype=torch.int64) for _ in labels]
    values = (torch.randn(size, 8), torch.randn(size, 8), *label)
    given, _ = Arguments(Takes(pair), "data").of(values)
    assert len(given) == 1 and len(given[0]) == 2
    reader = Arguments(Takes(triple), "data")
    with pytest.raises(TypeError, match=r"forward takes \(values\), got a tuple of .*unpack"):
        reader.of(values[:2])


@pytest.mark.parametrize(
    ("forward", "batch", "message"),
    [
        (required, (X,), r"batch 1: forward takes \(x, t\), got a tuple of .*\[4, 8\].*'t'"),
        (required, X, r"forward takes \(x, t\), got float32 \[4, 8\]"),
        (masked, {"pixels": IMAGE}, r"\(ids, mask=None\), got a mapping with pixels \(float32"),
        (masked, {"ids": IDS, "msk": MASK}, r"mask=None\), got .*msk \(int64 \[4, 8\]\).*'msk'"),
        (one, {"pixels": 3, "b": None}, r"takes \(x\), got a mapping with pixels \(3\), b \(None"),
        (features, {"pixels": IMAGE}, r"takes \(features\), got .*pixels.*KeyError: 'ids'"),
        (swallowing, {"id": IDS}, r"mask=None, \*\*named\), got .*id \(int64.*these names, KeyErr"),
        (typed, (), r"takes \(x\), got a tuple of nothing"),
    ],
)
def test_refused(forward: Callable[..., Any], batch: Any, message: str) -> None:
    with pytest.raises(TypeError, match="data must fit: .*" + message):
        Arguments(Takes(forward), "data").check(batch, 1, "data must fit")


def test_wrappers_are_read_as_what_they_hold() -> None:
    for wrapped in (torch.compile(Takes(masked)), nn.DataParallel(Takes(masked))):
        given, _ = Arguments(wrapped, "data").of((IDS, MASK, LABEL))
        assert len(given) == 2


def test_trying_leaves_no_traces() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    x = X.clone()

    def writes(pair):
        pair[0].add_(torch.rand(8))
        raise ValueError

    model = Takes(writes).train()
    Arguments(model, "data").of((x, Y))
    assert torch.equal(x, X) and torch.equal(torch.get_rng_state(), state) and model.training


class Net(nn.Module):
    """Two layers, and what it was given."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(32, 8), nn.Linear(8, 4)

    def forward(self, x, scale=None, bias=None):
        assert bias is None, "a label was given"
        h = self.first(x)
        return self.second(h if scale is None else h * scale)


def test_one_rule_for_all_calls(tmp_path: Path) -> None:
    """The loader that quantize_ takes."""
    torch.manual_seed(0)
    data = [(torch.randn(8, 32), torch.rand(8, 1) + 3, torch.arange(8)) for _ in range(3)]
    plain = [{"x": x, "scale": scale} for x, scale, _ in data]
    first, second = Net(), Net()
    second.load_state_dict(first.state_dict())
    result = sensitivity(first, data, bits=(4,), progress=False)
    assert result.network == sensitivity(second, plain, bits=(4,), progress=False).network
    assert any("value 3" in note and "label" in note for note in result.notes)
    report = quantize_(first, data, **FAST)
    quantize_(second, plain, **FAST)
    assert torch.equal(first.second.weight, second.second.weight)
    assert any("value 3" in note and "label" in note for note in report.notes)
    export_model(first, tmp_path / "saved", "safetensors")
    parity = verify(first, tmp_path / "saved", data)
    assert parity.ok and parity.batches == 3
    assert "data: value 1 (float32 [8, 32]) -> x" in str(parity)
    with pytest.raises(TypeError, match=r"data must hold what .*batch 1: forward takes \(x, scale"):
        verify(first, tmp_path / "saved", [data[0], {"pixels": X}])


@pytest.mark.parametrize("kind", ["onnx", "aimet", "torchao"])
def test_exports_take_a_batch_of_the_loader(kind: str, tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime") if kind != "torchao" else ("torchao",):
        pytest.importorskip(package)
    data = [(torch.randn(8, 32), torch.rand(8, 1) + 3, torch.arange(8)) for _ in range(2)]
    model = quantized(Net(), data[0][0])
    export_model(model, tmp_path / "out", kind, batch=data[0])
    report = verify(model, tmp_path / "out", data)
    assert report.ok and report.notes
