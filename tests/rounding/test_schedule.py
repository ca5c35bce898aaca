"""The schedule against its formulas."""

from __future__ import annotations

import math

import pytest
import torch

from adaround_ext.reference import cosine_beta
from adaround_ext.rounding.anneal import schedule_table


@pytest.mark.parametrize("steps", [1, 2, 7, 100])
@pytest.mark.parametrize("warmup", [0.0, 0.2, 0.5, 1.0])
def test_rows(steps: int, warmup: float) -> None:
    table = schedule_table(steps, 1e-2, 0.3, (20.0, 2.0), warmup)
    assert table.dtype == torch.float32
    assert table.shape == (steps, 5)
    expected = [
        [
            cosine_beta(t, steps, (20.0, 2.0), warmup),
            0.3 if t >= warmup * steps else 0.0,
            1e-2,
            1 - 0.9 ** (t + 1),
            math.sqrt(1 - 0.999 ** (t + 1)),
        ]
        for t in range(steps)
    ]
    torch.testing.assert_close(table, torch.tensor(expected), rtol=1e-6, atol=0)


def test_warmup_holds_beta_and_has_no_regularizer() -> None:
    beta, reg_weight = schedule_table(10, 1e-2, 0.3, (20.0, 2.0), 0.4)[:, :2].T.tolist()
    assert reg_weight == pytest.approx([0.0] * 4 + [0.3] * 6)
    assert beta[:5] == [20.0] * 5
    half = [2 + 9 * (1 + math.cos(math.pi * i / 6)) for i in range(6)]
    assert beta[4:] == pytest.approx(half)


def test_beta_falls_to_its_end() -> None:
    beta = schedule_table(1000, 1e-2, 0.3, (20.0, 2.0), 0.2)[:, 0]
    assert bool((beta.diff() <= 0).all())
    assert float(beta[-1]) == pytest.approx(2.0, abs=1e-3)
    assert bool((schedule_table(9, 1e-2, 0.3, (5.0, 5.0), 0.2)[:, 0] == 5).all())


def test_no_regularizer_in_a_run_of_warmup() -> None:
    assert schedule_table(10, 1e-2, 0.3, (20.0, 2.0), 1.0)[:, 1].tolist() == [0.0] * 10


def test_no_steps() -> None:
    assert schedule_table(0, 1e-2, 0.3, (20.0, 2.0), 0.2).shape == (0, 5)


def test_bias_corrections_are_adams(device: torch.device) -> None:
    """One parameter under torch.optim.Adam moves as the columns of the table say."""
    x = torch.zeros(1, device=device, dtype=torch.float64, requires_grad=True)
    adam = torch.optim.Adam([x], lr=1e-2)
    table = schedule_table(5, 1e-2, 0.0, (20.0, 2.0), 0.0).double().tolist()
    at = first = second = 0.0
    for _, _, learning_rate, correction1, correction2_sqrt in table:
        grad = math.cos(first) - 0.3
        first, second = 0.9 * first + 0.1 * grad, 0.999 * second + 0.001 * grad**2
        at -= learning_rate / correction1 * first / (math.sqrt(second) / correction2_sqrt + 1e-8)
        x.grad = torch.full_like(x, grad)
        adam.step()
        assert x.item() == pytest.approx(at, rel=1e-5)
