"""Trees of tensors: their leaves, memory, versions, hashes and dtypes; records with rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

Terms = TypeVar("Terms", bound="RowTerms")
TOLERANCE = 1e-4  # of a norm: float32 outputs that are computed in another order
HALF_TOLERANCE = 1e-2  # 16-bit weights or outputs: every layer's own rounding shows
_HASHED_BYTES = 1 << 24  # at a time: a large tensor on another device is not copied whole


def add_tensor(digest: Any, tensor: Tensor) -> None:
    """Adds dtype, shape and bits of a tensor to a hashlib object; a meta tensor has no bits."""
    digest.update(f"{tensor.dtype} {list(tensor.shape)};".encode())
    if tensor.is_meta:
        digest.update(b"meta;")
        return
    flat = tensor.detach().reshape(-1)
    for piece in flat.split(max(1, _HASHED_BYTES // max(flat.element_size(), 1))):
        digest.update(memoryview(piece.cpu().contiguous().view(torch.uint8).numpy()))


def is_dense(leaf: object) -> TypeGuard[Tensor]:
    """Whether it is a tensor with strides: neither sparse nor nested."""
    return isinstance(leaf, Tensor) and leaf.layout == torch.strided


def tensors(tree: object) -> Iterator[Tensor]:
    """The dense tensors in nested tuples, lists, dicts and what else torch registers."""
    for leaf in pytree.tree_leaves(tree):
        if is_dense(leaf) and not nn.parameter.is_lazy(leaf):
            yield leaf


def version(tensor: Tensor) -> int:
    """How often a tensor was written to; 0 where torch does not count."""
    return 0 if tensor.is_inference() else tensor._version


def extent(tensor: Tensor) -> tuple[int, int]:
    """The addresses from the tensor's first byte to behind its last."""
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    entries = 1 + sum((size - 1) * stride for size, stride in steps)
    return tensor.data_ptr(), tensor.data_ptr() + entries * tensor.element_size()


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


@dataclasses.dataclass(frozen=True)
class RowTerms:
    """Base of records whose fields have a value or a row for each row of a weight.

    Fields are tensors [rows, ...], or None where a record has none of that name.
    """

    def __getitem__(self: Terms, rows: slice | Tensor) -> Terms:
        """The terms of some rows."""
        terms = {name: getattr(self, name) for name in self._names()}
        return type(self)(**{name: None if t is None else t[rows] for name, t in terms.items()})

    @classmethod
    def cat(cls: type[Terms], records: Sequence[Terms]) -> Terms:
        """The rows of all records, in their order; what only some have is 0 for the others."""
        columns = {name: [getattr(record, name) for record in records] for name in cls._names()}
        rows = [
            next(len(term) for term in terms if term is not None)
            for terms in zip(*columns.values(), strict=True)
        ]
        return cls(**{name: _cat(terms, rows) for name, terms in columns.items()})

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in dataclasses.fields(cls)]


def _cat(values: Sequence[Tensor | None], rows: Sequence[int]) -> Tensor | None:
    like = next((value for value in values if value is not None), None)
    if like is None:
        return None
    return torch.cat(
        [
            like.new_zeros(n, *like.shape[1:]) if value is None else value
            for value, n in zip(values, rows, strict=True)
        ]
    )
