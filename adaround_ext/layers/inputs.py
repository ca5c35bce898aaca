"""Calibration data: from what a caller has to checked batches, streamed."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from adaround_ext.checks import check
from adaround_ext.layers.matrix import MatrixLayer

Data = Tensor | Iterable[Tensor]
Targets = Tensor | Iterable[Tensor] | Iterable[Iterable[Tensor]]
Batch = tuple[Tensor, tuple[Tensor, ...] | None]


def batches(
    layers: list[MatrixLayer], name: str, inputs: Data, targets: Targets | None
) -> Iterator[Batch]:
    """Yields (inputs, targets a layer or None), checked and in the form of MatrixLayer.samples.

    Raises ValueError and TypeError naming ``inputs`` or ``targets``: what is no tensor, a shape
    that does not fit, another device, a dtype that is not floating point, NaN or infinity (with
    their number), fewer targets than inputs or more, no data at all.
    """
    device = layers[0].weight.device
    target_items = None if targets is None else _targets(targets, isinstance(inputs, Tensor))
    samples = 0
    for item in _items(inputs):
        x = layers[0].samples(check("inputs", _single(item), device, name))
        outputs: tuple[Tensor, ...] | None = None
        if target_items is not None:
            try:
                outputs = _tuple(next(target_items))
            except StopIteration:
                raise ValueError("targets must have as many batches as inputs, got fewer") from None
            if len(outputs) != len(layers):
                raise ValueError(
                    f"targets must hold a tensor for each of the {len(layers)} layers, "
                    f"got {len(outputs)}"
                )
            outputs = tuple(
                layer.output_samples(check("targets", y, device, name))
                for layer, y in zip(layers, outputs, strict=True)
            )
            for layer, y in zip(layers, outputs, strict=True):
                if len(y) != len(x):
                    raise ValueError(
                        f"targets must have as many samples as inputs, {len(x)}, got {len(y)}"
                    )
                size = list(layer.output_size(x))
                if list(y.shape[2:]) != size:
                    raise ValueError(
                        f"targets must have the output's size {size}, got {list(y.shape[2:])}"
                    )
        samples += len(x)
        yield x, outputs
    if target_items is not None and next(target_items, None) is not None:
        raise ValueError("targets must have as many batches as inputs, got more")
    if samples == 0:
        raise ValueError(f"inputs must hold at least one sample for {name}, got none")


def gather(
    layers: list[MatrixLayer], name: str, inputs: Data, targets: Targets | None
) -> tuple[Tensor, tuple[Tensor, ...] | None, int]:
    """All of it at once: (inputs, targets a layer or None, samples), float32.

    ``samples`` counts the caller's: the sequences of a linear layer, not their tokens.
    """
    samples = 0
    batched_dims = layers[0].weight.dim()  # of an input with several samples

    def counted() -> Iterator[Tensor]:
        nonlocal samples
        for item in _items(inputs):
            first = _single(item)
            if isinstance(first, Tensor):
                samples += len(first) if first.dim() >= batched_dims else 1
            yield item

    # A lone tensor goes with targets that are no iterable of batches.
    source = next(counted()) if isinstance(inputs, Tensor) else counted()
    held = list(batches(layers, name, source, targets))
    if len({x.shape[1:] for x, _ in held}) > 1:
        raise ValueError("inputs must have one sample shape for the sampled objective")
    x = torch.cat([x for x, _ in held]).float()
    if held[0][1] is None:
        return x, None, samples
    columns = zip(*(outputs or () for _, outputs in held), strict=True)
    return x, tuple(torch.cat(column).float() for column in columns), samples


class Rebatcher:
    """Cuts batches again into ones of exactly ``size`` samples (the last may be smaller).

    Where a sample's shape changes, or whether there are targets, the batch before it ends.
    """

    def __init__(self, size: int) -> None:
        self._size = size
        self._held: list[Batch] = []
        self._count = 0

    def push(self, x: Tensor, targets: tuple[Tensor, ...] | None) -> Iterator[Batch]:
        """Takes a batch and yields those that are full."""
        if self._held and self._kind(*self._held[0]) != self._kind(x, targets):
            yield from self.flush()
        begin = 0
        while begin < len(x):
            end = min(len(x), begin + self._size - self._count)
            self._held.append((x[begin:end], targets and tuple(y[begin:end] for y in targets)))
            self._count += end - begin
            begin = end
            if self._count == self._size:
                yield from self.flush()

    def flush(self) -> Iterator[Batch]:
        """What is left."""
        held, self._held, self._count = self._held, [], 0
        if len(held) < 2:
            yield from held
            return
        x = torch.cat([batch[0] for batch in held])
        if held[0][1] is None:
            yield x, None
            return
        columns = zip(*(batch[1] or () for batch in held), strict=True)
        yield x, tuple(torch.cat(column) for column in columns)

    @staticmethod
    def _kind(x: Tensor, targets: tuple[Tensor, ...] | None) -> tuple[object, ...]:
        return x.shape[1:], x.dtype, targets is None


def _items(inputs: Data) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        return iter([inputs])
    if isinstance(inputs, (str, bytes, dict)) or not isinstance(inputs, Iterable):
        raise TypeError(
            f"inputs must be a tensor or an iterable of them, got {type(inputs).__name__}"
        )
    return iter(inputs)


def _targets(targets: Targets, single: bool) -> Iterator[Tensor | Iterable[Tensor]]:
    """One item a batch of inputs; a lone tensor of inputs takes its targets as they are."""
    if isinstance(targets, Tensor) or single:
        return iter([targets])  # type: ignore[list-item]
    if not isinstance(targets, Iterable):
        raise TypeError(
            f"targets must be a tensor or an iterable of them, got {type(targets).__name__}"
        )
    return iter(targets)


def _single(item: object) -> object:
    """The tensor of a DataLoader over one-tensor datasets, which yields [tensor]."""
    return item[0] if isinstance(item, (list, tuple)) and len(item) == 1 else item


def _tuple(item: object) -> tuple[Tensor, ...]:
    return tuple(item) if isinstance(item, (list, tuple)) else (item,)  # type: ignore[return-value]
