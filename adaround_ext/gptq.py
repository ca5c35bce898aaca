"""GPTQ (Frantar et al. 2023): the factor that its recursion needs, and the codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext import ops
from adaround_ext.grid import QuantGrid
from adaround_ext.products import one_thread

_JITTER = 1e-6  # of the mean diagonal: where a matrix is singular in float64


@dataclass(frozen=True)
class GptqFactor:
    """feedback float32 [groups, cols, cols] and order int64 [groups, cols] of :func:`ops.gptq`."""

    feedback: Tensor
    order: Tensor

    @staticmethod
    def make(gram: Tensor) -> GptqFactor:
        """From a damped ``gram`` [groups, cols, cols]: columns of larger diagonal come first.

        H = R R^T with R upper triangular is the Cholesky factor of H turned round, and turned back.
        """
        h = gram.double()
        order = h.diagonal(dim1=1, dim2=2).argsort(dim=1, descending=True, stable=True)
        rows = order[:, :, None].expand_as(h)
        h = h.gather(1, rows).gather(2, rows.mT)
        upper = cholesky(h.flip(1, 2)).flip(1, 2)
        feedback = upper / upper.diagonal(dim1=1, dim2=2)[:, None, :]
        return GptqFactor(feedback.float(), order)

    def codes(self, weight: Tensor, grid: QuantGrid) -> Tensor:
        """Codes [rows, cols] for float32 ``weight``."""
        return ops.gptq(
            weight, self.feedback, self.order, grid.scale, grid.zero_point, grid.qmin, grid.qmax
        )


def cholesky(matrices: Tensor) -> Tensor:
    """Lower Cholesky factors of float64 [groups, n, n], each shifted as little as it needs.

    Raises ValueError for NaN or infinity.
    """
    if not bool(matrices.isfinite().all()):  # no shift would help
        raise ValueError("gram must be finite, got NaN or infinite values")
    mean = matrices.diagonal(dim1=1, dim2=2).mean(1)
    unit = torch.where(mean > 0, mean, torch.ones_like(mean))[:, None]
    matrices = matrices.clone()
    with one_thread(matrices.device):
        factors, info = torch.linalg.cholesky_ex(matrices)
        jitter = _JITTER
        while bool((info > 0).any()):
            failed = (info > 0)[:, None]
            matrices.diagonal(dim1=1, dim2=2).add_(torch.where(failed, jitter * unit, 0.0))
            factors, info = torch.linalg.cholesky_ex(matrices)
            jitter *= 10
    return factors  # type: ignore[no-any-return]
