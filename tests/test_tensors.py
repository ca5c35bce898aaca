"""Records of tensors with rows."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from adaround_ext.tensors import RowTerms


@dataclasses.dataclass(frozen=True)
class Terms(RowTerms):
    values: Tensor
    matrix: Tensor | None


def terms(rows: int, matrix: bool) -> Terms:
    return Terms(torch.randn(rows, dtype=torch.float64), torch.randn(rows, 3) if matrix else None)


def test_rows_of_a_record() -> None:
    record = terms(5, matrix=True)
    assert record.matrix is not None
    some = record[1:3]
    assert torch.equal(some.values, record.values[1:3])
    flags = torch.tensor([True, False, False, True, False])
    for rows in (flags, torch.tensor([0, 3])):
        some = record[rows]
        assert some.matrix is not None
        assert torch.equal(some.matrix, record.matrix[[0, 3]])
    assert terms(5, matrix=False)[:2].matrix is None


def test_records_in_a_row() -> None:
    records = [terms(2, matrix=False), terms(3, matrix=True)]
    joined = Terms.cat(records)
    assert torch.equal(joined.values, torch.cat([record.values for record in records]))
    assert joined.values.dtype == torch.float64
    assert joined.matrix is not None and joined.matrix.shape == (5, 3)
    assert not joined.matrix[:2].any()  # what a record lacks is 0
    assert torch.equal(joined[2:].matrix, records[1].matrix)  # type: ignore[arg-type]
    assert Terms.cat([terms(2, matrix=False)] * 2).matrix is None
