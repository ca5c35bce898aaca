"""Pairs of rows: whether a row of one stream and that in its place of another are one token's.

Two streams are two runs of a model whose weights differ a little. A layer's row in one is then
nearer to the same token's row in the other than to other tokens' rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaround_ext.linalg.products import fixed_bmm
from adaround_ext.linalg.sums import double_sum

_COMPARED_ROWS = 64  # rows that each is compared with
# Of a call's rows: where fewer have their partner in their place, all of them may be chance.
_MIN_PAIRED = 0.9
_ROUNDING = 1e-5  # of squared norms: what float32 leaves of differences of equal rows


def paired_rows(x: Tensor, y: Tensor) -> Tensor:
    """Flags rows of x, bool [rows], whose partner is the row of y [rows, ...] in their place.

    A row has its partner there if no other of some 64 rows of y is nearer (squared distance);
    equal rows of y count as one. Without other rows nothing can be told: none is flagged, and also
    where fewer than nine tenths would be.
    """
    x, y = x.flatten(1).float(), y.flatten(1).float()
    rows = len(x)
    if rows < 2:
        return torch.zeros(rows, dtype=torch.bool, device=x.device)
    step = max(rows // _COMPARED_ROWS, 1)
    others = torch.arange(0, rows, step, device=x.device)[: _COMPARED_ROWS + 1]
    norms = double_sum(x.square(), 1)
    other_norms = double_sum(y[others].square(), 1)
    products = fixed_bmm(x[None], y[others].t().contiguous()[None])[0].double()
    distances = norms[:, None] - 2 * products + other_norms
    numbers = torch.arange(rows, device=x.device)
    distances[numbers[:, None] == others] = torch.inf
    distance = double_sum((x - y).square(), 1)
    slack = _ROUNDING * (norms + double_sum(y.square(), 1))
    paired = distance <= distances.amin(1) + slack
    if int(paired.sum()) < _MIN_PAIRED * rows:
        return torch.zeros_like(paired)
    return paired
