"""What the first batch does not run, or with no rows at all."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, optimize_layer, quantize_, sensitivity
from adaround_ext.replay.census import batches_to_trace
from tests.model.test_checkpoint import interrupted
from tests.model.test_quantize import codes
from tests.support.row_models import FEATURES, against_nearest

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {"preset": "fast", "bits": 4, "progress": False}


class Towers(nn.Module):
    """Pictures come with some batches only."""

    def __init__(self) -> None:
        super().__init__()
        self.text = nn.Linear(FEATURES, FEATURES)
        self.picture = nn.Sequential(
            nn.Linear(8, FEATURES), nn.ReLU(), nn.Linear(FEATURES, FEATURES)
        )
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(FEATURES, FEATURES), nn.ReLU()) for _ in range(2)
        )
        self.head = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor, picture: Tensor | None = None) -> Tensor:
        h = torch.relu(self.text(x))
        if picture is not None:
            h = h + torch.relu(self.picture(picture))
        for block in self.blocks:
            h = h + block(h)
        return self.head(h)


class Steps(nn.Module):
    """As many steps as its batch has."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.state = nn.Linear(8, FEATURES), nn.Linear(FEATURES, FEATURES)
        self.leave = nn.Linear(FEATURES, 4)

    def forward(self, x: Tensor) -> Tensor:
        h = x.new_zeros(len(x), FEATURES)
        for step in x.unbind(1):
            h = torch.tanh(self.enter(step) + self.state(h))
        return self.leave(h)


def with_pictures(*batches: bool) -> list[dict[str, Tensor]]:
    """Batches of 32, some with a picture."""
    torch.manual_seed(0)
    data = []
    for picture in batches:
        data.append({"x": torch.randn(32, FEATURES)})
        data[-1] |= {"picture": torch.randn(32, 8)} if picture else {}
    return data


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("device", [None, "cpu:0"], ids=["here", "block by block"])
@pytest.mark.parametrize("batches", [(False, True, False, True), (True, False, False)])
def test_a_tower_that_some_batches_call(
    batches: tuple[bool, ...], device: str | None, mode: str
) -> None:
    torch.manual_seed(0)
    model, data = Towers(), with_pictures(*batches)
    full = copy.deepcopy(model)
    report = quantize_(model, data, mode=mode, device=device, **FAST)
    assert not report.skipped
    counts = {layer.name: layer.report.samples for layer in report.layers}
    assert counts["picture.0"] == counts["picture.2"] == 32 * sum(batches)
    assert counts["text"] == counts["blocks.0.0"] == counts["head"] == 32 * len(batches)
    order = [layer.name for layer in report.layers]
    assert order.index("picture.0") < order.index("picture.2") < order.index("blocks.0.0")
    noted = "in calibration batches 1 layers run that do not run in the first one" in str(
        report.notes
    )
    assert noted == (not batches[0])
    errors = against_nearest(
        model, full, counts, 4, lambda: [model(**b) for b in with_pictures(True, True)]
    )
    assert max(errors.values()) < 1, errors


def test_the_first_batch_does_not_decide() -> None:
    """The same data in another order: the same layers, about the same codes' quality."""
    entries = []
    for batches in ((True, False), (False, True)):
        torch.manual_seed(0)
        model, data = Towers(), with_pictures(True, False)
        data = data if batches[0] else data[::-1]
        report = quantize_(model, data, **FAST)
        entries.append({e.name: (e.report.samples, e.calls, e.block) for e in report.layers})
    assert entries[0] == entries[1]


@pytest.mark.parametrize("lengths", [(2, 5, 3, 7), (7, 2), (1, 1, 4)])
def test_later_steps_count(lengths: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Steps()
    report = quantize_(model, [torch.randn(16, n, 8) for n in lengths], **FAST)
    counts = {layer.name: layer.report.samples for layer in report.layers}
    assert counts == {
        "enter": 16 * sum(lengths),
        "state": 16 * sum(lengths),
        "leave": 16 * len(lengths),
    }
    assert {e.name: e.calls for e in report.layers}["enter"] == max(lengths)


class Routed(nn.Module):
    """Four experts; each row says itself to which it goes."""

    def __init__(self, empty_calls: bool = False) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Linear(FEATURES, FEATURES) for _ in range(4))
        self.head = nn.Linear(FEATURES, 4)
        self.empty_calls = empty_calls

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            rows = (x[:, 0].round() == number).nonzero()[:, 0]
            if len(rows) or self.empty_calls:
                out = out.index_add(0, rows, expert(x[rows]))
        return self.head(x + out)


