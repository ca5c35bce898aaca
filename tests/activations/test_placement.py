"""Where quantizers of activations go in networks of several kinds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adaround_ext.activations.placement import Place, Placement, Site, place
from adaround_ext.tracing.evaluation import evaluation
from adaround_ext.tracing.trace import trace
from tests.support.activation_models import (
    BasicBlock,
    Children,
    Mixed,
    PostNorm,
    PreNorm,
    Residual,
    ResNet,
    Reused,
    Separable,
    Transformer,
    placement_of,
)

pytestmark = pytest.mark.usefixtures("one_thread")


def readers(placement: Placement) -> dict[str, tuple[str, ...]]:
    return {item.name: item.readers for item in placement.places}


@pytest.mark.parametrize("first", [False, True])
def test_residual_network(first: bool) -> None:
    """The shortcut with fewer layers, whichever branch is computed first."""
    plan = placement_of(ResNet(first), torch.randn(2, 3, 9, 9))
    assert readers(plan) == {
        "stem.0.input_quantizer": ("stem.0",),
        "layer1.0.input_quantizer": ("layer1.0.conv1", "layer1.0"),
        "layer1.0.conv2.input_quantizer": ("layer1.0.conv2",),
        "layer1.1.conv1.input_quantizer": (
            ("layer1.1.downsample.0", "layer1.1.conv1")
            if first
            else ("layer1.1.conv1", "layer1.1.downsample.0")
        ),
        "layer1.1.conv2.input_quantizer": ("layer1.1.conv2",),
        "layer1.1.downsample.1.output_quantizer": ("layer1.1",),
        "fc.input_quantizer": ("fc",),
    }
    assert plan.notes == ()
    by_name = {item.name: item for item in plan.places}
    assert by_name["layer1.1.conv1.input_quantizer"].sites == (
        Site("layer1.1.conv1", "input"),
        Site("layer1.1.downsample.0", "input"),
    )


def test_places_are_in_the_order_of_execution() -> None:
    plan = placement_of(ResNet(), torch.randn(2, 3, 9, 9))
    assert [item.name.rsplit(".", 1)[0] for item in plan.places] == [
        "stem.0", "layer1.0", "layer1.0.conv2", "layer1.1.conv1", "layer1.1.conv2",
        "layer1.1.downsample.1", "fc",
    ]  # fmt: skip


def test_pre_norm_transformer() -> None:
    """q, k and v share; no module makes or takes the second sum's shortcut."""
    plan = placement_of(Transformer(PreNorm), torch.arange(7)[None])
    by_reader = {item.readers: item for item in plan.places}
    for i in (0, 1):
        block = f"blocks.{i}"
        q, k, v = (f"{block}.attention.{name}" for name in "qkv")
        assert by_reader[q, k, v].sites == tuple(Site(name, "input") for name in (q, k, v))
        assert by_reader[(block,)].sites == (Site(block, "input"),)
        for name in ("attention.o", "up", "down"):
            assert by_reader[(f"{block}.{name}",)].sites == (Site(f"{block}.{name}", "input"),)
        assert plan.notes[i].startswith(f"{block}: the shortcut of a residual addition is neither")
    assert len(plan.places) == 10
    assert len(plan.notes) == 2


def test_post_norm_transformer() -> None:
    """The same value feeds q, k, v and the sum: one quantizer for all, where the norm made it."""
    plan = placement_of(Transformer(PostNorm), torch.arange(7)[None])
    assert plan.notes == ()
    first, second = readers(plan), readers(plan)
    for i in (0, 1):
        block = f"blocks.{i}"
        qkv = tuple(f"{block}.attention.{name}" for name in "qkv")
        assert first[f"{block}.input_quantizer"] == (*qkv, block)
        assert second[f"{block}.norm1.output_quantizer"] == (f"{block}.up", block)
    assert len(plan.places) == 8


def test_separable_network() -> None:
    plan = placement_of(nn.Sequential(Separable(), Separable()), torch.randn(2, 6, 5, 5))
    assert readers(plan)["0.input_quantizer"] == ("0.body.0", "0")
    assert readers(plan)["1.body.2.input_quantizer"] == ("1.body.2",)
    assert len(plan.places) == 6
    assert plan.notes == ()


def test_only_a_sequential() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 6), nn.ReLU(), nn.Linear(6, 3))
    plan = placement_of(model, torch.randn(2, 3, 4))
    assert readers(plan) == {"1.input_quantizer": ("1",), "3.input_quantizer": ("3",)}


def test_containers_with_a_residual() -> None:
    model = Residual(nn.Linear(6, 6), nn.ReLU(), Residual(nn.Linear(6, 6)), Children())
    plan = placement_of(model, torch.randn(2, 6))
    assert readers(plan) == {
        "input_quantizer": ("0", ""),
        "2.input_quantizer": ("2.0", "2"),
        "3.input_quantizer": ("3.a", "3"),
        "3.b.input_quantizer": ("3.b",),
    }


