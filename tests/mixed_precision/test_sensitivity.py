"""Sensitivity of layers and bit widths, and what it suggests under a budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import Sensitivity, quantize_, sensitivity
from tests.support.sensitive_models import QUIET, Branches

pytestmark = pytest.mark.usefixtures("one_thread")


class Convolutions(nn.Module):
    """With batch norms, one convolution without a bias, and a dict of outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(3, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.b = nn.Conv2d(6, 4, 3)
        self.head = nn.Linear(4, 5)
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.randn(6))
            self.norm.running_var.copy_(0.2 + torch.rand(6))

    def forward(self, x: Tensor) -> dict[str, Any]:
        y = self.b(self.norm(self.a(x)).relu())
        return {"map": y, "logits": self.head(y.mean((2, 3))), "best": y.argmax(1)}


class Encoder(nn.Module):
    """[batch, tokens] to [batch, tokens, features]; the embedding's row 0 is padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(20, 16)
        self.up = nn.Linear(16, 24)
        self.down = nn.Linear(24, 16)

    def forward(self, ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.down(self.up(self.embedding(ids)).relu())


def state(model: nn.Module) -> dict[str, tuple[int, bytes]]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {n: (id(t), t.detach().numpy().tobytes()) for n, t in tensors.items()}


def relative(model: nn.Module, quantized: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        wanted, got = model(x), quantized(x)
    if isinstance(wanted, Tensor):
        wanted, got = {"": wanted}, {"": got}
    pairs = [(w.double(), got[n].double()) for n, w in wanted.items() if w.is_floating_point()]
    missed = sum(float((w - g).square().sum()) for w, g in pairs)
    return missed / sum(float(w.square().sum()) for w, _ in pairs)


def test_the_model_is_unchanged() -> None:
    for model, x in ((Branches(), torch.randn(40, 24)), (Convolutions(), torch.randn(9, 3, 6, 6))):
        model.train()
        before, modules = state(model), list(model.named_modules())
        sensitivity(model, x, (2, 4), bias="create", **QUIET)
        assert state(model) == before
        assert list(model.named_modules()) == modules
        assert all(module.training for module in model.modules())
        assert not any(hasattr(module, "quantized_weight") for module in model.modules())
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_the_model_is_unchanged_after_an_exception() -> None:
    model, calls = Convolutions(), 0

    def run(model: nn.Module, x: Tensor) -> object:
        nonlocal calls
        calls += 1
        if calls == 12:
            assert state(model) != before  # in the middle of measuring a quantized layer
            raise RuntimeError("no more")
        return model(x)

    model.eval()
    before, modules = state(model), list(model.named_modules())
    with pytest.raises(RuntimeError, match="no more"):
        sensitivity(model, torch.randn(9, 3, 6, 6), (2, 4), forward_fn=run, **QUIET)
    assert state(model) == before
    assert list(model.named_modules()) == modules


def test_a_fragile_layer_is_the_worst(branches: tuple[Branches, Tensor, Sensitivity]) -> None:
    _, _, found = branches
    assert found.layers == ("first", "second", "third", "fragile")
    assert found.worst(1) == ("fragile",)
    assert found.weights == {"first": 960, "second": 1600, "third": 480, "fragile": 288}
    assert found.network["fragile"][4] > 20 * found.network["second"][4]
    assert set(found.worst()) == set(found.layers)
    # Its own error is nothing special.
    assert found.local["fragile"][4] < 3 * found.local["first"][4]


def test_errors_fall_with_the_width(branches: tuple[Branches, Tensor, Sensitivity]) -> None:
    _, _, found = branches
    assert found.bits == (2, 3, 4, 8)
    for errors in (found.local, found.network):
        for own in errors.values():
            assert own[2] > own[3] > own[4] > 50 * own[8] > 0


@pytest.mark.parametrize("name", ["first", "third", "fragile"])
def test_it_measures_what_quantize_does(
    branches: tuple[Branches, Tensor, Sensitivity], name: str
) -> None:
    model, x, found = branches
    quantized = copy.deepcopy(model)
    report = quantize_(
        quantized, x, mode="parallel", preset="fast", bits=3,
        filter_fn=lambda _, other: other == name, **QUIET,
    )  # fmt: skip
    assert found.batches == 2  # of 32 of the 96 samples
    wanted = relative(model, quantized, x[:64])
    assert found.network[name][3] == pytest.approx(wanted, rel=1e-3)
    assert found.local[name][3] == pytest.approx(report.layers[0].report.relative["final"])


@pytest.mark.parametrize("batch_norm", ["fold", "keep"])
def test_batch_norms_and_many_outputs(batch_norm: Any) -> None:
    model, x = Convolutions().eval(), torch.randn(24, 3, 7, 7)
    found = sensitivity(model, [x[:10], x[10:]], [4], batch_norm=batch_norm, **QUIET)
    assert found.layers == ("a", "b", "head")
    quantized = copy.deepcopy(model)
    quantize_(
        quantized, [x[:10], x[10:]], mode="parallel", preset="fast", batch_norm=batch_norm,
        filter_fn=lambda _, name: name == "a", **QUIET,
    )  # fmt: skip
    assert found.network["a"][4] == pytest.approx(relative(model, quantized, x), rel=1e-3)
    assert found.batches == 2


def test_settings_filters_and_skips() -> None:
    model, x = Branches(), torch.randn(40, 24)
    found = sensitivity(
        model, x, [8, 2], filter_fn=lambda _, name: name != "third",
        overrides={"second": "skip", "first": {"granularity": "per_tensor"}}, **QUIET,
    )  # fmt: skip
    assert found.layers == ("first", "fragile")
    assert found.bits == (2, 8)
    plain = sensitivity(model, x, [2], **QUIET)
    assert found.local["first"][2] > plain.local["first"][2]
    assert found.local["fragile"][2] == plain.local["fragile"][2]
    # The sampled objective gives every width its own annealing on the same inputs.
    sampled = sensitivity(
        model, x, [2, 4], objective="sampled", steps=30, filter_fn=lambda _, n: n == "first",
        batches=1, **QUIET,
    )  # fmt: skip
    assert sampled.local["first"][2] > 3 * sampled.local["first"][4] > 0


def test_padding_is_left_out() -> None:
    model = Encoder()
    with torch.no_grad():
        model.embedding.weight[0] = 30 * torch.randn(16)
    ids = torch.randint(1, 20, (12, 7))
    mask = torch.ones(12, 7, dtype=torch.long)
    mask[:, 4:] = 0
    short = {"ids": ids[:, :4], "attention_mask": mask[:, :4]}
    padded = {"ids": ids * mask, "attention_mask": mask}
    wanted = sensitivity(model, [short], [3], **QUIET)
    found = sensitivity(model, [padded], [3], **QUIET)
    unmasked = sensitivity(model, [padded], [3], padding_mask=None, **QUIET)
    for name in ("up", "down"):
        assert found.network[name][3] == pytest.approx(wanted.network[name][3], rel=1e-3)
        assert found.local[name][3] == pytest.approx(wanted.local[name][3], rel=1e-3)
        assert abs(unmasked.network[name][3] / wanted.network[name][3] - 1) > 0.05


def test_tied_weights_count_once_and_move_together() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 4))
    model[2].weight = model[0].weight
    x = torch.randn(40, 8)
    found = sensitivity(model, x, [2], **QUIET)
    assert found.weights == {"0": 64, "3": 32}
    quantized = copy.deepcopy(model)
    quantize_(
        quantized, x, mode="parallel", preset="fast", bits=2, overrides={"3": "skip"}, **QUIET
    )
    assert found.network["0"][2] == pytest.approx(relative(model, quantized, x), rel=1e-3)


def test_outputs_that_were_not_finite_do_not_count() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).masked_fill(torch.eye(6, dtype=torch.bool)[: len(x)], -torch.inf)

    found = sensitivity(Masked(), torch.randn(6, 6), [2], **QUIET)
    assert 0 < found.network["layer"][2] < 1


def test_the_same_twice(branches: tuple[Branches, Tensor, Sensitivity]) -> None:
    model, x, found = branches
    torch.manual_seed(7)
    batches = (part for part in x.split(32))  # any iterable
    again = sensitivity(model, batches, [8, 4, 3, 2], **QUIET)
    assert again == found
    fewer = sensitivity(model, x, [3], **QUIET)
    assert {n: own[3] for n, own in found.network.items()} == {
        n: own[3] for n, own in fewer.network.items()
    }


def average(found: Sensitivity, assignment: Mapping[str, int]) -> float:
    total = sum(found.weights.values())
    return sum(found.weights[name] * bits for name, bits in assignment.items()) / total


@pytest.mark.parametrize("budget", [2, 2.5, 3, 4.0, 7.9, 8])
def test_suggestions_keep_the_budget(
    branches: tuple[Branches, Tensor, Sensitivity], budget: float
) -> None:
    _, _, found = branches
    suggested = found.suggest(budget)
    assert list(suggested) == list(found.layers)
    assert average(found, suggested) <= budget
    assert suggested["fragile"] == max(suggested.values())
    if 2 < budget < 8:
        assert suggested["fragile"] > min(suggested.values())
    uniform = dict.fromkeys(found.layers, max(b for b in found.bits if b <= budget))
    assert found.predicted(suggested) <= found.predicted(uniform)


@pytest.mark.parametrize("budget", [3, 4])
def test_mixed_bits_beat_uniform_ones(
    branches: tuple[Branches, Tensor, Sensitivity], budget: int
) -> None:
    model, x, found = branches
    mixed, uniform = copy.deepcopy(model), copy.deepcopy(model)
    common: dict[str, Any] = {"mode": "parallel", "preset": "fast", **QUIET}
    report = quantize_(mixed, x, overrides=found.overrides(budget), **common)
    quantize_(uniform, x, bits=budget, **common)
    suggested = found.suggest(budget)
    assert {e.name: e.config["bits"] for e in report.layers} == suggested
    assert average(found, suggested) <= budget
    fresh = torch.randn(200, 24)
    for data in (x, fresh):
        assert relative(model, mixed, data) < 0.5 * relative(model, uniform, data)
    # The first-order model is about right where errors are small and independent.
    measured = relative(model, mixed, x[:64])
    assert found.predicted(suggested) == pytest.approx(measured, rel=0.5)


def test_overrides_escape_names_and_order_modules() -> None:
    names = ("a.b", "a[0]", "a*", "x.y.z", "a")
    errors = {name: {2: 1.0, 4: 0.1} for name in names}
    found = Sensitivity(
        "Odd", names, dict.fromkeys(names, 4), (2, 4), errors, errors, 4.0, 1, ()
    )  # fmt: skip
    overrides = found.overrides()
    assert list(overrides) == ["a[[]0]", "a[*]", "a", "a.b", "x.y.z"]
    assert all(settings == {"bits": 4} for settings in overrides.values())

    model = nn.ModuleDict({"a*": nn.Linear(4, 4), "ab": nn.Linear(4, 4)})

    def run(model: nn.Module, x: Tensor) -> Tensor:
        y: Tensor = 9 * model["a*"](x) + model["ab"](x)  # type: ignore[index]
        return y

    x = torch.randn(40, 4)
    found = sensitivity(model, [x], (2, 4), forward_fn=run, average_bits=3, **QUIET)
    assert found.suggest() == {"a*": 4, "ab": 2}
    report = quantize_(model, [x], overrides=found.overrides(), forward_fn=run, **QUIET)
    assert {e.name: e.config["bits"] for e in report.layers} == {"a*": 4, "ab": 2}


@pytest.mark.parametrize("budget", [1.9, 8.1, math.nan, math.inf, True, "4"])
def test_budgets_out_of_range(branches: tuple[Branches, Tensor, Sensitivity], budget: Any) -> None:
    _, _, found = branches
    with pytest.raises(ValueError, match="average_bits must be a number from 2 to 8, got"):
        found.suggest(budget)
    with pytest.raises(ValueError, match="average_bits must be a number from 2 to 8, got"):
        sensitivity(Branches(), torch.randn(4, 24), average_bits=budget, **QUIET)
    with pytest.raises(ValueError, match="average_bits must be given"):
        found.suggest()


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"bits": 4}, TypeError, "bits must be integers from 2 to 8, got 4"),
        ({"bits": [1, 4]}, ValueError, "bits must be from 2 to 8, got 1"),
        ({"bits": [4.0]}, TypeError, "bits must be an integer"),
        ({"bits": []}, ValueError, "bits must be at least one width"),
        ({"bits": [4, 4]}, ValueError, "bits must be at least one width, without repeats"),
        ({"batches": 0}, ValueError, "batches must be at least 1, got 0"),
        ({"batch_norm": "no"}, ValueError, "batch_norm must be fold or keep, got 'no'"),
        ({"overrides": {"first": {"bits": 8}}}, ValueError, "'first'.* must not set bits"),
        ({"overrides": {"nothing": "skip"}}, ValueError, "overrides must match"),
        (
            {"filter_fn": lambda *_: False},
            ValueError,
            r"got none \(first: filter_fn returned False",
        ),
        ({"forward_fn": lambda m, x: None}, ValueError, r"got none \(first: it was not called"),
        (
            {"forward_fn": lambda m, x: m(x).argmax(1)},
            ValueError,
            "model must return floating-point tensors, or forward_fn must, got Tensor",
        ),
        ({"forward_fn": lambda m, x: 0 * m(x)}, ValueError, "other outputs than zeros"),
        (
            {"forward_fn": lambda m, x: (y := m(x))[y > 0.1]},
            ValueError,
            "model must return tensors of the same shapes .* at 2 bits",
        ),
        ({"calibration": []}, ValueError, "calibration must hold at least one batch"),
        ({"model": 3}, TypeError, "model must be a torch module, got int"),
        ({"config": 3}, TypeError, "config must be an AdaRoundConfig"),
        ({"speed": 3}, TypeError, "'speed' is no setting"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], kind: type[Exception], message: str) -> None:
    usual = {"model": Branches(), "calibration": torch.randn(8, 24), "bits": (2, 4)}
    with pytest.raises(kind, match=message):
        sensitivity(**{**usual, **QUIET, **arguments})
