"""All samples in one tensor or mapping, cut into batches."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree

from adaround_ext.tensors import is_dense

_BATCH_SIZE = 32  # samples


def cut(samples: Tensor | Mapping[str, Any]) -> Iterable[Any]:
    """Batches of 32 samples.

    Of a mapping that is done to tensors, arrays and lists that have as many entries as there are
    samples, the one length of all tensors that is not 1. Others, as a scalar, None or a tensor
    [1, ...], go whole into every batch. Where tensors differ in length, or are within other things,
    all of it is one batch. ValueError that names ``calibration`` for a tensor without dimensions.
    """
    if isinstance(samples, Tensor):
        if samples.dim() == 0:
            raise ValueError("calibration must have a dimension of samples, got a scalar")
        return list(samples.split(_BATCH_SIZE)) if len(samples) else []
    lengths = {len(value) for value in samples.values() if _has_rows(value)}
    if len(lengths) > 1:
        lengths.discard(1)
    if len(lengths) != 1 or any(_nested(value) for value in samples.values()):
        return [samples]
    (count,) = lengths

    def rows(value: Any, begin: int) -> Any:
        long = (_has_rows(value) or isinstance(value, list)) and len(value) == count
        return value[begin : begin + _BATCH_SIZE] if long else value

    return [
        {name: rows(value, begin) for name, value in samples.items()}
        for begin in range(0, count, _BATCH_SIZE)
    ]


def _has_rows(value: Any) -> bool:
    return (is_dense(value) or isinstance(value, np.ndarray)) and value.ndim > 0


def _nested(value: Any) -> bool:
    """Whether tensors are within it that cannot be told to be samples."""
    if isinstance(value, (Tensor, np.ndarray)):
        return isinstance(value, Tensor) and not is_dense(value)
    return any(isinstance(leaf, (Tensor, np.ndarray)) for leaf in pytree.tree_leaves(value))
