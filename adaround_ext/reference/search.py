"""Search over codes in plain PyTorch: the oracle of refine_, tabu_search_ and gptq.

Shapes and names as in :mod:`adaround_ext.ops`; everything runs in the dtype of its arguments.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from adaround_ext.reference.rounding import expand_grid

ASPIRATION_MARGIN = 1e-4  # as in refine_: far above rounding errors, far below a step's worth


def gptq(
    weight: Tensor,
    gram: Tensor,
    damping: float,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    act_order: bool = True,
) -> Tensor:
    """GPTQ in the textbook form: Frantar et al., "GPTQ", ICLR 2023, algorithm 1.

    H = ``gram`` + ``damping`` x mean(diag G) I; U upper triangular with U^T U = H^-1. Column k is
    rounded to nearest, and its error over U_kk, times U's row k, is taken off the columns after it.
    ``act_order`` takes the columns in descending order of H's diagonal, else from left to right.
    Each column has the scale of its own group, fixed beforehand.

    Args:
        weight: [rows, cols].
        gram: [groups, cols, cols], positive definite once damped; each serves rows / groups
            consecutive rows.
        damping: Share of the mean of G's diagonal that is added to it.
        scale: [rows or 1, n_groups].
        zero_point: int32 [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        act_order: The order of the columns.

    Returns:
        Codes [rows, cols], int8 where qmin < 0, else uint8.
    """
    rows, cols = weight.shape
    s, z = expand_grid(scale, rows, cols), expand_grid(zero_point, rows, cols)
    codes = torch.empty_like(weight, dtype=torch.int8 if qmin < 0 else torch.uint8)
    rows_per_gram = rows // gram.shape[0]
    for group, g in enumerate(gram):
        of_gram = slice(group * rows_per_gram, (group + 1) * rows_per_gram)
        h = g + damping * g.diagonal().mean() * torch.eye(cols, dtype=g.dtype, device=g.device)
        order = torch.arange(cols, device=g.device)
        if act_order:
            order = torch.argsort(h.diagonal(), descending=True, stable=True)
        inverse = torch.linalg.inv(h[order][:, order])
        u = torch.linalg.cholesky(inverse, upper=True)
        w = weight[of_gram][:, order]  # a copy, which the errors change
        for k, column in enumerate(order.tolist()):
            s_k, z_k = s[of_gram, column], z[of_gram, column]
            codes_k = ((w[:, k] / s_k).round() + z_k).clamp(qmin, qmax)
            error = (w[:, k] - s_k * (codes_k - z_k)) / u[k, k]
            w[:, k:] -= error[:, None] * u[k, k:]
            codes[of_gram, column] = codes_k.to(codes.dtype)
    return codes


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
    """One-flip tabu search on e G e^T over the whole grid, row by row (Glover 1989).

    Changing code j by one against its residual costs ``s_j (G_jj s_j - 2 |residual_j|)``. The
    cheapest such change within the grid is made even where it is uphill; its column then rests for
    a random number of steps, unless its change leads below the best codes so far. Those are
    written. A row ends early where no column may change.

    Args:
        codes: [rows, cols]; updated.
        residual: e G [rows, cols]; updated with them.
        gram: [groups, cols, cols]; each serves rows / groups consecutive rows.
        scale: [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        steps: At most so many changes a row.
        seed: Of the random numbers of each row.
    """
    rows, cols = codes.shape
    s = expand_grid(scale, rows, cols)
    least_rest = max(3, cols // 40)
    for row in range(rows):
        g = gram[row // (rows // gram.shape[0])]
        curvature = g.diagonal() * s[row]
        margin = ASPIRATION_MARGIN * s[row] * curvature
        now, r = codes[row].to(s.dtype), residual[row].clone()
        free_from = torch.zeros(cols, dtype=torch.int64, device=codes.device)
        change = best_change = 0.0  # of the objective since the beginning
        random = seed
        for step in range(steps):
            direction = 1 - 2 * (r >= 0).to(s.dtype)
            cost = s[row] * (curvature - 2 * r.abs())
            inside = (now + direction >= qmin) & (now + direction <= qmax) & (curvature > 0)
            free = (step >= free_from) | (cost + margin < best_change - change)
            cost = cost.where(inside & free & ~cost.isnan(), torch.inf)
            j = int(cost.argmin())
            if cost[j] == torch.inf:
                break
            now[j] += direction[j]
            r += direction[j] * s[row, j] * g[j]
            change += float(cost[j])
            random = (6364136223846793005 * random + 1442695040888963407) % 2**64  # Knuth's MMIX
            free_from[j] = step + least_rest + (random >> 33) % least_rest
            if change < best_change:
                best_change = change
                codes[row], residual[row] = now.to(codes.dtype), r


def refine_(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    max_sweeps: int,
) -> None:
    """Cyclic coordinate descent on e G e^T over the whole grid, row by row.

    Changing code j by k changes the row's objective by 2 d residual_j + d^2 G_jj with d = k s_j, so
    the best k is round(-residual_j / (G_jj s_j)). A change must lie 1e-4 of a step past the
    midpoint. Ends when a sweep changes nothing.

    Args:
        codes: [rows, cols]; updated.
        residual: e G [rows, cols]; updated with them.
        gram: [groups, cols, cols]; each serves rows / groups consecutive rows.
        scale: [rows or 1, n_groups].
        qmin: The lowest code.
        qmax: The highest code.
        max_sweeps: At most so many sweeps a row.
    """
    rows, cols = codes.shape
    s = expand_grid(scale, rows, cols)
    rows_per_gram = rows // gram.shape[0]
    for row in range(rows):
        g = gram[row // rows_per_gram]
        for _ in range(max_sweeps):
            changed = False
            for j in range(cols):
                curvature = float(g[j, j] * s[row, j])
                now = int(codes[row, j])
                pull = -float(residual[row, j])
                if not abs(pull) > (0.5 + 1e-4) * curvature or not curvature > 0:
                    continue
                code = min(max(now + math.floor(pull / curvature + 0.5), qmin), qmax)
                if code != now:
                    codes[row, j] = code
                    residual[row] += (code - now) * s[row, j] * g[j]
                    changed = True
            if not changed:
                break
