"""The digits example and the paper's AdaRound for whole models, with few steps."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext import AdaRoundConfig
from adaround_ext.grid import make_grid, nearest_codes
from adaround_ext.ops import dequantize
from adaround_ext.reference import ReferenceConfig, optimize
from benchmarks.model import reference_model
from benchmarks.workloads import digits

pytest.importorskip("sklearn")  # the digits
examples = pytest.importorskip("examples.digits")

CONFIG = AdaRoundConfig(bits=2)
SETTINGS = ReferenceConfig(steps=30, learning_rate=1e-1)


class Small(nn.Module):
    """Two convolutions, the first one with BatchNorm and ReLU, and an addition after the second."""

    def __init__(self) -> None:
        super().__init__()
        self.last = nn.Linear(6, 3)  # defined first, runs last
        self.conv = nn.Conv2d(2, 6, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(6)
        self.relu = nn.ReLU(inplace=True)
        self.deep = nn.Conv2d(6, 6, 3, padding=1, groups=6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.norm(self.conv(x)))
        y: Tensor = self.last((self.deep(x) + x).mean((2, 3)))
        return y


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    model = Small()
    model(torch.randn(64, 2, 5, 5))  # running statistics
    return model.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.randn(40, 2, 5, 5, generator=torch.Generator().manual_seed(1))


def test_reference_walk_by_hand(model: Small, images: Tensor) -> None:
    full = copy.deepcopy(model)
    reference_model.adaround_(model, images, CONFIG, SETTINGS)

    norm = full.norm
    factor = norm.weight / (norm.running_var + norm.eps).sqrt()
    weight = (full.conv.weight * factor[:, None, None, None]).detach()
    bias = (norm.bias - norm.running_mean * factor).detach()
    assert isinstance(model.norm, nn.Identity)
    torch.testing.assert_close(model.conv.bias, nn.Parameter(bias))

    def found(weight: Tensor, x: Tensor, y: Tensor, forward, channel_dim: int) -> Tensor:
        matrix = weight.flatten(1)
        grid = make_grid(matrix, AdaRoundConfig(bits=2, scale="mse"))
        codes = optimize(
            matrix, grid.scale, grid.zero_point, grid.qmin, grid.qmax, x, y,
            lambda x, w: forward(x, w.view_as(weight)), SETTINGS, channel_dim=channel_dim,
        )  # fmt: skip
        return dequantize(codes, grid.scale, grid.zero_point).view_as(weight)

    with torch.no_grad():
        exact = full.relu(full.norm(full.conv(images)))  # targets are after the ReLU
    first = found(
        weight, images, exact, lambda x, w: F.relu(F.conv2d(x, w, bias, padding=1)), channel_dim=1
    )
    _assert_same_codes(model.conv.weight, first)

    with torch.no_grad():
        inputs = F.relu(F.conv2d(images, model.conv.weight, model.conv.bias, padding=1))
        outputs = full.deep(exact)
    second = found(
        full.deep.weight.detach(), inputs, outputs,
        lambda x, w: F.conv2d(x, w, full.deep.bias.detach(), padding=1, groups=6),
        channel_dim=1,
    )  # fmt: skip
    _assert_same_codes(model.deep.weight, second)
    assert torch.equal(model.deep.bias, full.deep.bias)

    with torch.no_grad():
        inputs = (model.deep(inputs) + inputs).mean((2, 3))
        outputs = full(images)
    third = found(
        full.last.weight.detach(), inputs, outputs,
        lambda x, w: F.linear(x, w, full.last.bias.detach()), channel_dim=1,
    )  # fmt: skip
    _assert_same_codes(model.last.weight, third)


def _assert_same_codes(weight: Tensor, expected: Tensor) -> None:
    """All but a few: folding by hand differs in last bits, which may decide about a weight."""
    different = (weight.detach() - expected).abs() > 1e-4 * expected.abs().max()
    assert different.float().mean() < 0.03


def test_nearest(model: Small, images: Tensor) -> None:
    full = copy.deepcopy(model)
    reference_model.nearest_(model, images, CONFIG)
    weight = full.last.weight.detach()
    grid = make_grid(weight, AdaRoundConfig(bits=2, scale="mse"))
    expected = dequantize(nearest_codes(weight, grid), grid.scale, grid.zero_point)
    assert torch.equal(model.last.weight.detach(), expected)
    assert isinstance(model.norm, nn.Identity)


def test_reference_wants_layers_that_run_once(images: Tensor) -> None:
    conv = nn.Conv2d(2, 2, 3, padding=1)
    with pytest.raises(ValueError, match="must run each layer once, 0 ran 2"):
        reference_model.adaround_(nn.Sequential(conv, conv), images, CONFIG, SETTINGS)


def _row(seed: int, method: str, accuracy: float) -> examples.Row:
    return examples.Row("residual", seed, 4, "per_channel", method, accuracy, 0.0, 1.0, 1.0)


def test_targets_are_paired_over_seeds() -> None:
    accuracies = {"full": (99.0, 97.0), "balanced": (98.8, 96.2), "reference": (98.9, 96.7)}
    results = examples.Results(
        [_row(seed, name, value[seed]) for seed in (0, 1) for name, value in accuracies.items()]
    )
    lost, gained = examples.targets(results)
    assert lost.value == pytest.approx(0.5)
    assert lost.most == 0.5
    assert gained.value == pytest.approx(-0.3)
    assert gained.least == pytest.approx(-0.2)  # of -0.1 and -0.5
    assert not gained.holds


def test_a_difference_of_exactly_one_standard_error_holds() -> None:
    images = {"full": [495] * 5, "reference": [495] * 5, "balanced": [494, 494, 496, 494, 495]}
    results = examples.Results(
        [_row(i, m, 100 * n[i] / 497) for i in range(5) for m, n in images.items()]
    )
    _, gained = examples.targets(results)
    assert gained.value == gained.least == pytest.approx(-0.4 * 100 / 497)
    assert gained.holds


def test_example(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained = digits.trained
    monkeypatch.setattr(digits, "trained", lambda net, seed: trained(net, seed, epochs=2))
    monkeypatch.setattr(examples, "CALIBRATION_IMAGES", 128)
    path = tmp_path / "digits.json"
    few = ["--nets", "residual", "--bits", "3", "--granularity", "per_channel", "--seeds", "1"]
    examples.main([*few, "--reference-steps", "20", "--output", str(path)])
    document = json.loads(path.read_text())
    rows = {row["method"]: row for row in document["results"]["rows"]}
    assert list(rows) == list(examples.METHODS)
    assert rows["full"]["accuracy"] > 80 and rows["full"]["error"] == 0
    assert rows["nearest"]["error"] > 5 * rows["balanced"]["error"] > 0
    assert document["results"]["reference"]["steps"] == 20
    assert document["results"]["calibration_images"] == 128
    assert len(document["targets"]) == 2
    table = capsys.readouterr().out
    assert f"{rows['balanced']['accuracy']:.2f} ± 0.00" in table


def test_example_wants_a_seed() -> None:
    with pytest.raises(SystemExit):
        examples.main(["--seeds", "0"])
