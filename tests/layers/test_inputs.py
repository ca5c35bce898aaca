"""Calibration data: streamed, cut again, checked."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from adaround_ext.layers.inputs import Batch, Rebatcher, batches, gather
from adaround_ext.layers.matrix import matrix_layer

LINEAR = nn.Linear(5, 3)
CONV = nn.Conv2d(2, 3, 3)
NAN = torch.tensor([[1.0, float("nan"), float("inf"), 0, 0]])


class WatchedStream:
    """``count`` batches that know how many of them were in memory at once at ``most``."""

    def __init__(self, count: int, *shape: int) -> None:
        self.count, self.shape = count, shape
        self.alive = self.most = 0

    def __iter__(self) -> Iterator[Tensor]:
        for _ in range(self.count):
            memory = np.random.default_rng(0).standard_normal(self.shape, np.float32)
            weakref.finalize(memory, self._release)  # the tensor's memory, and its views'
            self.alive += 1
            self.most = max(self.most, self.alive)
            yield torch.from_numpy(memory)

    def _release(self) -> None:
        self.alive -= 1


def fixed_batches(source: Iterator[Batch], size: int) -> Iterator[Batch]:
    """All that a Rebatcher gives for a whole stream."""
    rebatcher = Rebatcher(size)
    for x, targets in source:
        yield from rebatcher.push(x, targets)
    yield from rebatcher.flush()


def stream(layer: nn.Module, inputs: Any, targets: Any = None) -> Iterator[Batch]:
    return batches([matrix_layer(layer)], "the layer", inputs, targets)


def cut(x: Tensor, sizes: list[int]) -> Iterator[Batch]:
    """Batches of these sizes with two targets each, as batches() would yield them."""
    for part in x.split(sizes):
        yield part, (part + 1, 2 * part)


def test_tensor_is_one_batch() -> None:
    x = torch.randn(7, 5)
    ((got, targets),) = stream(LINEAR, x)
    assert targets is None
    assert torch.equal(got, x)


def test_shapes_are_those_of_samples() -> None:
    x, y = torch.randn(2, 4, 5), torch.randn(2, 4, 3)
    ((got, targets),) = stream(LINEAR, x, y)
    assert targets is not None
    assert torch.equal(got, x.reshape(8, 5))
    assert torch.equal(targets[0], y.reshape(8, 3))
    ((got, _),) = stream(CONV, torch.randn(2, 6, 6))
    assert got.shape == (1, 2, 6, 6)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda parts: parts,
        lambda parts: tuple(parts),
        lambda parts: iter(parts),
        lambda parts: [[part] for part in parts],
        lambda parts: ((part,) for part in parts),
        lambda parts: DataLoader(TensorDataset(torch.cat(parts)), batch_size=4),
    ],
    ids=["list", "tuple", "iterator", "one-element-lists", "one-element-tuples", "dataloader"],
)
def test_kinds_of_iterables(inputs: Callable[[list[Tensor]], Any]) -> None:
    x = torch.randn(10, 5)
    got = list(stream(LINEAR, inputs(list(x.split(4)))))
    assert [len(part) for part, _ in got] == [4, 4, 2]
    assert torch.equal(torch.cat([part for part, _ in got]), x)


def test_targets_go_in_step_with_inputs() -> None:
    x, y = torch.randn(10, 5), torch.randn(10, 3)
    got = list(stream(LINEAR, x.split(4), iter(y.split(4))))
    assert torch.equal(torch.cat([targets[0] for _, targets in got if targets]), y)
    # One batch and its targets, each in whatever way.
    assert len(list(stream(LINEAR, [x], y))) == 1
    assert len(list(stream(LINEAR, x, (y,)))) == 1


def test_targets_of_several_layers() -> None:
    layers = [matrix_layer(nn.Linear(5, rows)) for rows in (3, 4)]
    x, y, z = torch.randn(6, 5), torch.randn(6, 3), torch.randn(6, 4)
    ((_, targets),) = batches(layers, "both", x, (y, z))
    assert targets is not None
    assert all(torch.equal(a, b) for a, b in zip(targets, (y, z), strict=True))
    pairs = [(y[:4], z[:4]), [y[4:], z[4:]]]
    got = list(batches(layers, "both", iter(x.split(4)), pairs))
    assert [[tuple(t.shape) for t in targets or ()] for _, targets in got] == [
        [(4, 3), (4, 4)],
        [(2, 3), (2, 4)],
    ]


def test_batches_carry_no_autograd_graph() -> None:
    x = torch.randn(4, 5, requires_grad=True)
    ((got, _),) = stream(LINEAR, 2 * x)
    assert not got.requires_grad


def test_batches_are_taken_one_at_a_time() -> None:
    taken = []

    def source() -> Iterator[Tensor]:
        for i in range(4):
            taken.append(i)
            yield torch.randn(3, 5)

    for i, _ in enumerate(stream(LINEAR, source())):
        assert taken == list(range(i + 1))


@pytest.mark.parametrize("rows", [3, 8, 20])
def test_stream_is_never_held_whole(rows: int) -> None:
    """Through batches and fixed_batches, what has been used up is released."""
    source = WatchedStream(40, rows, 5)
    assert sum(len(x) for x, _ in fixed_batches(stream(LINEAR, source), 8)) == 40 * rows
    assert source.most <= -(-8 // rows) + 3


@pytest.mark.parametrize(
    "sizes", [[16], [3, 1, 10, 2], [1] * 16, [4, 4, 4, 4], [15, 1], [5, 0, 11]], ids=str
)
@pytest.mark.parametrize("size", [1, 4, 5, 16, 100])
def test_fixed_batches(sizes: list[int], size: int) -> None:
    x = torch.arange(48.0).view(16, 3)
    got = list(fixed_batches(cut(x, sizes), size))
    assert [len(part) for part, _ in got] == [len(part) for part in x.split(size)]
    assert torch.equal(torch.cat([part for part, _ in got]), x)
    for part, targets in got:
        assert targets is not None
        assert torch.equal(targets[0], part + 1)
        assert torch.equal(targets[1], 2 * part)


def test_fixed_batches_without_targets_or_samples() -> None:
    x = torch.randn(6, 3)
    assert [len(part) for part, _ in fixed_batches(iter([(x, None), (x, None)]), 4)] == [4, 4, 4]
    assert list(fixed_batches(iter([]), 4)) == []
    assert list(fixed_batches(iter([(x[:0], None)]), 4)) == []


def test_fixed_batches_end_where_the_shape_changes() -> None:
    small, large = torch.randn(5, 2, 6, 6), torch.randn(3, 2, 8, 8)
    got = fixed_batches(iter([(small, None), (large, None), (small, None)]), 4)
    assert [tuple(part.shape) for part, _ in got] == [
        (4, 2, 6, 6),
        (1, 2, 6, 6),
        (3, 2, 8, 8),
        (4, 2, 6, 6),
        (1, 2, 6, 6),
    ]


@pytest.mark.parametrize(
    ("layer", "inputs", "samples"),
    [
        (LINEAR, torch.randn(7, 5), 7),
        (LINEAR, torch.randn(2, 4, 5), 2),
        (LINEAR, torch.randn(5), 1),
        (LINEAR, [torch.randn(2, 4, 5), torch.randn(3, 4, 5)], 5),
        (LINEAR, [[torch.randn(2, 4, 5)], [torch.randn(1, 4, 5)]], 3),
        (LINEAR, [torch.randn(5)] * 3, 3),
        (CONV, torch.randn(4, 2, 6, 6), 4),
        (CONV, torch.randn(2, 6, 6), 1),
        (CONV, iter([torch.randn(2, 6, 6)] * 3), 3),
    ],
    ids=["rows", "sequences", "one", "lists", "nested", "ones", "images", "image", "image-list"],
)
def test_gather_counts_the_callers_samples(layer: nn.Module, inputs: Any, samples: int) -> None:
    x, targets, counted = gather([matrix_layer(layer)], "the layer", inputs, None)
    assert targets is None
    assert counted == samples
    held = [inputs] if isinstance(inputs, Tensor) else inputs
    if isinstance(held, list):
        parts = [part[0] if isinstance(part, list) else part for part in held]
        assert torch.equal(x, torch.cat([matrix_layer(layer).samples(part) for part in parts]))


def test_gather_copies_and_converts() -> None:
    x, y = torch.randn(4, 5).half(), torch.randn(4, 3).bfloat16()
    got, targets, _ = gather([matrix_layer(LINEAR)], "the layer", [x], [y])
    assert targets is not None
    assert got.dtype == targets[0].dtype == torch.float32
    x = torch.randn(4, 5)
    got, _, _ = gather([matrix_layer(LINEAR)], "the layer", x, None)
    assert got.data_ptr() != x.data_ptr()  # an activation function may work in place


def test_gather_needs_one_shape() -> None:
    parts = [torch.randn(1, 2, 6, 6), torch.randn(1, 2, 8, 8)]
    with pytest.raises(ValueError, match=r"^inputs must have one sample shape"):
        gather([matrix_layer(CONV)], "the layer", parts, None)


X, Y = torch.randn(4, 5), torch.randn(4, 3)
WRONG: dict[str, tuple[type[Exception], str, Any, Any]] = {
    "no-iterable": (TypeError, r"^inputs must be a tensor or an iterable .*got int", 3, None),
    "none": (TypeError, r"^inputs must be a tensor or an iterable .*got NoneType", None, None),
    "text": (TypeError, r"^inputs must be a tensor or an iterable .*got str", "data", None),
    "sparse": (
        TypeError,
        r"^inputs must be strided tensors, got torch.sparse",
        X.to_sparse(),
        None,
    ),
    "dict": (TypeError, r"^inputs must be a tensor or an iterable .*got dict", {"x": X}, None),
    "no-tensors": (TypeError, r"^inputs must hold tensors, got ndarray", [X.numpy()], None),
    "pairs": (TypeError, r"^inputs must hold tensors, got tuple", [(X, Y)], None),
    "integers": (TypeError, r"^inputs must be floating point, got .*int64", X.long(), None),
    "complex": (TypeError, r"^inputs must be floating point, got .*complex64", X.cfloat(), None),
    "device": (ValueError, r"^inputs must be on .* cpu, got meta", [X.to("meta")], None),
    "features": (ValueError, r"^inputs must have 5 features .*got shape \[3, 4\]", X[:3, :4], None),
    "nan": (ValueError, r"^inputs of the layer must be finite, got 2 NaN or inf", [X, NAN], None),
    "nothing": (ValueError, r"^inputs must hold at least one sample for the layer", [], None),
    "no-samples": (ValueError, r"^inputs must hold at least one sample", [X[:0]], None),
    "target-kind": (TypeError, r"^targets must be a tensor or an iterable .*got int", [X], 3),
    "target-tensor": (TypeError, r"^targets must hold tensors, got str", X, "Y"),
    "target-type": (TypeError, r"^targets must be floating point, got .*int64", X, Y.long()),
    "target-device": (ValueError, r"^targets must be on .* cpu, got meta", X, Y.to("meta")),
    "target-nan": (
        ValueError,
        r"^targets of the layer .*got 12 NaN",
        X,
        torch.where(Y > 9, Y, torch.nan),
    ),
    "target-features": (ValueError, r"^targets must have 3 features", X, X),
    "target-samples": (ValueError, r"^targets must have as many samples .*4, got 2", X, Y[:2]),
    "target-layers": (ValueError, r"^targets must hold a tensor for each of the 1", X, (Y, Y)),
    "targets-fewer": (ValueError, r"^targets must have as many batches .*got fewer", [X, X], [Y]),
    "targets-more": (ValueError, r"^targets must have as many batches .*got more", [X], [Y, Y]),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_data_is_refused(name: str) -> None:
    error, message, inputs, targets = WRONG[name]
    with pytest.raises(error, match=message):
        list(stream(LINEAR, inputs, targets))


@pytest.mark.parametrize("size", [(1, 1), (4, 1), (5, 4), (4, 4, 1)], ids=str)
def test_targets_must_have_the_outputs_size(size: tuple[int, ...]) -> None:
    """A size that broadcasts is no exception."""
    x, y = torch.randn(2, 2, 6, 6), torch.randn(2, 3, *size)
    with pytest.raises(ValueError, match=r"^targets must "):
        list(stream(CONV, x, y))
