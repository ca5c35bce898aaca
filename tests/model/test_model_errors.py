"""quantize_ with what it must refuse, or take as it is: the model is the same afterwards."""

from __future__ import annotations

import copy
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, quantize_
from adaround_ext.model import quantize, solve_units
from tests.support import models

pytestmark = pytest.mark.usefixtures("one_thread")
FAST = {"preset": "fast", "progress": False}


def net() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5)
    )


def images(count: int = 2) -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8) for _ in range(count)]


class Snapshot:
    """Everything of a model that must be as it was."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.modules = dict(model.named_modules())
        self.tensors = {n: (p, p.data_ptr()) for n, p in model.named_parameters()}
        self.state = copy.deepcopy(model.state_dict())
        self.training = {n: m.training for n, m in model.named_modules()}
        self.attributes = {n: set(m.__dict__) for n, m in model.named_modules()}
        self.hooks = self._hooks()

    def _hooks(self) -> dict[str, tuple[int, int]]:
        return {
            n: (len(m._forward_hooks), len(m._forward_pre_hooks))
            for n, m in self.model.named_modules()
        }

    def check(self) -> None:
        assert dict(self.model.named_modules()) == self.modules
        for name, parameter in self.model.named_parameters():
            assert (parameter, parameter.data_ptr()) == self.tensors[name]
        state = self.model.state_dict()
        assert state.keys() == self.state.keys()
        assert all(torch.equal(t, self.state[n]) for n, t in state.items())
        assert {n: m.training for n, m in self.model.named_modules()} == self.training
        assert {n: set(m.__dict__) for n, m in self.model.named_modules()} == self.attributes
        assert self._hooks() == self.hooks


def failing(at: int) -> Iterator[Tensor]:
    for index, image in enumerate(images(4)):
        if index == at:
            raise OSError("disk on fire")
        yield image


def with_nan(value: float) -> list[Tensor]:
    batches = images(3)
    batches[1][0, 0, 0, :2] = value
    return batches


@pytest.mark.parametrize(
    ("data", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "calibration must hold at least one batch, got none"),
        (iter([]), {}, ValueError, "calibration must hold at least one batch, got none"),
        (torch.empty(0, 3, 8, 8), {}, ValueError, "calibration must hold at least one batch"),
        (7, {}, TypeError, "calibration must be an iterable of batches.*got int"),
        ("text.txt", {}, TypeError, "calibration must be an iterable of batches.*got str"),
        ([3], {}, TypeError, "calibration must hold tensors, tuples or mappings.*got int"),
        ([{"pixels": 1}], {}, TypeError, "calibration must hold what the model takes.*'?input"),
        (with_nan(float("nan")), {}, ValueError, "must be finite, got 2 NaN .* in batch 1"),
        (with_nan(float("inf")), {}, ValueError, "must be finite, got 2 NaN .* in batch 1"),
        (failing(2), {}, OSError, "disk on fire"),
        (images(), {"mode": "both"}, ValueError, "mode must be one of sequential, parallel"),
        (images(), {"bits": 9}, ValueError, "bits must be from 2 to 8, got 9"),
        (images(), {"bit": 4}, TypeError, "'bit' is no setting"),
        (images(), {"memory_budget": -1}, ValueError, "memory_budget must be a number of bytes"),
        (images(), {"device_budget": 0.5}, ValueError, "device_budget must be a number.* got 0.5"),
        (images(), {"overrides": {"convolution": {"bits": 8}}}, ValueError, "overrides must match"),
        (images(), {"overrides": {"0": {"bit": 8}}}, TypeError, r"overrides\['0'\]: 'bit'"),
        (images(), {"overrides": {"0": {"bits": 1}}}, ValueError, r"overrides\['0'\]: bits must"),
        (images(), {"overrides": {"0": 8}}, TypeError, "must be settings or 'skip', got 8"),
        (images(), {"overrides": {0: {"bits": 8}}}, TypeError, "or module types as keys, got 0"),
        (images(), {"overrides": {nn.LSTM: "skip"}}, ValueError, "overrides must match modules"),
        (images(), {"overrides": {"2": {"bits": 8}}}, ValueError, "'2' matches none"),
        (images(), {"overrides": ()}, TypeError, "overrides must be a mapping, got tuple"),
        (images(), {"overrides": ["0"]}, TypeError, "overrides must be a mapping, got list"),
        (images(), {"blocks": ["stage*"]}, ValueError, "blocks must name modules.*'stage\\*'"),
        (images(), {"blocks": "0"}, TypeError, "blocks must be a sequence of names, .*got '0'"),
        (images(), {"blocks": 3}, TypeError, "blocks must be a sequence of names, .*got 3"),
        (images(), {"blocks": [None]}, TypeError, "blocks must be .*got None in it"),
        (images(), {"filter_fn": 3}, TypeError, "filter_fn must be a function .*got 3"),
        (images(), {"cache_dir": "/nowhere"}, ValueError, "cache_dir must be a folder that exists"),
        (images(), {"forward_fn": 3}, TypeError, "forward_fn must be a function .*got 3"),
        ([torch.empty(4, 3, 8, 8, device="meta")], {}, ValueError, "must hold data, got a meta"),
        (images(), {"device": "nowhere"}, ValueError, "device must be one of .*got 'nowhere'"),
        (images(), {"device": "meta"}, ValueError, "device must hold data, got 'meta'"),
        (images(), {"equalize": 1}, ValueError, "equalize must be True or False, got 1"),
        (images(), {"activation_aware": "yes"}, ValueError, "activation_aware must be True or"),
        (images(), {"batch_norm": "drop"}, ValueError, "batch_norm must be one of fold, keep"),
        (
            images(),
            {"granularity": "per_group", "group_size": 8},
            ValueError,
            "group_size must divide the 27 columns of 0, got 8: give it another by overrides",
        ),
        (images(), {"activations": 8}, TypeError, "activations must be an ActivationConfig"),
        (images(), {"filter_fn": lambda m, n: False}, ValueError, r"got none \(0: filter_fn"),
        ([torch.randn(4, 1, 8, 8)], {}, RuntimeError, "channels"),
    ],
)  # fmt: skip
def test_refused_and_unchanged(
    data: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = net().train()
    before = Snapshot(model)
    with pytest.raises(error, match=message):
        quantize_(model, data, **{**FAST, **arguments})
    before.check()


@pytest.fixture
def ctrl_c() -> Iterator[Any]:
    """Python's handler of Ctrl-C, which a process in the background does not have."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("Ctrl-C comes to the main thread")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def test_an_interruption_at_the_end_comes_after_it(
    ctrl_c: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Never a model of which some layers are quantized and others are not."""
    write, calls = quantize.apply_, []

    def interrupted(*args: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            # As Python does on the signal.
            signal.getsignal(signal.SIGINT)(signal.SIGINT, None)
        write(*args)

    monkeypatch.setattr(quantize, "apply_", interrupted)
    model = net()
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, images(), **FAST)
    assert signal.getsignal(signal.SIGINT) is ctrl_c
    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    assert len(layers) == 2 and all(hasattr(layer, "quantized_weight") for layer in layers)


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_a_failure_on_the_way_leaves_the_model_as_it_was(
    mode: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With everything on: folded batch norms, equalized layers, quantizers of activations."""
    solve, calls = solve_units.solve, []

    def fail_late(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return solve(*args)

    monkeypatch.setattr(solve_units, "solve", fail_late)
    model = net().train()
    before, batches = Snapshot(model), images()
    random_state = torch.get_rng_state()
    with pytest.raises(KeyboardInterrupt):
        quantize_(model, batches, mode=mode, equalize=True, activations=ActivationConfig(), **FAST)
    before.check()
    assert torch.equal(torch.get_rng_state(), random_state) and torch.is_grad_enabled()


def test_weights_that_are_no_numbers_are_refused() -> None:
    """Also those of the last layer, whose outputs nobody looks at."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with torch.no_grad():
        model[1].weight[2, 3:5] = torch.nan
    before = Snapshot(model[0])
    with pytest.raises(ValueError, match="weight of 1 must be finite, got 2 NaN or infinite"):
        quantize_(model, models_vectors(), **FAST)
    before.check()


class Overflow(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x) / (x[:, :1] != 0))


def test_nan_inside_the_model_names_the_layer_and_the_batch() -> None:
    model = Overflow()
    batches = models_vectors()
    batches[2][3, 0] = 0
    before = Snapshot(model)
    with pytest.raises(ValueError, match=r"inputs of second in calibration batch 2 must be finite"):
        quantize_(model, batches, **FAST)
    before.check()


def models_vectors() -> list[Tensor]:
    return [torch.randn(16, 8) for _ in range(3)]


def test_training_mode_gradients_and_random_state_come_back() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model.train()
    model[1].eval()
    model[3].weight.requires_grad_(False)
    norm, batches = copy.deepcopy(model[2].state_dict()), models_vectors()
    random_state = torch.get_rng_state()
    with torch.inference_mode():
        quantize_(model, batches, batch_norm="keep", **FAST)
    assert [m.training for m in model] == [True, False, True, True]
    assert model[0].weight.requires_grad and not model[3].weight.requires_grad
    assert all(torch.equal(t, norm[n]) for n, t in model[2].state_dict().items())
    assert torch.equal(torch.get_rng_state(), random_state)
    model(torch.randn(4, 8)).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    model = models.ResidualNet().to(dtype)
    batches = [x.to(dtype) for x in images(3)]
    before = model(batches[0]).detach().double()
    report = quantize_(model, batches, bits=8, **FAST)
    after = model(batches[0]).detach().double()
    assert model.stem.weight.dtype == dtype
    assert (after - before).norm() < 0.03 * before.norm()
    assert report.relative_error < 1e-3


def test_without_gradients_from_the_caller() -> None:
    model = net().requires_grad_(False)
    with torch.no_grad():
        quantize_(model, images(), **FAST)
    assert not any(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "data",
    [
        [(x, torch.zeros(4)) for x in images()],
        [[x] for x in images()],
        (x for x in images()),
        torch.cat(images()),
        [{"input": x} for x in images()],
    ],
    ids=["with labels", "lists", "generator", "tensor", "dicts"],
)
def test_ways_to_give_data(data: Any) -> None:
    report = quantize_(net(), data, **FAST)
    assert report.samples == 8 and len(report.layers) == 2
    assert any("no parameter is left for it" in note for note in report.notes) == (
        isinstance(data, list) and isinstance(data[0], tuple)
    )


def test_forward_fn_takes_anything() -> None:
    class Batch:
        def __init__(self, image: Tensor) -> None:
            self.image = image

    batches = [Batch(x) for x in images()]
    first, second = net(), net()
    second.load_state_dict(first.state_dict())
    quantize_(first, batches, forward_fn=lambda model, batch: model(batch.image), **FAST)
    quantize_(second, [batch.image for batch in batches], **FAST)
    assert all(torch.equal(t, second.state_dict()[n]) for n, t in first.state_dict().items())


def test_skipped_modules_have_a_reason() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(10, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))
            self.unused = nn.Linear(8, 8)
            self.used, self.left_out = nn.Linear(8, 8), nn.Linear(8, 8)
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.norm = nn.LayerNorm([4, 8])

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embedding(ids)
            x = x + self.attention(x, x, x)[0]
            return self.norm(self.lstm(self.left_out(self.used(self.normed(x))))[0])

    model = Odd()
    report = quantize_(model, [torch.arange(4)[None]], overrides={"left_out": "skip"}, **FAST)
    assert [e.name for e in report.layers] == ["used"]
    reasons = {
        "embedding": "Embedding is not supported",
        "attention": "MultiheadAttention is not supported",
        "attention.out_proj": "it was not called",
        "unused": "it was not called",
        "normed": "layer must own its weight",
        "left_out": "overrides say skip",
        "lstm": "LSTM is not supported",
    }
    assert reasons.keys() <= report.skipped.keys()
    for name, reason in reasons.items():
        assert reason in report.skipped[name]
    assert "norm" not in report.skipped


def test_overrides_by_name_type_and_order() -> None:
    model = models.ResidualNet()
    report = quantize_(
        model,
        images(),
        bits=4,
        overrides={
            nn.Linear: {"bits": 5},
            "blocks.0": {"bits": 3},
            "*.down": {"granularity": "per_tensor"},
            "<first>": {"bits": 8},
            "<last>": {"bits": 8, "symmetric": False},
            "blocks.1.conv2": "skip",
        },
        **FAST,
    )
    got = {e.name: (e.config["bits"], e.config["granularity"]) for e in report.layers}
    assert got == {
        "stem": (8, "per_channel"),
        "blocks.0.conv1": (3, "per_channel"),
        "blocks.0.conv2": (3, "per_channel"),
        "blocks.0.down": (3, "per_tensor"),
        "blocks.1.conv1": (4, "per_channel"),
        "blocks.1.down": (4, "per_tensor"),
        "head": (8, "per_channel"),
    }
    assert report.skipped["blocks.1.conv2"] == "overrides say skip"
    assert model.head.quantized_weight.codes.dtype == torch.uint8


def test_cache_goes_to_files_and_away(tmp_path: Path) -> None:
    model = models.ResidualNet()
    report = quantize_(model, iter(images()), memory_budget=0, cache_dir=str(tmp_path), **FAST)
    assert report.memory["cache_file"] > 0 and report.memory["cache_memory"] == 0
    assert list(tmp_path.iterdir()) == []
