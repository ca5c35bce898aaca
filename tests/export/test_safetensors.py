"""Our own format: what comes back is what was saved, bit by bit."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, load_quantized, save_quantized
from adaround_ext.activations.hooks import quantizers
from adaround_ext.export.manifest import NAME
from adaround_ext.export.packed.save import save_codes
from adaround_ext.export.packed.stored import FILE
from adaround_ext.export.quantized_layers import quantized_layers
from adaround_ext.result import QuantizedWeight
from tests.support.export_models import Tied, convolutional, quantized, tied

pytestmark = pytest.mark.usefixtures("one_thread")

GROUPS = {"granularity": "per_group", "group_size": 2, "symmetric": False}
SETTINGS = [
    pytest.param({"bits": 4}, id="4"),
    pytest.param({"bits": 2, "granularity": "per_tensor"}, id="2-tensor"),
    pytest.param({"bits": 3, **GROUPS}, id="3-groups-asymmetric"),
    pytest.param({"bits": 8, "symmetric": False}, id="8-asymmetric"),
    pytest.param({"bits": 5, "scale_dtype": torch.float16}, id="5-half-scales"),
]


def fresh(make: Callable[[], tuple[nn.Module, Tensor]]) -> nn.Module:
    """The class with other weights."""
    model, _ = make()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def assert_same(got: nn.Module, want: nn.Module) -> None:
    """All state, its names, and the codes are the same, bit by bit."""
    states = got.state_dict(), want.state_dict()
    assert list(states[0]) == list(states[1])
    for key in states[1]:
        assert torch.equal(states[0][key], states[1][key]), key
    for left, right in zip(quantized_layers(got), quantized_layers(want), strict=True):
        assert (left.names, left.bits) == (right.names, right.bits)
        for name in ("codes", "scale", "zero_point"):
            assert torch.equal(getattr(left.weight, name), getattr(right.weight, name)), name
            assert getattr(left.weight, name).dtype == getattr(right.weight, name).dtype


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make", [convolutional, tied])
def test_round_trip(
    make: Callable[[], tuple[nn.Module, Tensor]], settings: dict[str, Any], tmp_path: Path
) -> None:
    model, x = make()
    quantized(model, x, **settings)
    before = copy.deepcopy(model)
    save_quantized(model, tmp_path / "saved")
    assert_same(model, before)
    target = fresh(make)
    if isinstance(target, Tied):
        target.factor.copy_(model.factor)  # a constant, which is no state
    assert load_quantized(tmp_path / "saved", target) is target
    assert_same(target, model)
    got, want = target.eval()(x), model(x)
    for left, right in zip(*(torch.utils._pytree.tree_leaves(y) for y in (got, want)), strict=True):
        assert torch.equal(left, right)


def test_new_biases_and_activation_quantizers(tmp_path: Path) -> None:
    def make() -> nn.Module:
        torch.manual_seed(4)
        return nn.Sequential(nn.Linear(8, 8, bias=False), nn.ReLU(), nn.Linear(8, 3, bias=False))

    x = torch.randn(64, 8)
    settings = {"bias": "create", "activations": ActivationConfig(bits=6, symmetric=True)}
    model = quantized(make(), x, **settings)
    assert quantizers(model) and all(
        layer.module.bias is not None for layer in quantized_layers(model)
    )
    save_quantized(model, tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved", make())
    assert_same(loaded, model)
    assert torch.equal(loaded(x), model(x))
    assert {n: (q.bits, q.symmetric, q.ready) for n, q in quantizers(loaded).items()} == {
        n: (6, True, True) for n in quantizers(model)
    }
    # Once more into the same: there are the quantizers already.
    assert_same(load_quantized(tmp_path / "saved", loaded), model)
    other = quantized(make(), x, activations=ActivationConfig(bits=8), overrides={"2": "skip"})
    with pytest.raises(ValueError, match="model must have no activation quantizers, or those"):
        load_quantized(tmp_path / "saved", other)


@pytest.mark.parametrize("bits", range(2, 9))
def test_payload_is_dense(bits: int, tmp_path: Path) -> None:
    model = quantized(nn.Sequential(nn.Linear(100, 37)), torch.randn(256, 100), bits=bits)
    save_quantized(model, tmp_path / "saved")
    tensors = safetensors.torch.load_file(tmp_path / "saved" / FILE)
    assert tensors["codes/0"].shape == (37, -(-100 * bits // 8))
    assert set(tensors) == {"codes/0", "scale/0", "bias/0"}
    assert tensors["scale/0"].shape == (37, 1)


def test_scales_take_the_shortest_exact_dtype(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = quantized(nn.Sequential(nn.Linear(12, 9)), torch.randn(64, 12), scale_dtype=dtype)
        save_quantized(model, tmp_path / str(dtype))
        tensors = safetensors.torch.load_file(tmp_path / str(dtype) / FILE)
        assert tensors["scale/0"].dtype == dtype


def test_scales_below_the_smallest_normal_number(tmp_path: Path) -> None:
    def make() -> tuple[nn.Module, Tensor]:
        layer = nn.Linear(16, 8)
        layer.weight.data *= 1e-3
        return nn.Sequential(layer), torch.randn(64, 16)

    model, x = make()
    quantized(model, x, bits=4, scale_dtype=torch.float16)
    assert float(model[0].quantized_weight.scale.max()) < 2**-14
    save_quantized(model, tmp_path / "saved")
    assert safetensors.torch.load_file(tmp_path / "saved" / FILE)["scale/0"].dtype == torch.float16
    assert_same(load_quantized(tmp_path / "saved", fresh(make)), model)


class Reused(nn.Module):
    """A convolution and its batch norm, reached by two names."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
        self.two = self.one

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x))


