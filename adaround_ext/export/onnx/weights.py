"""Weights in ONNX files: integers, and what DequantizeLinear needs to give the weight exactly."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor, nn

from adaround_ext.export.quantized_layers import QuantizedLayer


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """weight = scale (codes - zero_point), as DequantizeLinear computes it.

    codes: int8, or uint8 where there is a zero_point, in the shape that is stored. storage: "int4",
    "uint4", "int8" or "uint8". scale (float32 or float16) and zero_point (of codes' type; None
    where all are 0): scalars; or one for each index along ``axis``; or, with ``block_size``, of the
    shape of codes but that so many in turn along ``axis`` share one. reshape: the shape of the
    weight, where it is not that of codes.
    """

    codes: Tensor
    storage: str
    scale: Tensor
    zero_point: Tensor | None
    axis: int | None
    block_size: int | None
    reshape: tuple[int, ...] | None

    def tensors(self) -> dict[str, tuple[Tensor, str | None]]:
        """What a file holds of it, with the storage of integers, by the ends of their names."""
        tensors: dict[str, tuple[Tensor, str | None]] = {
            "": (self.codes, self.storage),
            "_scale": (self.scale, None),
        }
        if self.zero_point is not None:
            tensors["_zero_point"] = (self.zero_point, self.storage)
        if self.reshape is not None:
            tensors["_shape"] = (torch.tensor(self.reshape, device="cpu"), None)
        return tensors


def stored_weight(
    layer: QuantizedLayer,
    *,
    transpose: bool = False,
    centred: bool = False,
    blocks: Collection[int] = (),
    channel_blocks: int | None = None,
) -> StoredWeight:
    """The form with the fewest scales that gives the weight exactly.

    transpose: a Linear's weight as [in, out], the second factor of MatMul, not in its own shape.
    centred: codes - zero_point are stored, without zero points. Of a Linear, groups of columns are
    cut to the largest of ``blocks`` that divides them, if any; with transpose, ``channel_blocks``
    repeats scales of whole channels, too, for blocks of so many inputs.

    Raises ValueError where there is no such form.
    """
    codes, runs = layer.weight.codes, layer.scale_index
    form = _form(layer, runs, transpose, blocks, channel_blocks)
    zero_point = None if layer.symmetric else layer.weight.zero_point.reshape(-1)
    bits = layer.bits
    if centred and zero_point is not None:
        codes = (codes.int() - zero_point[runs.long()]).to(torch.int8)
        zero_point, bits = None, bits + 1
    natural = layer.matrix.weight_from_matrix(codes)
    sign = "int" if codes.dtype == torch.int8 else "uint"
    run = form.run.long()
    return StoredWeight(
        codes=(natural.t() if transpose else natural).reshape(form.shape).contiguous(),
        storage=f"{sign}4" if bits <= 4 else f"{sign}8",
        scale=_scale(layer).reshape(-1)[run],
        zero_point=None if zero_point is None else zero_point[run].to(codes.dtype),
        axis=form.axis,
        block_size=form.block_size,
        reshape=None if transpose or form.shape == natural.shape else tuple(natural.shape),
    )


def _scale(layer: QuantizedLayer) -> Tensor:
    """In float16 for a weight in it, where that is exact: the product then is rounded once, too."""
    scale = layer.weight.scale
    half = scale.to(torch.float16)
    exact = layer.matrix.weight.dtype == torch.float16 and torch.equal(half.float(), scale)
    return half if exact else scale


@dataclass(frozen=True, eq=False)
class _Form:
    """shape: of the codes. run: which of all scales, at each place that DequantizeLinear has."""

    shape: torch.Size
    run: Tensor
    axis: int | None = None
    block_size: int | None = None


def _form(
    layer: QuantizedLayer,
    matrix: Tensor,
    transpose: bool,
    blocks: Collection[int],
    channel_blocks: int | None,
) -> _Form:
    """See :func:`stored_weight`. matrix: which scale belongs to each weight [rows, cols]."""
    natural = layer.matrix.weight_from_matrix(matrix)
    stored = natural.t() if transpose else natural
    forms = list(_forms(stored))
    # The matrix itself, and Reshape, where that gives the weight: not where layers reorder theirs.
    if not transpose and torch.equal(natural.reshape(matrix.shape), matrix):
        forms += _forms(matrix)
    if not forms:
        raise ValueError(
            f"DequantizeLinear has no form for groups of {layer.group_size} in a weight of shape "
            f"{list(natural.shape)}"
        )
    best = min(forms, key=lambda form: form.run.numel())
    inputs = 0 if transpose else 1  # the dimension of a Linear's
    if transpose and channel_blocks is not None and layer.granularity != "per_group":
        return _blocked(stored, inputs, channel_blocks)
    run = best.block_size
    if run is not None and best.axis == inputs and isinstance(layer.module, nn.Linear):
        size = max((block for block in blocks if run % block == 0), default=run)
        return _blocked(stored, inputs, size)
    return best


def _forms(runs: Tensor) -> Iterator[_Form]:
    """The forms for codes that belong to the scales ``runs``, but that of a scale a code."""
    lengths = [_run_length(runs, axis) for axis in range(runs.dim())]
    changing = [axis for axis, length in enumerate(lengths) if length < runs.shape[axis]]
    if not changing:
        yield _Form(runs.shape, runs.reshape(-1)[0])
        return
    if len(changing) == 1:
        along = tuple(slice(None) if axis in changing else 0 for axis in range(runs.dim()))
        yield _Form(runs.shape, runs[along], changing[0])
    for axis, length in enumerate(lengths):
        if length > 1:
            yield _blocked(runs, axis, length)


def _blocked(runs: Tensor, axis: int, size: int) -> _Form:
    starts = torch.arange(0, runs.shape[axis], size, device=runs.device)
    return _Form(runs.shape, runs.index_select(axis, starts), axis, size)


def _run_length(runs: Tensor, axis: int) -> int:
    """The length of the longest equal blocks along ``axis`` in which nothing changes."""
    lines = runs.movedim(axis, 0).reshape(runs.shape[axis], -1)
    changes = (lines[1:] != lines[:-1]).any(1).nonzero().flatten() + 1
    return gcd(*changes.tolist()) or runs.shape[axis]