def test_modules_that_run_several_times() -> None:
    plan = placement_of(Reused(), torch.randn(2, 6))
    assert readers(plan) == {
        "layer.input_quantizer": ("layer",),
        "block.input_quantizer": ("block.0", "block"),
    }


def test_a_layer_inside_and_outside_of_a_block() -> None:
    """Its calls outside need a hook of its own: the same quantizer, so that twice is once."""
    model = Mixed()
    plan = placement_of(model, torch.randn(2, 6))
    assert [item.sites for item in plan.places] == [
        (Site("first", "input"),),
        (Site("block", "input"), Site("block.0", "input")),
    ]
    assert plan.places[1].readers == ("block.0", "block")


class _Net(nn.Module):
    """conv1, an activation, and conv2 with a shortcut around it, without a block."""

    def __init__(self, relu: nn.Module) -> None:
        super().__init__()
        self.relu = relu
        self.conv1, self.conv2 = nn.Conv2d(3, 6, 1), nn.Conv2d(6, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.conv1(x))
        return x + self.conv2(x)


def test_output_of_the_module_that_made_it() -> None:
    plan = placement_of(_Net(nn.ReLU()), torch.randn(2, 3, 4, 4))
    assert readers(plan) == {
        "conv1.input_quantizer": ("conv1",),
        "relu.output_quantizer": ("conv2", ""),
    }


def test_a_module_that_also_gives_other_values_is_not_used() -> None:
    class Twice(_Net):
        def forward(self, x: Tensor) -> Tensor:
            return self.relu(super().forward(x))

    plan = placement_of(Twice(nn.ReLU()), torch.randn(2, 3, 4, 4))
    assert "conv2.input_quantizer" in readers(plan)
    assert len(plan.notes) == 1
    assert plan.notes[0].startswith("the model: the shortcut of a residual addition is neither")


def test_a_shortcut_that_was_changed_in_place_is_not_placed_on_a_copy() -> None:
    """The sum reads the tensor itself, not what the in-place module returns."""

    class PreActivation(BasicBlock):
        def forward(self, x: Tensor) -> Tensor:
            out = self.relu(x)
            return x + self.conv2(out)

    model = nn.Sequential(nn.Conv2d(3, 4, 1), PreActivation(4, 4))
    plan = placement_of(model, torch.randn(2, 3, 5, 5))
    assert readers(plan) == {
        "0.input_quantizer": ("0",),
        "1.conv2.input_quantizer": ("1.conv2",),
    }
    assert plan.notes[0] == "1.conv1 did not run: its input has no quantizer"
    assert plan.notes[1].startswith("1: the shortcut of a residual addition is neither")


def test_dropout_and_identity_make_no_value() -> None:
    model = _Net(nn.Sequential(nn.ReLU(), nn.Dropout(), nn.Identity()))
    plan = placement_of(model, torch.randn(2, 3, 4, 4))
    assert "relu.0.output_quantizer" in readers(plan)


def test_second_and_repeated_arguments() -> None:
    class Fused(nn.Module):
        """Where a tensor is among a module's arguments, and how often."""

        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor, *, more: dict[str, Tensor]) -> Tensor:
            return more["skip"] + self.a(x) + self.b(more["again"])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.fused = nn.Linear(6, 6), Fused()

        def forward(self, x: Tensor) -> Tensor:
            y = self.first(x).relu()
            return self.fused(y.tanh(), more={"skip": y, "again": y})

    plan = placement_of(Model(), torch.randn(2, 6))
    place = next(item for item in plan.places if "fused" in item.readers)
    assert place.sites == (Site("fused", "input", (1, 2)),)
    assert place.name == "fused.input_quantizer_1"
    assert place.readers == ("fused", "fused.b")


def test_views_of_the_same_elements_are_one_value() -> None:
    class Views(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)

        def forward(self, x: Tensor) -> Tensor:
            column = x[:, :1]  # other elements
            return self.a(x.view(-1, 6)).sum() + self.b(x).sum() + self.a(column).sum()

    model = Views()
    x = torch.randn(2, 3, 6)
    with evaluation(model):
        plan = place(model, trace(model, lambda: model(x)), [model.a, model.b])
    assert [item.sites for item in plan.places] == [
        (Site("a", "input"), Site("b", "input")),
    ]
    first = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])
    with evaluation(first):
        run = trace(first, lambda: (first[0](x[:, :1]), first[1](x[:, 1:])))
    assert len(place(first, run, list(first)).places) == 2


def test_layers_that_do_not_run_and_strangers() -> None:
    model = nn.Sequential(nn.Linear(6, 6))
    model.idle = nn.Linear(6, 6)
    model.forward = lambda x: model[0](x)  # type: ignore[method-assign]
    x = torch.randn(2, 6)
    plan = placement_of(model, x)
    assert plan.notes == ("idle did not run: its input has no quantizer",)
    assert plan.places == (Place((Site("0", "input"),), ("0",)),)
    with evaluation(model):
        run = trace(model, lambda: model(x))
    with pytest.raises(ValueError, match=r"layers must be modules of the model, got Linear"):
        place(model, run, [nn.Linear(6, 6)])
    assert place(model, run, []) == Placement((), ())
