"""Bits for layers under a budget: the best choice there is, or near the bound."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Mapping

import pytest

from adaround_ext.mixed_precision import assign
from adaround_ext.mixed_precision.assign import assign_bits

pytestmark = pytest.mark.usefixtures("one_thread")


def brute_force(
    errors: Mapping[str, Mapping[int, float]], weights: Mapping[str, int], budget: float
) -> float:
    best = math.inf
    room = budget * sum(weights.values()) * (1 + 1e-12)
    for bits in itertools.product(*(own for own in errors.values())):
        chosen = dict(zip(errors, bits, strict=True))
        if sum(weights[n] * b for n, b in chosen.items()) <= room:
            best = min(best, math.fsum(errors[n][b] for n, b in chosen.items()))
    return best


def instance(
    draw: random.Random, layers: int, monotone: bool
) -> tuple[dict[str, dict[int, float]], dict[str, int]]:
    widths = sorted(draw.sample(range(2, 9), draw.randint(1, 4)))
    errors, weights = {}, {}
    for index in range(layers):
        name = f"l{index}"
        weights[name] = draw.choice([1, 2, 7, 64, draw.randint(1, 999)])
        size = 10 ** draw.uniform(-3, 1)
        errors[name] = {
            b: size * (4.0**-b * draw.uniform(0.7, 1.4) if monotone else draw.random())
            for b in widths
        }
    return errors, weights


@pytest.mark.parametrize("monotone", [True, False])
def test_assignments_are_the_best_there_are(monotone: bool) -> None:
    draw = random.Random(3)
    for _ in range(150):
        errors, weights = instance(draw, draw.randint(1, 5), monotone)
        widths = list(errors["l0"])
        budget = draw.uniform(min(widths), max(widths))
        found = assign_bits(errors, weights, budget)
        assert assign_bits(errors, weights, budget) == found
        total = sum(weights.values())
        assert sum(weights[n] * b for n, b in found.items()) <= budget * total * (1 + 1e-12)
        got = math.fsum(errors[n][b] for n, b in found.items())
        assert got == pytest.approx(brute_force(errors, weights, budget), rel=1e-9)


def test_large_instances_stay_near_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, weights = instance(random.Random(5), 300, True)
    widths = list(errors["l0"])
    assert len(widths) > 1
    budget = min(widths) + 0.4 * (max(widths) - min(widths))
    exact = assign_bits(errors, weights, budget)
    best = math.fsum(errors[n][b] for n, b in exact.items())
    assert sum(weights[n] * b for n, b in exact.items()) <= budget * sum(weights.values())
    # With few states it is still as good as greedy, which is near the best with many layers.
    monkeypatch.setattr(assign, "_MOST_STATES", 4)
    thinned = assign_bits(errors, weights, budget)
    assert sum(weights[n] * b for n, b in thinned.items()) <= budget * sum(weights.values())
    got = math.fsum(errors[n][b] for n, b in thinned.items())
    assert best <= got < 1.1 * best


def test_a_wider_width_that_is_no_better_is_not_taken() -> None:
    errors = {"a": {2: 0.5, 3: 0.7, 4: 0.5, 8: 0.4}, "b": {2: 0.3, 3: 0.3, 4: 0.3, 8: 0.3}}
    assert assign_bits(errors, {"a": 10, "b": 10}, 8) == {"a": 8, "b": 2}
    assert assign_bits(errors, {"a": 10, "b": 10}, 4.9) == {"a": 2, "b": 2}
    infinite = {"a": {2: math.inf, 4: 0.1}, "b": {2: 1.0, 4: math.nan}}
    assert assign_bits(infinite, {"a": 1, "b": 1}, 3) == {"a": 4, "b": 2}
    with pytest.raises(ValueError, match=r"average_bits must leave room .* 3 on average, got 2\.5"):
        assign_bits(infinite, {"a": 1, "b": 1}, 2.5)
    with pytest.raises(ValueError, match="errors must be finite for some bit width of 'a'"):
        assign_bits({"a": {2: math.inf}}, {"a": 1}, 2)


def test_a_budget_means_the_whole_number() -> None:
    errors = {name: {2: 1.0, 3: 0.1} for name in "ab"}
    assert 2.01 * 100 < 201  # in floating point
    assert assign_bits(errors, {"a": 1, "b": 99}, 2.01) == {"a": 3, "b": 2}
    assert assign_bits({}, {}, 3) == {}