def rows_for(*experts: int) -> Tensor:
    x = torch.randn(32, FEATURES)
    x[:, 0] = torch.tensor(experts).repeat(32)[:32].float()
    return x


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
@pytest.mark.parametrize("empty_calls", [False, True])
def test_experts_without_rows_are_left_alone(empty_calls: bool, mode: str) -> None:
    torch.manual_seed(0)
    model = Routed(empty_calls)
    weights = [expert.weight.detach().clone() for expert in model.experts]
    data = [rows_for(0), rows_for(0, 1), rows_for(3)]
    report = quantize_(model, data, mode=mode, **FAST)
    names = {layer.name: layer.report.samples for layer in report.layers}
    assert names == {"experts.0": 48, "experts.1": 16, "experts.3": 32, "head": 96}
    reason = "no row of the calibration data came to it"
    if not empty_calls:
        reason = "it was not called: nothing is known of its inputs"
    assert report.skipped == {"experts.2": reason}
    assert torch.equal(model.experts[2].weight, weights[2])
    assert not hasattr(model.experts[2], "quantized_weight")


def test_sensitivity_of_later_and_empty_layers() -> None:
    torch.manual_seed(0)
    data = [rows_for(0), rows_for(0, 1), rows_for(3)]
    result = sensitivity(Routed(True), data, bits=(4,), progress=False)
    assert result.layers == ("experts.0", "experts.1", "experts.3", "head")
    assert "experts.2: no row of the calibration data came to it" in result.notes
    result = sensitivity(Routed(), data, bits=(4,), progress=False)
    assert result.layers == ("experts.0", "experts.1", "experts.3", "head")


@pytest.mark.parametrize("call", [quantize_, sensitivity])
def test_no_rows_at_all_is_an_error(call: Callable[..., object]) -> None:
    model = nn.Sequential(nn.Linear(FEATURES, 4))
    settings = {"bits": (4,)} if call is sensitivity else FAST
    data = [torch.randn(0, FEATURES)] * 2
    with pytest.raises(ValueError, match=r"calibration must reach 0, got no rows of any layer"):
        call(model, data, **{**settings, "progress": False})


@pytest.mark.parametrize("x", [torch.randn(0, 4), torch.randn(3, 0, 4)])
def test_a_layer_alone_without_rows_is_an_error(x: Tensor) -> None:
    with pytest.raises(ValueError, match="inputs must hold at least one sample"):
        optimize_layer(nn.Linear(4, 4), x)
    with pytest.raises(ValueError, match="inputs must hold at least one sample"):
        optimize_layer(nn.Linear(4, 4), [x, x])


def test_only_padding_is_no_row() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.a(x).mean(1) + self.b(x[:, 0])

    batch = {"x": torch.randn(8, 5, 4), "attention_mask": torch.zeros(8, 5)}
    report = quantize_(Masked(), [batch], **FAST)
    assert [layer.name for layer in report.layers] == ["b"]
    assert report.skipped == {"a": "no row of the calibration data came to it"}


@pytest.mark.parametrize("after", [1, 3])
@pytest.mark.parametrize(
    "settings", [{}, {"activations": ActivationConfig()}], ids=["", "activations"]
)
def test_resumed_runs_watch_the_same_batches(
    after: int, settings: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    whole, data = Towers(), with_pictures(False, True, False)
    broken = copy.deepcopy(whole)
    quantize_(whole, data, **FAST, **settings)
    interrupted(broken, after, monkeypatch, data, checkpoint_dir=tmp_path, **FAST, **settings)
    report = quantize_(broken, data, checkpoint_dir=tmp_path, **FAST, **settings)
    assert any(f"{after} layers from checkpoint_dir" in note for note in report.notes)
    one, two = codes(whole), codes(broken)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_few_batches_are_traced() -> None:
    new = {1: {"a": 1}, 3: {"a": 1, "b": 3}, 4: {"b": 3}, 7: {"c": 1, "b": 1}}
    assert batches_to_trace(new) == [3, 7]
    assert batches_to_trace(new | {8: {"a": 2}}) == [3, 7, 8]
    assert batches_to_trace({}) == []
