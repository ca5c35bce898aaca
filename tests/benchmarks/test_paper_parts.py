"""The experiments on grids, biases, data and the library's parts, at sizes that take no time."""

from __future__ import annotations

import dataclasses
import itertools
import re
import statistics
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, optimize_layer
from adaround_ext.layers.matrix import matrix_layer
from benchmarks.quality.layers import Moments, Subject

pytest.importorskip("sklearn")  # the digits
pytest.importorskip("matplotlib")
from benchmarks.paper import (
    bias,
    calibration_data,
    comparison,
    data,
    encoder_layers,
    grids,
    parts,
    pictures,
    relaxations,
    texts,
)
from benchmarks.paper import main as cli
from benchmarks.paper.catalogue import EXPERIMENTS
from benchmarks.paper.comparison import Setting
from benchmarks.paper.experiment import Text
from benchmarks.paper.walk import LayerTask
from benchmarks.paper.workload import network

pytestmark = pytest.mark.usefixtures("one_thread")
BITS = 3


@pytest.fixture
def task() -> LayerTask:
    """A layer with one large weight, correlated inputs that are not the full-precision ones."""
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(12, 5)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(5, 12, generator=generator))
        layer.weight[0, 0] = 6.0
    exact = torch.randn(80, 12, generator=generator) @ torch.randn(12, 12, generator=generator) + 1
    x = exact + 0.1 * torch.randn(80, 12, generator=generator)
    config = AdaRoundConfig(bits=BITS, granularity="per_tensor", scale="mse", bias="keep")
    with torch.no_grad():
        return LayerTask("layer", matrix_layer(layer), config, x, layer(exact))


def output_error(task: LayerTask, weight_q: Tensor) -> float:
    y = task.matrix.forward(task.inputs, weight_q, task.matrix.bias)
    return float((y - task.targets).square().sum(1).mean())


def test_each_grid_is_the_best_by_its_own_measure(task: LayerTask) -> None:
    found = {name: rule(task) for name, rule in grids.RULES.items()}
    rounded = {name: grids.nearest(task, grid) for name, grid in found.items()}
    by_weights = {n: float((w - task.weight).square().sum()) for n, w in rounded.items()}
    by_outputs = {n: output_error(task, w) for n, w in rounded.items()}
    assert min(by_weights, key=by_weights.__getitem__) == "weights"
    assert min(by_outputs, key=by_outputs.__getitem__) == "outputs"
    assert float(found["min-max"].scale) == pytest.approx(6.0 / 3)
    assert len({float(grid.scale) for grid in found.values()}) == 4


def test_output_loss_is_that_of_the_outputs(task: LayerTask) -> None:
    loss = grids.output_loss(task)
    for weight_q in (task.weight, task.weight * 0.7):
        assert loss(weight_q) == pytest.approx(output_error(task, weight_q), rel=1e-4)


@pytest.mark.parametrize("rule", grids.RULES)
def test_adaround_beats_nearest_on_every_grid(task: LayerTask, rule: str) -> None:
    grid = grids.RULES[rule](task)
    learned = grids.adaround(task, grid)
    codes = learned / grid.scale
    torch.testing.assert_close(codes, codes.round(), rtol=0, atol=1e-4)
    assert output_error(task, learned) < output_error(task, grids.nearest(task, grid))


def test_a_corrected_bias_leaves_no_mean_error(task: LayerTask) -> None:
    weight_q = grids.nearest(task, grids.min_max(task))
    before = task.matrix.forward(task.inputs, weight_q, task.matrix.bias) - task.targets
    corrected = bias.corrected_bias(task, weight_q)
    after = task.matrix.forward(task.inputs, weight_q, corrected) - task.targets
    assert float(before.mean(0).abs().min()) > 0.01
    torch.testing.assert_close(after.mean(0), torch.zeros(5), rtol=0, atol=1e-5)


