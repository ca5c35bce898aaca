"""Quantizers of activations in a model: put in, observed, copied, taken out."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext.activations.hooks import (
    attach,
    detach,
    full_precision_activations,
    observing,
    quantizers,
)
from adaround_ext.activations.placement import Place, Site
from adaround_ext.activations.quantizer import ActivationConfig, ActivationQuantizer
from tests.support.activation_models import (
    Children,
    Mixed,
    PostNorm,
    PreNorm,
    Residual,
    ResNet,
    Reused,
    Separable,
    Transformer,
    check_reads,
    placement_of,
)

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]

Make = Callable[[], tuple[nn.Module, Tensor]]
MODELS: dict[str, Make] = {
    "resnet": lambda: (ResNet(), torch.randn(16, 3, 9, 9)),
    "resnet, shortcut first": lambda: (ResNet(first=True), torch.randn(16, 3, 9, 9)),
    "pre-norm": lambda: (Transformer(PreNorm), torch.randint(0, 20, (16, 7))),
    "post-norm": lambda: (Transformer(PostNorm), torch.randint(0, 20, (16, 7))),
    "separable": lambda: (
        nn.Sequential(Separable(), nn.ReLU(), Separable()), torch.randn(16, 6, 5, 5)
    ),
    "sequential": lambda: (
        nn.Sequential(nn.Linear(9, 9), nn.ReLU(), nn.Sequential(nn.Linear(9, 9))),
        torch.randn(50, 9),
    ),
    "containers": lambda: (
        Residual(nn.Linear(6, 6), nn.ReLU(), Residual(nn.Sequential(nn.Linear(6, 6))), Children()),
        torch.randn(50, 6),
    ),
    "nested containers": lambda: (
        Residual(nn.Tanh(), Residual(nn.Tanh(), nn.Linear(6, 6))), torch.randn(50, 6)
    ),
    "reused": lambda: (Reused(), torch.randn(50, 6)),
    "mixed": lambda: (Mixed(), torch.randn(50, 6)),
}  # fmt: skip


def attached(name: str, **settings: Any) -> tuple[nn.Module, Tensor]:
    """A model with quantizers that have ranges."""
    model, x = MODELS[name]()
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_var.uniform_(0.5, 2)
    attach(placement_of(model, x).places, model, ActivationConfig(**settings))
    calibrate(model, x)
    return model, x


@torch.no_grad()
def calibrate(model: nn.Module, x: Tensor) -> None:
    with observing(quantizers(model)) as observation:
        for batch in x.split(7):
            model(batch)
    observation.set_ranges()


def state_of(model: nn.Module) -> list[object]:
    """All that attach changes: modules, attributes and hooks, in their order."""
    return [
        (name, type(m), [(key, str(value)) for key, value in sorted(vars(m).items())])
        for name, m in model.named_modules()
    ]


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_attach_and_detach(name: str) -> None:
    model, x = MODELS[name]()
    model.eval()
    before, expected, keys = state_of(model), model(x), list(model.state_dict())
    placement = placement_of(model, x)
    by_name = attach(placement.places, model)
    assert list(by_name) == [place.name for place in placement.places]
    assert set(by_name.values()) == set(quantizers(model).values())
    for quantizer in by_name.values():  # every one is kept with the model's state
        holder = [k for k, m in model.named_modules() if m is quantizer]
        assert f"{holder[0]}.scale" in model.state_dict()
    with pytest.raises(RuntimeError, match="has no range yet"):
        model(x)
    calibrate(model, x)
    assert not torch.equal(model(x), expected)
    with full_precision_activations(model):
        assert torch.equal(model(x), expected)
    with observing(quantizers(model)):
        assert torch.equal(model(x), expected)
    detach(model)
    assert torch.equal(model(x), expected)
    assert state_of(model) == before
    assert list(model.state_dict()) == keys
    detach(model)
    assert state_of(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_all_layers_and_sums_read_quantized_values(name: str) -> None:
    model, x = attached(name)
    check_reads(model, x, missing=2 if name == "pre-norm" else 0)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("ranges", ["mse", "min_max", "percentile"])
@torch.no_grad()
def test_eight_bits_are_accurate(name: str, ranges: str) -> None:
    model, x = attached(name, ranges=ranges)
    y = model(x)
    with full_precision_activations(model):
        expected = model(x)
    assert 0 < float((y - expected).norm() / expected.norm()) < 0.02


@torch.no_grad()
def test_more_bits_are_more_accurate() -> None:
    errors = []
    for bits in (3, 5, 8, 12, 16):
        torch.manual_seed(0)
        model, x = attached("resnet", bits=bits)
        y = model(x)
        with full_precision_activations(model):
            errors.append(float((y - model(x)).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-3 * errors[0]


@torch.no_grad()
def test_the_sum_and_the_layer_get_the_same_bits() -> None:
    model, x = attached("resnet", bits=4)
    block = model.layer1[0]
    seen = {}
    block.register_forward_pre_hook(lambda _, args: seen.update(block=args[0]))
    block.conv1.register_forward_pre_hook(lambda _, args: seen.update(conv=args[0]))
    block.bn2.register_forward_hook(lambda _, args, y: seen.update(main=y.clone()))
    block.register_forward_hook(lambda _, args, y: seen.update(out=y))
    model(x)
    assert seen["conv"] is seen["block"]
    assert len(seen["conv"].unique()) <= 16
    assert torch.equal(seen["out"], (seen["main"] + seen["conv"]).relu())
    # Another block's shortcut is what the downsampling gives.
    block = model.layer1[1]
    block.downsample.register_forward_hook(lambda _, args, y: seen.update(shortcut=y))
    block.conv1.register_forward_pre_hook(lambda _, args: seen.update(conv=args[0]))
    block.downsample[0].register_forward_pre_hook(lambda _, args: seen.update(down=args[0]))
    model(x)
    assert len(seen["shortcut"].unique()) <= 16
    assert torch.equal(seen["down"], seen["conv"])


@torch.no_grad()
def test_what_is_quantized_twice_is_quantized_once() -> None:
    model, x = attached("mixed", bits=4)
    seen: list[Tensor] = []
    for module in (model.block, model.block[0]):
        module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    assert model.block.input_quantizer is model.block[0].input_quantizer
    assert torch.equal(seen[0], seen[1])
    assert len(seen) == 3


def test_sharing() -> None:
    model, _ = attached("pre-norm")
    attention = model.blocks[0].attention
    assert attention.q.input_quantizer is attention.k.input_quantizer
    assert attention.q.input_quantizer is attention.v.input_quantizer
    assert attention.q.input_quantizer is not attention.o.input_quantizer
    assert not hasattr(attention, "input_quantizer")


@torch.no_grad()
def test_ranges_by_hand() -> None:
    """All calls of a module count, and shared values give what one reader would have given."""
    model, x = attached("reused", ranges="min_max")
    second = 3 * model.layer(x).relu()  # what the layer quantizes itself
    with full_precision_activations(model):
        second = 3 * model.layer(x).relu()
    low, high = float(min(x.min(), second.min())), float(max(x.max(), second.max()))
    assert float(model.layer.input_quantizer.scale) == pytest.approx((high - low) / 255)
    ids = torch.randint(0, 20, (16, 7))
    for ranges in ("min_max", "mse", "percentile"):
        transformer = Transformer(PreNorm)
        places = placement_of(transformer, ids).places
        attach(places, transformer, ActivationConfig(ranges=ranges))
        calibrate(transformer, ids)
        with full_precision_activations(transformer):
            block = transformer.blocks[0]
            hidden = block.norm1(transformer.tokens(ids) + transformer.positions)
        alone = Place((Site("", "input"),), ())
        linear = nn.Linear(16, 16)
        attach([alone], linear, ActivationConfig(ranges=ranges))
        calibrate(linear, hidden)
        expected = float(linear.input_quantizer.scale)
        assert float(block.attention.k.input_quantizer.scale) == pytest.approx(expected, rel=1e-5)


@torch.no_grad()
def test_containers_run_no_quantizer_as_a_child() -> None:
    """It is beside the children, and still moves and is saved with the model."""
    model, x = attached("containers")
    for container in (model, model[2]):
        assert not any(isinstance(child, ActivationQuantizer) for child in container.children())
        assert isinstance(container.input_quantizer, ActivationQuantizer)
    assert not any(isinstance(child, ActivationQuantizer) for child in model[3].children())
    names = {q: name for name, q in quantizers(model).items()}
    assert names[model.input_quantizer] == "0.outer_input_quantizer"
    assert names[model[3].input_quantizer] == "3.a.outer_input_quantizer"
    by_hand = model.input_quantizer(x)
    seen = []
    handle = model[0].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(x)
    handle.remove()
    assert torch.equal(seen[0], by_hand)
    nested, _ = attached("nested containers")
    assert set(quantizers(nested)) == {"1.0.outer_input_quantizer", "0.outer_input_quantizer"} | (
        {"1.1.input_quantizer"}
    )


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
@torch.no_grad()
def test_copies_use_their_own_quantizers(name: str, way: str) -> None:
    model, x = attached(name)
    if way == "deepcopy":
        other = copy.deepcopy(model)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    y = model(x)
    assert torch.equal(other(x), y)
    assert list(quantizers(other)) == list(quantizers(model))
    assert not set(quantizers(other).values()) & set(quantizers(model).values())
    for quantizer in quantizers(model).values():
        quantizer.set_range(-0.01, 0.01)
    assert torch.equal(other(x), y)
    assert not torch.equal(model(x), y)
    for quantizer in quantizers(other).values():
        quantizer.set_range(-0.01, 0.01)
    assert torch.equal(other(x), model(x))
    detach(other)
    assert not quantizers(other)
    assert quantizers(model)
    with full_precision_activations(model):
        assert torch.equal(other(x), model(x))
    for module in other.modules():
        assert not module._forward_pre_hooks
        assert not module._forward_hooks


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_state_dict(name: str) -> None:
    model, x = attached(name, bits=6)
    fresh, _ = MODELS[name]()
    fresh.eval()
    attach(placement_of(fresh, x).places, fresh)
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x), model(x))


@torch.no_grad()
def test_devices_and_dtypes(device: torch.device) -> None:
    for name in ("resnet", "containers"):
        model, x = attached(name)
        expected = model(x)
        model.to(device)
        assert {q.scale.device.type for q in quantizers(model).values()} == {device.type}
        torch.testing.assert_close(model(x.to(device)).cpu(), expected, atol=0.1, rtol=0.1)
        model.bfloat16()
        assert {q.scale.dtype for q in quantizers(model).values()} == {torch.float32}
        assert model(x.to(device, torch.bfloat16)).dtype == torch.bfloat16
        detach(model)
        attach(placement_of(model, x.to(device, torch.bfloat16)).places, model)
        assert {q.scale.device.type for q in quantizers(model).values()} == {device.type}
        calibrate(model, x.to(device, torch.bfloat16))
        assert model(x.to(device, torch.bfloat16)).isfinite().all()


def test_errors_change_nothing() -> None:
    model, x = MODELS["resnet"]()
    places = placement_of(model, x).places
    model.fc.input_quantizer = None
    before = state_of(model)
    with pytest.raises(ValueError, match="fc already has 'input_quantizer'"):
        attach(places, model)
    assert state_of(model) == before
    del model.fc.input_quantizer
    with pytest.raises(ValueError, match="places must be of this model, which has no 'nowhere'"):
        attach([*places, Place((Site("nowhere", "input"),), ())], model)
    attach(places, model)
    with pytest.raises(ValueError, match=r"stem\.0 already has 'input_quantizer'"):
        attach(places, model)


@torch.no_grad()
def test_observing() -> None:
    model, x = attached("sequential", ranges="min_max")
    by_name = quantizers(model)
    first = model[0].input_quantizer
    scale = first.scale.clone()
    # Without set_ranges nothing changes; errors leave no observer behind.
    with pytest.raises(ZeroDivisionError), observing(by_name):
        model(10 * x)
        raise ZeroDivisionError
    assert torch.equal(first.scale, scale)
    assert first.observer is None
    # Only what is selected counts.
    with observing(by_name, select=lambda name, t: t[:3]) as observation:
        model(x)
    observation.set_ranges()
    expected = float(x[:3].max() - x[:3].min()) / 255
    assert float(first.scale) == pytest.approx(expected)
    # Some of them, while the others quantize.
    second = {"second": model[2][0].input_quantizer}
    with observing(second) as observation:
        y = model[:2](x)
        model(x)
    observation.set_ranges()
    assert float(second["second"].scale) == pytest.approx(float(y.max()) / 255)
    # One that saw nothing: no range changes.
    scales = [q.scale.clone() for q in by_name.values()]
    with observing(by_name) as observation:
        model[0](5 * x)
    with pytest.raises(ValueError, match=r"activations at 2\.0\.input_quantizer must hold a value"):
        observation.set_ranges()
    assert all(torch.equal(q.scale, s) for q, s in zip(by_name.values(), scales, strict=True))
    bad = x.clone()
    bad[0, :2] = torch.nan
    message = "activations at 0.input_quantizer must be finite in float32, got 2 NaN"
    with pytest.raises(ValueError, match=message), observing(by_name):
        model(bad)


@torch.no_grad()
def test_full_precision_restores_each() -> None:
    model, _ = attached("sequential")
    first, second = quantizers(model).values()
    first.enabled = False
    with pytest.raises(ZeroDivisionError), full_precision_activations(model):
        assert not second.enabled
        raise ZeroDivisionError
    assert not first.enabled
    assert second.enabled


@torch.no_grad()
def test_arguments_and_outputs_of_any_form() -> None:
    class Pair(nn.Module):
        def forward(self, x: Tensor, *, more: dict[str, Any]) -> dict[str, Any]:
            assert more["skip"] is more["again"]
            return {"none": None, "list": [x, more["skip"], more["number"]]}

    pair = Pair()
    sites = Site("", "input", (1, 2)), Site("", "output", (0,))
    attach([Place(sites, ())], pair)
    quantizer = pair.input_quantizer_1
    assert quantizer is pair.output_quantizer
    quantizer.set_range(0.0, 255.0)
    x, y = torch.tensor([1.2]), torch.tensor([3.4])
    outputs = pair(x, more={"skip": y, "again": y, "number": 5})
    assert outputs["none"] is None
    assert [float(outputs["list"][i]) for i in (0, 1)] == [1.0, 3.0]
    assert outputs["list"][2] == 5
    assert (float(x), float(y)) == (pytest.approx(1.2), pytest.approx(3.4))
