"""Which rows a layer gets, followed through a trace."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from adaround_ext.tracing.dataflow import Dataflow, dataflow, same_positions
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.trace import Trace, trace
from tests.support.row_models import (
    BY_DATA,
    BY_ITSELF,
    BY_THE_MODEL,
    FEATURES,
    ROWS,
    Chooses,
    Mixture,
)


def watched(model: nn.Module, *args: Tensor, **kwargs: Tensor) -> tuple[Trace, Dataflow]:
    with evaluation(model):
        run = trace(model, lambda: model(*args, **kwargs))
    return run, dataflow(run)


def chosen(model: nn.Module) -> set[str]:
    """The layers that get rows by the data."""
    run, flow = watched(model, torch.randn(ROWS, FEATURES))
    names = {module: name for name, module in model.named_modules()}
    return {
        names[call.module]
        for call in run.calls
        if isinstance(call.module, nn.Linear) and flow.chooses_rows(call)
    }


@pytest.mark.parametrize("choose", BY_DATA.values(), ids=BY_DATA)
def test_rows_by_the_data(choose: Callable[[Chooses, Tensor], Tensor]) -> None:
    assert chosen(Chooses(choose)) == {"b", "c"}


@pytest.mark.parametrize("name", [*BY_THE_MODEL, *BY_ITSELF])
def test_rows_by_the_model(name: str) -> None:
    choose = (BY_THE_MODEL | BY_ITSELF)[name]
    # Indices from outside of torch could be anything, and are taken for the data's.
    outside = name in ("NumPy's permutation", "Python's permutation")
    assert chosen(Chooses(choose)) == ({"b", "c"} if outside else set())


@pytest.mark.parametrize(
    "choose",
    [
        lambda model, x: torch.where(x > 0, x, 0.1 * x),
        lambda model, x: x * (x > x.mean()),
        lambda model, x: x.masked_fill(x.argmax(1)[:, None] == 0, 0),
        lambda model, x: x[torch.arange(len(x)).flip(0)],
        lambda model, x: x.clamp(max=x.max()),
        lambda model, x: nn.functional.max_pool1d(x, 1, return_indices=True)[0],
    ],
)
def test_values_by_the_data_are_no_choice(choose: Callable[[Chooses, Tensor], Tensor]) -> None:
    assert chosen(Chooses(choose)) == set()


def test_before_the_first_layer_nothing_is_chosen() -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 4))
    model.register_forward_pre_hook(lambda module, args: (args[0][args[0][:, 0].argsort()],))
    assert chosen(model) == set()


def test_experts_and_what_comes_after_them() -> None:
    layers = chosen(Mixture())
    assert "blocks.0.1" not in layers and "blocks.0.2.router" not in layers
    assert "blocks.0.2.experts.0.down" in layers and "blocks.1.1" in layers and "head" in layers


class Attention(nn.Module):
    """Rows of ``query``, from values of ``memory``."""

    def __init__(self, explicit: bool) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(8, 8) for _ in range(4))
        self.explicit = explicit

    def forward(self, query: Tensor, memory: Tensor, types: Tensor) -> Tensor:
        query = query + types
        q, k, v = self.q(query), self.k(memory), self.v(memory)
        if self.explicit:
            mixed = (q @ k.transpose(1, 2)).softmax(-1) @ v
        else:
            mixed = nn.functional.scaled_dot_product_attention(q, k, v)
        return query + self.o(mixed)


@pytest.mark.parametrize("explicit", [False, True])
def test_positions_are_those_of_the_queries(explicit: bool) -> None:
    model = Attention(explicit)
    x = torch.randn(2, 5, 8)
    run, flow = watched(model, x, memory=x.clone(), types=x.clone())
    positions = {
        name: flow.arguments(run.calls_of(getattr(model, name))[0]) for name in ("q", "k", "o")
    }
    query = frozenset({"query", "types"})
    assert positions == {"q": query, "k": frozenset({"memory"}), "o": query}
    assert same_positions(run, flow) == [query, frozenset({"memory"})]