def test_a_corrected_bias_of_a_convolution() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(2, 3, 3)
    x = torch.rand(4, 2, 6, 6)
    with torch.no_grad():
        task = LayerTask("c", matrix_layer(layer), AdaRoundConfig(), x, layer(x))
        weight_q = task.weight * 0.8
        y = task.matrix.forward(x, task.matrix.weight_from_matrix(weight_q), None)
        y += bias.corrected_bias(task, weight_q)[:, None, None]
    torch.testing.assert_close(y.mean((0, 2, 3)), task.targets.mean((0, 2, 3)))


@pytest.mark.parametrize("kind", calibration_data.DOMAINS)
def test_calibration_images(kind: str) -> None:
    make = calibration_data.DOMAINS[kind]
    images = make(40, 1)
    assert images.shape == (40, 1, 8, 8) and images.dtype == torch.float32
    assert 0 <= float(images.min()) < 0.1 and 0.9 < float(images.max()) <= 1
    assert torch.equal(images, make(40, 1)) and not torch.equal(images, make(40, 2))
    assert len(images.flatten(1).unique(dim=0)) == 40


class Words:
    """A tokenizer that knows the lengths of words."""

    cls_token_id, sep_token_id = 101, 102

    def __call__(self, lines: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[len(word) for word in line.split()] for line in lines]}


def test_windows_of_text() -> None:
    windows = texts.source(Words())
    mixed = texts.shuffled(windows)
    assert not torch.equal(mixed, windows)
    assert torch.equal(mixed.flatten().sort().values, windows.flatten().sort().values)
    for found in (windows, mixed):
        assert len(found) >= 30 and found.shape[1] == texts.LENGTH
        assert bool((found[:, 0] == 101).all()) and bool((found[:, -1] == 102).all())
        batches = [batch["input_ids"] for batch in encoder_layers.drawn(found, 20, 0)]
        assert sum(map(len, batches)) == 20
        rows = {tuple(row.tolist()) for row in found}
        assert all(tuple(row.tolist()) in rows for batch in batches for row in batch)


def test_the_last_rung_is_balanced_and_each_rest_lacks_one_part() -> None:
    def config(name: str) -> dict[str, object]:
        return dataclasses.asdict(AdaRoundConfig(**parts.SCHEMES[name]))

    names = list(parts.SCHEMES)
    added = names[: names.index("+ GPTQ") + 1]
    balanced = dataclasses.asdict(AdaRoundConfig())
    assert config(added[-1]) == balanced
    for name in names[len(added) :]:
        assert sum(config(name)[key] != balanced[key] for key in balanced) == 1, name
    for before, after in itertools.pairwise(added):
        assert config(before) != config(after)


def test_rows_of_a_layer_have_the_codes_of_the_whole() -> None:
    torch.manual_seed(0)
    whole, part = nn.Linear(16, 24), nn.Linear(16, 8)
    with torch.no_grad():
        part.weight.copy_(whole.weight[:8])
        part.bias.copy_(whole.bias[:8])
    x = torch.randn(200, 16) @ torch.randn(16, 16)
    found = [optimize_layer(layer, x, bits=3).codes for layer in (whole, part)]
    assert torch.equal(found[0][:8], found[1])


def test_errors_of_every_scheme_are_those_of_the_outputs() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(16, 8)
    mixing = torch.randn(16, 16)
    x, y = (torch.randn(10, 30, 16) @ mixing + 1 for _ in range(2))
    subject = Subject("test", "layer", layer, x, Moments.of(layer, [x]), Moments.of(layer, [y]))
    found = parts.errors(subject, 3, steps=20)
    assert set(found) == {"nearest", "loop", *parts.SCHEMES}
    assert found["+ GPTQ"] < found["nearest"]
    settings = parts.SCHEMES["- bias"]
    weight_q = optimize_layer(layer, x, bits=3, **settings).weight_q
    lost = (y @ (weight_q - layer.weight).T).square().sum() / (y @ layer.weight.T).square().sum()
    assert found["- bias"] == pytest.approx(float(lost.detach()), rel=1e-4)


