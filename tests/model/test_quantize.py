"""quantize_: the walk through a model, against the same walk with nothing recorded or replaced."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, ModelReport, quantize_
from tests.support import models

FAST = AdaRoundConfig(preset="fast", bits=3)
pytestmark = pytest.mark.usefixtures("one_thread")


def images(count: int = 3) -> list[Tensor]:
    return [torch.randn(4, 3, 8, 8) for _ in range(count)]


def vectors(count: int = 3) -> list[Tensor]:
    return [torch.randn(16, 8) for _ in range(count)]


def residual_groups() -> list[list[str]]:
    groups = [["stem"]]
    for block in ("blocks.0", "blocks.1"):
        groups += [[f"{block}.conv1"], [f"{block}.conv2"], [f"{block}.down"]]
    return [*groups, ["head"]]


def mixer_groups() -> list[list[str]]:
    groups = []
    for layer in range(3):
        names = [f"layers.{layer}.{name}" for name in ("query", "key", "value")]
        groups += [names, [f"layers.{layer}.output"]]
    return [*groups, ["head"]]


ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]], list[list[str]]]] = {
    "residual": (models.ResidualNet, images, residual_groups()),
    "unet": (
        models.UNet,
        images,
        [
            *([f"down.{i}.{j}"] for i in (0, 1) for j in (0, 2)),
            ["middle"],
            *([f"up.{i}.{j}"] for i in (0, 1) for j in (0, 2)),
        ],
    ),
    "transformer": (
        models.Transformer,
        lambda: [{"ids": models.tokens(4, 6)} for _ in range(3)],
        mixer_groups(),
    ),
    "writing": (
        models.Writing,
        vectors,
        [[f"blocks.{i}.{name}"] for i in range(3) for name in "ab"] + [["head"]],
    ),
    "side door": (models.SideDoor, vectors, [[f"blocks.{i}.{n}"] for i in range(3) for n in "ab"]),
}


def codes(model: nn.Module) -> dict[str, Tensor]:
    """The codes that quantize_ left at the layers."""
    return {
        name: module.quantized_weight.codes
        for name, module in model.named_modules()
        if hasattr(module, "quantized_weight")
    }


@pytest.mark.parametrize("sequential", [True, False], ids=["sequential", "parallel"])
@pytest.mark.parametrize("name", ZOO)
@pytest.mark.usefixtures("one_segment")
def test_as_without_recordings(name: str, sequential: bool) -> None:
    make, data, groups = ZOO[name]
    model, batches = make(), data()
    expected = models.plain_walk(model, copy.deepcopy(batches), groups, FAST, sequential)
    report = quantize_(
        model, batches, FAST, mode="sequential" if sequential else "parallel", progress=False
    )
    assert [entry.name for entry in report.layers] == [n for group in groups for n in group]
    got = codes(model)
    for layer, result in expected.items():
        assert torch.equal(got[layer], result.codes), layer
        module = model.get_submodule(layer)
        # Moments of inputs in the place of targets (Unit.from_inputs) have other last bits.
        torch.testing.assert_close(module.weight, result.weight_q, rtol=1e-5, atol=0)
        if result.bias is not None:
            torch.testing.assert_close(module.bias, result.bias, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ZOO)
@pytest.mark.parametrize("blocks", [[], ["*.0", "blocks.1"]], ids=["none", "some"])
def test_blocks_and_memory_do_not_change_the_result(name: str, blocks: list[str]) -> None:
    make, data, _ = ZOO[name]
    first, batches = make(), data()
    second = copy.deepcopy(first)
    quantize_(first, batches, FAST, progress=False)
    found = [b for b in blocks if any(n == b or b == "*.0" for n, _ in first.named_modules())]
    found = found if any(n.endswith(".0") for n, _ in first.named_modules()) else []
    quantize_(second, iter(batches), FAST, blocks=found, memory_budget=0, progress=False)
    one, two = codes(first), codes(second)
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)


def test_a_block_is_run_for_its_own_layers_only() -> None:
    """A whole block runs once for each stream and batch.

    Before, all runs once for each batch, to see what every layer gets.
    """
    model, batches = models.Transformer(), [{"ids": models.tokens(4, 6)} for _ in range(2)]
    runs = dict.fromkeys(range(3), 0)
    for index, layer in enumerate(model.layers):

        def count(*_: Any, index: int = index) -> None:
            runs[index] += 1

        # Inside the block: what is replaced does not come here.
        layer.norm.register_forward_hook(count)
    quantize_(model, batches, FAST, batch_norm="keep", progress=False)
    # For the trace, and when the next block's first layers are fitted; the last for the head. The
    # first block's outputs in full precision are those of the pass before.
    assert runs == {0: 1 + 2 + 2, 1: 1 + 2 + 4, 2: 1 + 2 + 4}


def test_layers_used_several_times_are_fitted_once() -> None:
    model, batches = models.Reused(), vectors()
    report = quantize_(model, batches, FAST, progress=False)
    assert [(e.name, e.calls, e.tied) for e in report.layers] == [
        ("first", 1, ()),
        ("again", 2, ()),
        ("left", 2, ("right",)),
        ("last", 1, ()),
    ]
    assert model.left.weight is model.right.weight
    assert model.left.quantized_weight is model.right.quantized_weight
    statistics = {e.name: e.report.samples for e in report.layers}
    assert statistics == {"first": 48, "again": 96, "left": 96, "last": 48}
    assert report.layers[2].config["bias"] == "keep"
    assert report.relative_error < report.nearest_error


def test_a_whole_block_used_several_times() -> None:
    model = models.Transformer(repeats=2)
    batches = [{"ids": models.tokens(4, 6)} for _ in range(3)]
    other = copy.deepcopy(model)
    report = quantize_(model, batches, FAST, progress=False)
    assert [e.calls for e in report.layers] == [2] * 12 + [1]
    quantize_(other, batches, FAST, blocks=[], progress=False)
    one, two = codes(model), codes(other)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_data_dependent_routes() -> None:
    model, batches = models.Experts(), [torch.randn(64, 8) for _ in range(3)]
    x = torch.randn(64, 8)
    before = model(x)
    nearest = copy.deepcopy(model)
    report = quantize_(model, batches, bits=4, preset="fast", progress=False)
    assert len(report.layers) == 9
    quantize_(nearest, batches, bits=4, starts=("nearest",), refine=False, bias="keep",
              scale="mse", progress=False)  # fmt: skip
    error = (model(x) - before).square().mean()
    assert error < (nearest(x) - before).square().mean()


def test_padding_is_left_out() -> None:
    """Padded batches give the same statistics as what is in them without padding."""
    torch.manual_seed(1)
    rows = [models.tokens(1, n) for n in (3, 6, 4, 5, 6, 2)]
    padded = [
        {
            "ids": torch.cat([torch.nn.functional.pad(r, (0, 6 - r.shape[1])) for r in rows]),
            "attention_mask": torch.stack([torch.arange(6) < r.shape[1] for r in rows]).long(),
        }
    ]
    plain, masked, unmasked = (models.Transformer() for _ in range(3))
    for model in (masked, unmasked):
        model.load_state_dict(plain.state_dict())
    quantize_(plain, [{"ids": r} for r in rows], FAST, progress=False)
    report = quantize_(masked, padded, FAST, progress=False)
    quantize_(unmasked, padded, FAST, padding_mask=None, progress=False)
    assert {e.report.samples for e in report.layers} == {26}
    close = [(codes(plain)[n] != c).float().mean() for n, c in codes(masked).items()]
    far = [(codes(plain)[n] != c).float().mean() for n, c in codes(unmasked).items()]
    assert sum(close) < 0.02 * len(close) < sum(far)


def test_activation_in_the_loss() -> None:
    model = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4)
    )
    report = quantize_(
        model, vectors(), FAST, activation_aware=True, steps=20, batch_size=16, progress=False
    )
    assert [e.report.objective for e in report.layers] == ["sampled", "sampled", "gram"]
    assert [e.config["activation"] for e in report.layers] == ["relu", "gelu", None]


def test_parallel_in_as_many_passes_as_the_budget_needs() -> None:
    model, batches = models.Transformer(), [{"ids": models.tokens(4, 6)} for _ in range(2)]
    other = copy.deepcopy(model)
    assert quantize_(model, batches, FAST, mode="parallel", progress=False).passes == 1
    report = quantize_(
        other, batches, FAST, mode="parallel", memory_budget=1_200_000, progress=False
    )
    assert 1 < report.passes < 7
    one, two = codes(model), codes(other)
    assert all(torch.equal(one[n], two[n]) for n in one)


def test_report_of_a_model(tmp_path: Any) -> None:
    model = models.Transformer()
    model.head.weight = model.embedding.weight
    report = quantize_(model, [models.tokens(2, 5)], FAST, progress=False)
    assert set(report.skipped) == {"embedding", "head"}
    assert "embedding" in report.skipped["head"]
    assert report.layers[0].shared_inputs == ("layers.0.key", "layers.0.value")
    assert report.layers[0].block == "layers.0"
    assert (report.batches, report.samples) == (1, 2)
    report.save(tmp_path / "report.json")
    assert ModelReport.load(tmp_path / "report.json") == report
