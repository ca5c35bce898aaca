"""Assignment of bit widths within a budget: a knapsack in which every layer makes one choice."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, fsum, isfinite
from typing import Any

import numpy as np
from numpy.typing import NDArray

_MOST_STATES = 1 << 14  # of the dynamic programme, after each layer
_SLACK = 1e-9  # relative: bounds are sums of floating-point numbers
_ROUNDING = 1e-12  # relative: average_bits times a count, as 2.4 x 5, means the whole number


@dataclass(frozen=True)
class _Choice:
    bits: int
    cost: int  # bits times weights
    error: float


@dataclass(frozen=True)
class _Upgrade:
    """A step along the lower convex hull of a layer's choices."""

    gain: float  # error saved for each bit of storage
    layer: int
    begin: int  # index of the choice before
    end: int
    cost: int
    saved: float


def check_budget(average_bits: object, bits: Sequence[int]) -> None:
    """ValueError unless ``average_bits`` is a number from min(bits) to max(bits)."""
    rule = f"average_bits must be a number from {min(bits)} to {max(bits)}"
    if isinstance(average_bits, bool) or not isinstance(average_bits, (int, float)):
        raise ValueError(f"{rule}, got {average_bits!r}")
    if not min(bits) <= average_bits <= max(bits):
        raise ValueError(f"{rule}, got {average_bits!r}")


def assign_bits(
    errors: Mapping[str, Mapping[int, float]], weights: Mapping[str, int], average_bits: float
) -> dict[str, int]:
    """A bit width b_l for every layer l that minimises a sum of errors within a budget.

    ``min sum_l errors[l][b_l]  subject to  sum_l b_l weights[l] <= average_bits sum_l weights[l]``

    A multiple-choice knapsack. Choices that cost more without being better are left out first, and
    with them whatever is not monotone; so are errors that are not finite. A greedy walk along the
    layers' convex hulls gives a solution, and the same hulls a lower bound (the linear relaxation;
    Sinha and Zoltners, "The multiple-choice knapsack problem", 1979). A dynamic programme over
    (cost, error) then keeps what is not dominated and whose bound is not above that solution: its
    result is exact, to rounding, unless more than 16384 states are left after a layer. Then the
    best of as many equal intervals of the cost go on, and the result is never worse than the
    greedy one. Of equal sums the cheaper is taken; the same arguments give the same result.

    Scales and zero points are no part of the budget. ValueError where ``average_bits`` is not
    within the bit widths or cannot be met, and where layers and weights do not fit.
    """
    _check(errors, weights)
    if not errors:
        return {}
    check_budget(average_bits, sorted({b for by_width in errors.values() for b in by_width}))
    names = list(errors)
    choices = [_useful(name, errors[name], weights[name]) for name in names]
    total = sum(weights[name] for name in names)
    capacity = floor(average_bits * total * (1 + _ROUNDING))
    least = sum(of_layer[0].cost for of_layer in choices)
    if least > capacity:
        raise ValueError(
            f"average_bits must leave room for every layer's lowest usable bit width, "
            f"{least / total:.6g} on average, got {average_bits!r}"
        )
    upgrades = [_hull(of_layer, index) for index, of_layer in enumerate(choices)]
    picks = _greedy(choices, upgrades, capacity - least)
    exact = _programme(choices, upgrades, capacity, _sum(choices, picks))
    if exact is not None and _sum(choices, exact) <= _sum(choices, picks):
        picks = exact
    chosen = zip(names, choices, picks, strict=True)
    return {name: of_layer[pick].bits for name, of_layer, pick in chosen}


def _check(errors: Mapping[str, Mapping[int, float]], weights: Mapping[str, int]) -> None:
    for name, by_width in errors.items():
        if not by_width:
            raise ValueError(f"errors must hold a bit width for every layer, got none for {name!r}")
        count = weights.get(name)
        if isinstance(count, bool) or not isinstance(count, int) or count < 1:
            raise ValueError(f"weights must count those of every layer, got {count!r} for {name!r}")


def _useful(name: str, errors: Mapping[int, float], weights: int) -> list[_Choice]:
    """Choices by cost, each with a lower error than all before."""
    choices: list[_Choice] = []
    for bits in sorted(errors):
        error = float(errors[bits])
        if isfinite(error) and (not choices or error < choices[-1].error):
            choices.append(_Choice(bits, bits * weights, error))
    if not choices:
        raise ValueError(f"errors must be finite for some bit width of {name!r}, got none")
    return choices