def values() -> dict[str, object]:
    """Two networks in one setting: errors of 1, 1/4 and 1/16, and 1, 1/2 and 1/4."""
    runs = [
        {
            "network": "separable",
            "bits": 3,
            "part": "all layers",
            "seed": seed,
            "scores": {
                name: {"accuracy": 50.0 + rung, "loss": 1.0, "error": factor**rung}
                for rung, name in enumerate(("nearest", "own 16", "own 128", "full"))
            },
        }
        for seed, factor in enumerate((0.25, 0.5))
    ]
    return {"runs": runs}


def test_shares_of_errors() -> None:
    found = values()
    setting = Setting("separable", 3)
    assert comparison.settings_of(found) == [setting]
    assert comparison.of(found, setting, "own 16", "error") == [0.25, 0.5]
    assert comparison.saved(found, "own 16", "nearest") == [0.75, 0.5]
    assert comparison.saved(found, "own 16", "nearest", "first layer") == []
    assert data.share_regained(found, "own 16", "own 128") == pytest.approx([0.5, 0.5])
    claim = comparison.claim(found, Text("a", "b"), "own 16", "nearest", 0.9)
    assert claim.verdict == "reproduced" and list(claim.effects) == [0.75, 0.5]
    assert "0.375 (51.00 %)" in claim.here.en and "1 (50.00 %)" in claim.here.en
    other = comparison.claim(found, Text("a", "b"), "nearest", "own 16", 0.9)
    assert other.verdict == "not seen here"


def test_a_table_of_schemes() -> None:
    titles = {"nearest": Text("nearest", "最近"), "own 16": Text("ours", "本库")}
    table = comparison.table("t", "title", titles, {"nearest": "23.99"}, values())
    assert [len(row) for row in table.rows] == [len(table.header)] * 3
    assert [row[1] for row in table.rows] == ["69.68", "23.99", "-"]
    mean, error = statistics.fmean([0.25, 0.5]), 0.125
    assert table.rows[2][-1] == f"{mean:.2f} ± {error:.2f}"


def test_ratios_over_layers_and_draws() -> None:
    layers = [
        {"bits": 4, "layer": name, "draw": draw, "errors": {"nearest": 2.0, "gram": value}}
        for draw, pair in enumerate(((1.0, 0.25), (2.0, 2.0)))
        for name, value in zip("ab", pair, strict=True)
    ]
    assert parts.ratios({"layers": layers}, 4, "gram") == pytest.approx([0.25, 1.0])


def test_only_the_first_layer_of_a_network_is_quantized(task: LayerTask) -> None:
    setting = Setting("separable", 2, "first layer")
    (run,) = comparison.compare(
        "test", {"nearest": relaxations.nearest_}, [setting], 1, shifts=0, epochs=0
    )
    model = network("separable", 0, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    relaxations.nearest_(model, setting, 0)
    changed = {name for name, value in model.state_dict().items() if not value.equal(before[name])}
    assert changed == {"conv.weight"}
    assert len(model.conv.weight.unique()) <= 4
    assert run["scores"]["full"]["error"] == 0 < run["scores"]["nearest"]["error"]


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_what_is_shown_of_committed_results(name: str, tmp_path: Path) -> None:
    experiment, values = EXPERIMENTS[name], cli.read(cli.RESULTS / f"{name}.json")
    assert values is not None
    for table in experiment.tables(values):
        assert {len(row) for row in table.rows} == {len(table.header)}
    for claim in experiment.claims(values):
        assert len(claim.effects) >= 3 and claim.expected > 0
        assert re.search(r"\d", claim.paper.en) and re.search(r"\d", claim.here.zh)
    pictures.save(experiment, values, tmp_path / "picture.svg")
    assert "<svg" in (tmp_path / "picture.svg").read_text()
