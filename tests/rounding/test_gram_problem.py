"""Problems of some rows, of several problems' rows, and outcomes with rows of others."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig
from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.rounding.gram_objective import ObjectiveTerms
from adaround_ext.rounding.gram_problem import GramProblem, gram_problems
from adaround_ext.rounding.problem import Outcome
from adaround_ext.statistics.moments import GramStatistics

pytestmark = pytest.mark.usefixtures("one_thread")
CONFIG = AdaRoundConfig(steps=20, search_steps=30, bits=3)
targets_or_none = pytest.mark.parametrize("targets", [False, True])


@pytest.fixture(autouse=True)
def no_gradients() -> Any:
    with torch.no_grad():
        yield


def problem_of(rows: int, targets: bool, config: AdaRoundConfig = CONFIG) -> GramProblem:
    layer, x = nn.Linear(48, rows), torch.randn(300, 48) @ torch.randn(48, 48)
    view = matrix_layer(layer)
    statistics = GramStatistics([view], None, 0)
    statistics.add(x, (layer(x) * 1.1,) if targets else None)
    statistics.finish()
    (problem,) = gram_problems([view], statistics, config, "as set", 1.0)
    return problem


def tensors_of(outcome: Outcome) -> dict[str, Tensor]:
    """All but the draws of "stochastic", which begin at the first row of all."""
    named = {"codes": outcome.codes, "scale": outcome.grid.scale, "energies": outcome.energies}
    assert outcome.bias is not None
    for field in ("losses", "counts", "row_flags", "starts"):
        named |= {f"{field} {name}": t for name, t in getattr(outcome, field).items()}
    return named | {"zero_point": outcome.grid.zero_point, "bias": outcome.bias}


def assert_rows(some: Outcome, rows: slice | Tensor, whole: Outcome) -> None:
    expected = tensors_of(whole)
    for name, tensor in tensors_of(some).items():
        if name != "losses stochastic":
            assert torch.equal(tensor, expected[name][rows]), name


@targets_or_none
def test_some_rows_have_the_outcome_that_they_have_among_all(targets: bool) -> None:
    problem = problem_of(80, targets)
    whole = problem.solve(CONFIG)
    some = problem.rows(slice(32, 64))
    assert some.first_row == 32 and some.rows(slice(16, 32)).first_row == 48
    assert some.sizes == [32] and some.layers == problem.layers
    assert_rows(some.solve(CONFIG), slice(32, 64), whole)
    flags = torch.zeros(80, dtype=torch.bool)
    flags[:16], flags[48:64] = True, True
    assert_rows(problem.rows(flags).solve(CONFIG), flags, whole)


@targets_or_none
def test_terms_of_rows_are_all_terms(targets: bool) -> None:
    terms = problem_of(20, targets).objective.terms
    again = ObjectiveTerms.cat([terms[:7], terms[7:]])
    for field in dataclasses.fields(terms):
        one, other = getattr(terms, field.name), getattr(again, field.name)
        assert one is other is None or torch.equal(one, other), field.name
    assert (terms.mismatch is not None) == targets


def test_outcomes_in_a_row() -> None:
    problem = problem_of(64, targets=True)
    whole = problem.solve(CONFIG)
    outcomes = [problem.rows(slice(n, n + 32)).solve(CONFIG) for n in (0, 32)]
    joined = Outcome.join(outcomes, torch.device("cpu"), sum)
    assert_rows(joined, slice(0, 64), whole)
    for name, seconds in joined.seconds.items():
        assert seconds == sum(outcome.seconds[name] for outcome in outcomes)


def test_rows_of_another_outcome() -> None:
    one, other = (problem_of(16, targets=True).solve(CONFIG) for _ in range(2))
    rows, others = torch.zeros(16, dtype=torch.bool), torch.zeros(16, dtype=torch.bool)
    rows[[2, 9]], others[[4, 15]] = True, True
    merged = tensors_of(one.with_rows(rows, other, others))
    for name, tensor in tensors_of(one).items():
        assert torch.equal(merged[name][~rows], tensor[~rows]), name
        assert torch.equal(merged[name][rows], tensors_of(other)[name][others]), name


@targets_or_none
def test_without_targets_it_is_as_if_there_had_been_none(targets: bool) -> None:
    problem = problem_of(16, targets)
    plain = problem.objective.without_targets()
    weight = problem.weight + 0.01
    assert plain.target is problem.weight
    assert bool((plain.row_losses(problem.weight) == 0).all())
    assert plain.terms.mismatch is None
    if not targets:
        assert torch.equal(plain.row_losses(weight), problem.objective.row_losses(weight))
    assert plain.gptq_factor is problem.objective.gptq_factor