def _hull(choices: list[_Choice], layer: int) -> list[_Upgrade]:
    """The steps of the lower convex hull, from the cheapest choice to the best one."""
    steps: list[_Upgrade] = []
    at = 0
    while at < len(choices) - 1:
        here = choices[at]
        reachable = [
            _Upgrade(
                (here.error - c.error) / (c.cost - here.cost), layer, at, end,
                c.cost - here.cost, here.error - c.error,
            )
            for end, c in enumerate(choices[at + 1 :], at + 1)
        ]  # fmt: skip
        steps.append(max(reachable, key=lambda step: (step.gain, step.end)))
        at = steps[-1].end
    return steps


def _greedy(choices: list[list[_Choice]], upgrades: list[list[_Upgrade]], room: int) -> list[int]:
    """The steps of highest gain that fit, in their order in each layer."""
    at = [0] * len(choices)
    steps = (step for of_layer in upgrades for step in of_layer)
    for step in sorted(steps, key=lambda step: (-step.gain, step.layer)):
        if at[step.layer] == step.begin and step.cost <= room:
            at[step.layer] = step.end
            room -= step.cost
    return at


def _sum(choices: list[list[_Choice]], picks: list[int]) -> float:
    return fsum(of_layer[pick].error for of_layer, pick in zip(choices, picks, strict=True))


def _programme(
    choices: list[list[_Choice]], upgrades: list[list[_Upgrade]], capacity: int, known: float
) -> list[int] | None:
    """Indices of the best choices; None where rounding leaves nothing as good as ``known``."""
    # Large layers first: their choices decide how much room there is.
    order = sorted(range(len(choices)), key=lambda i: (-choices[i][-1].cost, i))
    bounds = _bounds([choices[i] for i in order], [upgrades[i] for i in order])
    limit = known * (1 + _SLACK)
    costs: NDArray[np.int64] = np.zeros(1, np.int64)
    errors: NDArray[np.float64] = np.zeros(1)
    history: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for index, (room, bound) in zip(order, bounds, strict=True):
        of_layer = choices[index]
        new_costs = np.add.outer(costs, np.array([c.cost for c in of_layer], np.int64)).ravel()
        new_errors = np.add.outer(errors, np.array([c.error for c in of_layer])).ravel()
        rest = np.interp(capacity - new_costs, room, bound, left=np.inf)
        states = np.flatnonzero(new_errors + rest <= limit)
        states = states[np.lexsort((new_errors[states], new_costs[states]))]
        if not len(states):
            return None
        lowest = np.minimum.accumulate(new_errors[states])
        states = states[np.concatenate(([True], new_errors[states][1:] < lowest[:-1]))]
        states = states[_thinned(new_costs[states])]
        costs, errors = new_costs[states], new_errors[states]
        history.append((states // len(of_layer), states % len(of_layer)))
    state = len(errors) - 1  # the lowest error
    picks = [0] * len(choices)
    for index, (parents, last) in zip(reversed(order), reversed(history), strict=True):
        picks[index], state = int(last[state]), int(parents[state])
    return picks


def _bounds(
    choices: list[list[_Choice]], upgrades: list[list[_Upgrade]]
) -> list[tuple[NDArray[Any], NDArray[Any]]]:
    """After each layer: room, and the least error that all later ones can have in it, relaxed.

    Between the points it is linear, beyond the last one constant.
    """
    least, most = 0, 0.0
    steps: list[_Upgrade] = []
    bounds: list[tuple[NDArray[Any], NDArray[Any]]] = []
    for of_layer, more in zip(reversed(choices), reversed(upgrades), strict=True):
        room = np.cumsum([float(least), *(step.cost for step in steps)])
        bounds.append((room, most - np.cumsum([0.0, *(step.saved for step in steps)])))
        least, most = least + of_layer[0].cost, most + of_layer[0].error
        steps = sorted([*steps, *more], key=lambda step: -step.gain)
    return bounds[::-1]


def _thinned(costs: NDArray[np.int64]) -> NDArray[np.int64]:
    """Indices of ascending ``costs``: the last of each interval, where there are too many."""
    if len(costs) <= _MOST_STATES:
        return np.arange(len(costs))
    place = (costs - costs[0]) / (costs[-1] - costs[0]) * _MOST_STATES
    return np.flatnonzero(np.diff(np.floor(place), append=np.inf) > 0)
