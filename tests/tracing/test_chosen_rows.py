"""quantize_ on models whose data decide which rows a layer gets."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import quantize_
from tests.support.row_models import (
    BY_DATA,
    BY_ITSELF,
    BY_THE_MODEL,
    FEATURES,
    ROWS,
    Chooses,
    Mixture,
    against_nearest,
    nearest,
)

pytestmark = pytest.mark.usefixtures("one_thread")
QUIET: dict[str, Any] = {"preset": "fast", "progress": False}
CHOSEN, UNREPEATABLE = "the model chooses rows by its data", "the model does not repeat itself"


def fitted(model: nn.Module, bits: int, **arguments: Any) -> tuple[dict[str, float], str]:
    """Each layer's held-out error over nearest's, and the notes."""
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(ROWS, FEATURES, generator=generator) for _ in range(8)]
    held_out = torch.randn(16 * ROWS, FEATURES, generator=generator)
    full = copy.deepcopy(model)
    report = quantize_(model, data, bits=bits, **QUIET, **arguments)
    names = [layer.name for layer in report.layers]
    errors = against_nearest(model, full, names, bits, lambda: model(held_out))
    return errors, "; ".join(report.notes)


@pytest.mark.parametrize("bits", [8, 3])
@pytest.mark.parametrize("name", BY_DATA)
def test_rows_of_other_tokens_are_no_targets(name: str, bits: int) -> None:
    torch.manual_seed(0)
    errors, notes = fitted(Chooses(BY_DATA[name]), bits)
    assert max(errors.values()) < 1, errors
    assert (CHOSEN in notes) and (UNREPEATABLE not in notes)


@pytest.mark.parametrize("choose", BY_ITSELF.values(), ids=BY_ITSELF)
def test_what_is_not_repeated_is_no_target(choose: Callable[[Chooses, Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    errors, notes = fitted(Chooses(choose), 8)
    assert max(errors.values()) < 1, errors
    assert f"{UNREPEATABLE}" in notes and "b, c" in notes


@pytest.mark.parametrize("name", BY_THE_MODEL)
def test_the_same_rows_in_both_streams_are_targets(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is chosen without the data, at random or not: all of it has its partner."""
    torch.manual_seed(0)
    model = Chooses(BY_THE_MODEL[name])
    plain = copy.deepcopy(model)
    errors, notes = fitted(model, 8)
    assert not notes
    assert max(errors.values()) < 1, errors
    if name in ("NumPy's permutation", "Python's permutation"):
        return  # indices from elsewhere: the rows are compared, and all of them have partners
    monkeypatch.setattr("adaround_ext.model.units.Unit.rows_chosen", False)
    fitted(plain, 8)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("bits", [8, 4, 3])
def test_experts(bits: int, mode: str) -> None:
    torch.manual_seed(0)
    errors, notes = fitted(Mixture(), bits, mode=mode)
    assert len(errors) == 2 * (1 + 1 + 4 * 3) + 1
    assert max(errors.values()) < 1, errors
    assert (CHOSEN in notes) == (mode == "sequential")


@pytest.mark.parametrize("granularity", ["per_tensor", "per_group"])
def test_experts_on_other_grids(granularity: str) -> None:
    """Where rows share their scale the whole layer is judged."""
    torch.manual_seed(0)
    size = 8 if granularity == "per_group" else None
    errors, _ = fitted(Mixture(), 8, granularity=granularity, group_size=size)
    # Nearest here has a scale a row.
    assert max(errors.values()) < (1 if granularity == "per_group" else 12), errors


class Regions(nn.Module):
    """A detector's second stage: a convolution on the regions with the highest scores."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Conv2d(3, 8, 3, padding=1)
        self.head = nn.Conv2d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.features(x))
        regions = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).flatten(0, 2)
        return self.head(regions[regions.flatten(1).sum(1).topk(len(regions) // 2).indices])


@pytest.mark.parametrize("activation_aware", [False, True], ids=["gram", "sampled"])
def test_regions(activation_aware: bool) -> None:
    torch.manual_seed(0)
    model = Regions()
    full, seen = copy.deepcopy(model), []
    data = list(torch.randn(32, 3, 16, 16).split(8))
    settings = {"overrides": {"head": {"activation": "relu"}}} if activation_aware else {}
    report = quantize_(model, data, bits=8, **QUIET, **settings)
    assert CHOSEN in "; ".join(report.notes)
    model.head.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.randn(8, 3, 16, 16))
        x, weight = seen[0], full.head.weight
        error = (model.head(x) - full.head(x)).square().sum()
        change = nearest(weight.flatten(1), 8).view_as(weight) - weight
        assert error < nn.functional.conv2d(x, change, padding=1).square().sum()
