"""Search ops: coordinate descent, tabu search and GPTQ over the codes of a layer.

Shapes, dtypes and errors: :mod:`adaround_ext.ops`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaround_ext.ops.common import check_same_device, check_same_shape, code_dtype, native_ops


def refine_(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    max_sweeps: int,
) -> None:
    """Cyclic coordinate descent on tr(E G E^T) over the whole grid, rows independent, in place.

    Best change of code j: round(-residual_j / (G_jj s_j)). A row ends when a sweep changes nothing,
    or after ``max_sweeps``.

    Args:
        codes: [rows, cols]; updated.
        residual: E G [rows, cols] (minus the constant of the asymmetric form); updated with them.
        gram: [groups, cols, cols]; each serves rows / groups consecutive rows. Like residual and
            scale float32 (CPU also float64).
        scale: [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        max_sweeps: 0 to 2^23.
    """
    native_ops.refine_(codes, residual, gram, scale, qmin, qmax, max_sweeps)


@torch.library.register_fake("adaround_ext::refine_")
def _(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    max_sweeps: int,
) -> None:
    check_same_device(codes=codes, residual=residual, gram=gram, scale=scale)
    check_same_shape("residual", residual, codes, "codes")


def tabu_search_(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    steps: int,
    seed: int,
) -> None:
    """One-flip tabu search on tr(E G E^T) over the whole grid, rows independent, in place.

    Each step makes the single change of a code by one that costs least,
    ``s (G_jj s - 2 |residual_j|)``, even where that is uphill; the column then rests for cols / 40
    (at least 3) to twice as many steps, unless its change leads below the best codes so far. The
    best codes met, and their residual, are written. Source: Glover, "Tabu search", 1989.

    Args:
        codes: [rows, cols]; updated.
        residual: E G [rows, cols] (minus the constant of the asymmetric form); updated with them.
        gram: [groups, cols, cols]; each serves rows / groups consecutive rows. Like residual and
            scale float32 (CPU also float64).
        scale: [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        steps: 0 to 2^23.
        seed: Not negative; every row draws its rests from it.
    """
    native_ops.tabu_search_(codes, residual, gram, scale, qmin, qmax, steps, seed)


@torch.library.register_fake("adaround_ext::tabu_search_")
def _(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    steps: int,
    seed: int,
) -> None:
    check_same_device(codes=codes, residual=residual, gram=gram, scale=scale)
    check_same_shape("residual", residual, codes, "codes")


def gptq(
    weight: Tensor,
    feedback: Tensor,
    order: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Codes of GPTQ: columns are rounded in turn, later ones make up for earlier ones.

    Column k of the processing order gets the code nearest to
    w_k + sum_{i<k} (w_i - w_q,i) feedback[i, k]. With H = R R^T, R upper triangular in
    processing order, feedback[i, k] = R[i, k] / R[k, k] is GPTQ (Frantar et al. 2023) by theorem 6
    of QuIP (Chee et al. 2023).

    Args:
        weight: [rows, cols]; like feedback and scale float32 (CPU also float64).
        feedback: [groups, cols, cols], read above its diagonal; each serves rows / groups
            consecutive rows.
        order: int64 [groups, cols], the columns in processing order. What is no permutation is
            refused on the CPU; on CUDA, which would have to wait for the values, entries beyond the
            columns are skipped, and columns that it leaves out get the code qmin.
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.

    Returns:
        Codes [rows, cols], int8 for a signed grid (qmin < 0), else uint8.
    """
    return native_ops.gptq(weight, feedback, order, scale, zero_point, qmin, qmax)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::gptq")
def _(
    weight: Tensor,
    feedback: Tensor,
    order: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    check_same_device(
        weight=weight, feedback=feedback, order=order, scale=scale, zero_point=zero_point
    )
    return weight.new_empty(weight.shape, dtype=code_dtype(qmin))