def test_modules_with_several_names(tmp_path: Path) -> None:
    model = quantized(Reused(), torch.randn(32, 4, 3, 3))
    assert isinstance(model.one[1], nn.Identity)
    save_quantized(model, tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved", Reused())
    assert isinstance(loaded.two[1], nn.Identity)
    assert_same(loaded, model)


def test_codes_alone_belong_to_their_model(tmp_path: Path) -> None:
    model, x = tied()
    base = copy.deepcopy(model)
    quantized(model, x)
    save_quantized(model, tmp_path / "codes", complete=False)
    assert not [k for k in safetensors.torch.load_file(tmp_path / "codes" / FILE) if "state" in k]
    assert_same(load_quantized(tmp_path / "codes", copy.deepcopy(base)), model)
    with torch.no_grad():
        base.embedding.weight[0, 0] += 1
    before = copy.deepcopy(base.state_dict())
    with pytest.raises(ValueError, match="structure and other parameters of the Tied saved"):
        load_quantized(tmp_path / "codes", base)
    assert all(torch.equal(before[key], value) for key, value in base.state_dict().items())


def test_the_current_directory_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = tied()
    quantized(model, x)
    (tmp_path / "here").mkdir(mode=0o700)
    monkeypatch.chdir(tmp_path / "here")
    save_quantized(model, ".")
    assert Path(NAME).exists()
    assert Path(".").stat().st_mode & 0o777 == 0o700
    assert Path(FILE).stat().st_mode == Path(NAME).stat().st_mode  # that of the umask
    assert_same(load_quantized(".", tied()[0]), model)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_models_of_inference_mode_are_refused(tmp_path: Path) -> None:
    model, x = convolutional()
    quantized(model, x)
    save_quantized(model, tmp_path / "saved")
    with torch.inference_mode():
        target, _ = convolutional()
    with pytest.raises(ValueError, match="model must not be made in inference_mode"):
        load_quantized(tmp_path / "saved", target)
    assert isinstance(target[1], nn.BatchNorm2d)


def test_codes_beside_other_files(tmp_path: Path) -> None:
    model, x = tied()
    base = copy.deepcopy(model)
    quantized(model, x)
    (tmp_path / "notes.txt").write_text("of somebody else")
    save_codes(model, tmp_path)
    (tmp_path / "notes.txt").write_text("changed")
    assert_same(load_quantized(tmp_path, base), model)


def test_weights_follow_the_model_to_its_device(tmp_path: Path, device: torch.device) -> None:
    model, x = convolutional()
    quantized(model.to(device), x.to(device))
    save_quantized(model, tmp_path / "saved")
    loaded = load_quantized(tmp_path / "saved", fresh(convolutional).to(device))
    for layer in quantized_layers(loaded):
        weight = layer.module.quantized_weight
        assert isinstance(weight, QuantizedWeight)
        assert weight.codes.device.type == device.type
    assert_same(loaded, model)


def test_sidecar_reads_well(tmp_path: Path) -> None:
    model, x = tied()
    quantized(model, x, bits=3, **GROUPS)
    save_quantized(model, tmp_path / "saved")
    details = json.loads((tmp_path / "saved" / NAME).read_text())["details"]
    assert details["model"] == "Tied"
    assert details["layers"]["first"] == {
        "names": ["first", "second"],
        "kind": "Linear",
        "shape": [16, 16],
        "dtype": "torch.float32",
        "bits": 3,
        "symmetric": False,
        "granularity": "per_group",
        "scales": [16, 8],
        "scale_dtype": "float32",
        "biases": ["first", "second"],
    }
    assert set(details["versions"]) == {"adaround_ext", "torch"}
    weight = model.first.quantized_weight
    assert dataclasses.replace(weight, bits=3).bits == weight.bits
