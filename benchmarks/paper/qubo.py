"""Up or down for every weight, as a quadratic binary problem (QUBO), and two ways to solve it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from adaround_ext import ops
from adaround_ext.grid import QuantGrid, nearest_codes, position

# The cross-entropy method: how much of its draws it keeps, and how far it follows them.
_ELITE, _SMOOTHING, _CERTAIN = 0.05, 0.7, 1e-3
_MAX_SWEEPS = 1000


@dataclass(frozen=True)
class Qubo:
    """min over b in {0, 1} of e G e^T with e = down + (up - down) b, each row on its own.

    gram float64 [n, n]; down and up float64 [rows, n], the errors w_q - w of the two codes;
    below and above, these codes; fraction, how far a weight is above ``below``, in steps, but 0
    beyond the grid's ends, where there is no choice: such a coin would never be certain.
    """

    gram: Tensor
    down: Tensor
    up: Tensor
    below: Tensor
    above: Tensor
    fraction: Tensor

    @staticmethod
    def of(weight: Tensor, grid: QuantGrid, gram: Tensor) -> Qubo:
        """For weights [rows, n] on a grid with one symmetric scale: the codes floor, floor + 1."""
        at = position(weight, grid)
        below, above = ((at.floor() + up).clamp(grid.qmin, grid.qmax) for up in (0, 1))
        w, s = weight.double(), grid.scale.double()
        fraction = torch.where(above > below, at - at.floor(), 0.0).double()
        return Qubo(gram.double(), s * below - w, s * above - w, below, above, fraction)

    def codes(self, b: Tensor) -> Tensor:
        return torch.where(b > 0, self.above, self.below).to(torch.int8)

    def values(self, b: Tensor) -> Tensor:
        """e G e^T of each row, float64 [..., rows], for b [..., rows, n]."""
        error = torch.where(b > 0, self.up, self.down)
        return ((error @ self.gram) * error).sum(-1)

    def nearest(self, weight: Tensor, grid: QuantGrid) -> Tensor:
        return (nearest_codes(weight, grid) == self.above.to(torch.int8)) & (
            self.above > self.below
        )


def cross_entropy_method(
    qubo: Qubo, seed: int, *, samples: int = 1000, iterations: int = 200
) -> Tensor:
    """b [rows, n] by the cross-entropy method (Rubinstein 1999), as the paper's appendix has it.

    Each row draws from independent coins, at first those of stochastic rounding, and moves the
    coins towards the shares of ones in its best draws. The best draw of all is returned.
    """
    generator = torch.Generator().manual_seed(seed)
    coins = qubo.fraction.clone()
    bits = coins > 0.5
    least = qubo.values(bits)
    elite = max(1, round(_ELITE * samples))
    for _ in range(iterations):
        drawn = torch.rand(samples, *coins.shape, generator=generator, dtype=torch.float32) < coins
        values = qubo.values(drawn)
        lowest, chosen = values.topk(elite, 0, largest=False)
        best_draws = drawn.gather(0, chosen[..., None].expand(-1, -1, coins.shape[1]))
        better = lowest[0] < least
        least = torch.where(better, lowest[0], least)
        bits = torch.where(better[:, None], best_draws[0], bits)
        coins = (1 - _SMOOTHING) * coins + _SMOOTHING * best_draws.double().mean(0)
        if bool((torch.minimum(coins, 1 - coins) < _CERTAIN).all()):
            break
    return bits


def search(qubo: Qubo, starts: Tensor, steps: int, seed: int) -> Tensor:
    """b [rows, n] by the library's descent and tabu search, the best found from ``starts``.

    starts [k, rows, n]. The ops take any Gram matrix: a bit is a code of a grid {0, 1} with the
    step up - down, a start a row. Bits without a choice, where the grid ends, are left out.
    """
    bits = starts.clone()
    for row in range(starts.shape[1]):
        step = qubo.up[row] - qubo.down[row]
        free = step > 0
        gram, scale = qubo.gram[free][:, free].contiguous(), step[free].repeat(len(starts), 1)
        for way in ("descent", "tabu", "descent"):
            error = torch.where(bits[:, row], qubo.up[row], qubo.down[row])
            residual = (error @ qubo.gram)[:, free].contiguous()
            codes = bits[:, row, free].to(torch.uint8)
            if way == "tabu":
                ops.tabu_search_(codes, residual, gram[None], scale, 0, 1, steps, seed)
            else:
                ops.refine_(codes, residual, gram[None], scale, 0, 1, _MAX_SWEEPS)
            bits[:, row, free] = codes > 0
    return best(qubo, bits)


def best(qubo: Qubo, candidates: Tensor) -> Tensor:
    """Row by row, the one of [k, rows, n] with the least value."""
    chosen = qubo.values(candidates).argmin(0)
    return candidates[chosen, torch.arange(candidates.shape[1])]


def stochastic(qubo: Qubo, nearest: Tensor, count: int, seed: int) -> Tensor:
    """``nearest`` [rows, n] and count - 1 stochastic roundings, [count, rows, n]."""
    generator = torch.Generator().manual_seed(seed)
    shape = (count - 1, *qubo.fraction.shape)
    drawn = torch.rand(shape, generator=generator, dtype=torch.float32) < qubo.fraction
    return torch.cat([nearest[None], drawn])
