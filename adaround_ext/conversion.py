"""Batches with their tensors in another dtype."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree


def converted(
    batches: Iterable[Any], dtypes: Collection[torch.dtype], dtype: torch.dtype
) -> Iterable[Any]:
    """The same batches, with tensors of one of ``dtypes`` in ``dtype``; one at a time.

    A tensor or mapping of all samples stays one. What no pytree knows stays as it is.
    """
    if isinstance(batches, (Tensor, Mapping)):
        return _converted(batches, dtypes, dtype)  # type: ignore[no-any-return]
    return (_converted(batch, dtypes, dtype) for batch in batches)


def _converted(batch: Any, dtypes: Collection[torch.dtype], dtype: torch.dtype) -> Any:
    batch = dict(batch) if isinstance(batch, Mapping) else batch  # as a tokenizer's output
    return pytree.tree_map(
        lambda leaf: leaf.to(dtype) if isinstance(leaf, Tensor) and leaf.dtype in dtypes else leaf,
        batch,
    )
