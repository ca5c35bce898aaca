"""The quantizer of activations and its settings."""

from __future__ import annotations

import copy
import io
import math
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from adaround_ext.activations.quantizer import ActivationConfig, ActivationQuantizer

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]


def make(low: float, high: float, **settings: Any) -> ActivationQuantizer:
    quantizer = ActivationQuantizer(ActivationConfig(**settings))
    quantizer.set_range(low, high)
    return quantizer


def test_config_round_trip() -> None:
    config = ActivationConfig(bits=4, symmetric=True, ranges="percentile", percentile=99.0)
    assert ActivationConfig.from_dict(config.to_dict()) == config
    assert ActivationConfig.from_dict({}) == ActivationConfig()
    assert hash(config) == hash(ActivationConfig.from_dict(config.to_dict()))
    with pytest.raises(ValueError, match="has no 'bit'; it has bits, symmetric"):
        ActivationConfig.from_dict({"bit": 8})


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"bits": 1}, ValueError, "bits must be from 2 to 16, got 1"),
        ({"bits": 17}, ValueError, "bits must be from 2 to 16, got 17"),
        ({"bits": 8.0}, TypeError, "bits must be an integer, got 8.0"),
        ({"bits": True}, TypeError, "bits must be an integer, got True"),
        ({"symmetric": 1}, ValueError, "symmetric must be True or False, got 1"),
        ({"ranges": "max"}, ValueError, "ranges must be mse, min_max, percentile, got 'max'"),
        ({"percentile": 101}, ValueError, "percentile must be from 50.0 to 100.0, got 101"),
        ({"percentile": math.nan}, ValueError, "percentile must be from 50.0 to 100.0, got nan"),
        ({"percentile": "99"}, TypeError, "percentile must be a number, got '99'"),
    ],
)
def test_config_errors(settings: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ActivationConfig(**settings)


def test_numbers_by_hand() -> None:
    """[-1, 3] in 4 bits: s = 4 / 15, z = round(3.75) = 4."""
    quantizer = make(-1.0, 3.0, bits=4)
    assert float(quantizer.scale) == pytest.approx(4 / 15)
    assert int(quantizer.zero_point) == 4
    step = 4 / 15
    x = torch.tensor([-9.0, -1.0, 0.0, 0.49 * step, 0.51 * step, 3.0, 9.0])
    expected = torch.tensor([-4, -4, 0, 0, 1, 11, 11]) * step
    torch.testing.assert_close(quantizer(x), expected)
    signed = make(-1.0, 3.0, bits=4, symmetric=True)
    assert float(signed.scale) == pytest.approx(3 / 7)
    assert int(signed.zero_point) == 0
    expected = torch.tensor([-8, -2, 0, 0, 0, 7, 7]) * (3 / 7)
    torch.testing.assert_close(signed(x), expected)


def test_ties_go_to_even() -> None:
    quantizer = make(0.0, 255.0)
    assert float(quantizer.scale) == 1.0
    x = torch.tensor([0.5, 1.5, 2.5, 3.5])
    assert quantizer(x).tolist() == [0.0, 2.0, 2.0, 4.0]


@pytest.mark.parametrize(("low", "high", "zero_point"), [(0.0, 6.0, 0), (-6.0, 0.0, 255)])
def test_one_sided_ranges_waste_no_code(low: float, high: float, zero_point: int) -> None:
    quantizer = make(low, high)
    assert int(quantizer.zero_point) == zero_point
    assert float(quantizer.scale) == pytest.approx(6 / 255)
    codes = quantizer(torch.linspace(low, high, 4096)) / quantizer.scale
    assert len(codes.round().unique()) == 256
    # Ranges that do not hold 0 are widened.
    assert torch.equal(make(2.0, 6.0).scale, make(0.0, 6.0).scale)
    assert int(make(-6.0, -2.0).zero_point) == 255


@pytest.mark.parametrize("bits", [2, 4, 8, 11, 16])
@pytest.mark.parametrize("symmetric", [False, True])
def test_twice_is_once_and_zero_is_exact(device: torch.device, bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(bits)
    x = torch.randn(3000, generator=generator)
    x = torch.cat([x, torch.linspace(-4, 4, 3001), torch.zeros(1), -torch.zeros(1)]).to(device)
    for exponent in range(-125, 126, 5):
        low, high = (torch.rand(2, generator=generator).add(0.05) * 2.0**exponent).tolist()
        quantizer = make(-low, high, bits=bits, symmetric=symmetric).to(device)
        y = quantizer(x * max(low, high))
        assert torch.isfinite(y).all()
        assert torch.equal(quantizer(y), y)
        assert not y[-2:].any()
        assert len(y.unique()) <= 2**bits


@pytest.mark.parametrize(
    ("dtype", "bits"), [(torch.bfloat16, 8), (torch.float16, 8), (torch.float16, 10)]
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_twice_is_once_in_half_precision(dtype: torch.dtype, bits: int, symmetric: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3000, generator=generator) * 2
    for _ in range(50):
        low, high = (torch.rand(2, generator=generator) * 5 + 0.01).tolist()
        quantizer = make(-low, high, bits=bits, symmetric=symmetric)
        y = quantizer(x.to(dtype))
        assert y.dtype == dtype
        assert torch.equal(quantizer(y), y)


def test_float16_does_not_overflow() -> None:
    quantizer = make(-100.0, 65504.0)
    y = quantizer(torch.tensor([65504.0, -100.0], dtype=torch.float16))
    assert float(quantizer.scale) * (255 - int(quantizer.zero_point)) > 65504
    assert y.isfinite().all()


@pytest.mark.parametrize(
    ("low", "high"),
    [(0.0, 0.0), (1e-45, 1e-45), (-1e-45, 0.0), (-3.4e38, 3.4e38), (0.0, 3.4e38), (5.0, 5.0)],
)
@pytest.mark.parametrize("symmetric", [False, True])
def test_ranges_at_the_ends_of_float32(low: float, high: float, symmetric: bool) -> None:
    quantizer = make(low, high, symmetric=symmetric)
    scale = float(quantizer.scale)
    assert torch.finfo(torch.float32).smallest_normal <= scale < math.inf
    if low == high == 0.0:
        assert scale == 1.0
    y = quantizer(torch.tensor([low, high, 0.0, 3.4e38, -3.4e38]))
    assert y.isfinite().all()
    assert float(y[2]) == 0.0
    if low == high == 5.0:
        assert float(y[0]) == pytest.approx(5.0, rel=1e-6)


@pytest.mark.parametrize("ends", [(math.nan, 1.0), (0.0, math.inf), (1.0, -1.0)])
def test_bad_ranges(ends: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="low, high must be finite and in this order, got"):
        ActivationQuantizer().set_range(*ends)


def test_what_is_not_floating_point_comes_back() -> None:
    quantizer = make(0.0, 1.0)
    for x in (torch.arange(5), torch.tensor([True, False])):
        assert quantizer(x) is x


def test_nan_stays_and_infinity_is_clipped() -> None:
    y = make(-1.0, 1.0)(torch.tensor([math.nan, math.inf, -math.inf]))
    assert y[0].isnan()
    assert y[1:].abs().max() < 1.01


def test_dtypes_and_shapes() -> None:
    quantizer = make(-1.0, 1.0)
    x = torch.randn(2, 3, 4, dtype=torch.float64)
    assert quantizer(x).dtype == torch.float64
    assert torch.equal(quantizer(x), quantizer(x.float()).double())
    assert torch.equal(quantizer(x.mT), quantizer(x).mT)
    assert quantizer(x[:0]).shape == (0, 3, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(quantizer(x.float()), quantizer(x).float())


def test_enabled_and_no_range() -> None:
    quantizer = ActivationQuantizer()
    x = torch.randn(5)
    assert not quantizer.ready
    with pytest.raises(RuntimeError, match="has no range yet"):
        quantizer(x)
    quantizer.enabled = False
    assert quantizer(x) is x
    quantizer.enabled = True
    quantizer.set_range(-1, 1)
    assert quantizer.ready
    assert not torch.equal(quantizer(x), x)


def test_observer_sees_what_goes_through() -> None:
    quantizer, seen = ActivationQuantizer(), []
    quantizer.observer = seen.append
    x = torch.randn(5)
    assert quantizer(x) is x
    assert seen[0] is x
    quantizer(torch.arange(3))
    assert len(seen) == 1


def test_repr() -> None:
    assert repr(ActivationQuantizer()) == ("ActivationQuantizer(bits=8, symmetric=False, no range)")
    assert repr(make(-1.0, 3.0, bits=4)) == (
        "ActivationQuantizer(bits=4, symmetric=False, scale=0.266667, zero_point=4)"
    )


def test_state_dict_brings_bits_and_sign() -> None:
    quantizer = make(-1.0, 3.0, bits=4, symmetric=True)
    state = quantizer.state_dict()
    assert sorted(state) == ["qmax", "qmin", "scale", "zero_point"]
    assert state["scale"].dtype == torch.float32
    assert state["zero_point"].dtype == torch.int32
    other = ActivationQuantizer(ActivationConfig(ranges="min_max"))
    other.load_state_dict(state)
    assert (other.bits, other.symmetric, other.config.ranges) == (4, True, "min_max")
    assert repr(other) == repr(quantizer)
    x = torch.randn(50)
    assert torch.equal(other(x), quantizer(x))
    other.load_state_dict(ActivationQuantizer().state_dict())
    assert not other.ready


@pytest.mark.parametrize("way", ["deepcopy", "pickle", "save"])
def test_copies(way: str) -> None:
    quantizer = make(-1.0, 3.0, bits=5)
    quantizer.enabled = False
    if way == "deepcopy":
        other = copy.deepcopy(quantizer)
    elif way == "pickle":
        other = pickle.loads(pickle.dumps(quantizer))
    else:
        file = io.BytesIO()
        torch.save(quantizer, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    assert repr(other) == repr(quantizer)
    assert not other.enabled
    quantizer.set_range(-2, 2)
    other.enabled = quantizer.enabled = True
    x = torch.randn(50)
    assert torch.equal(other(x), make(-1.0, 3.0, bits=5)(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_scale_is_not_rounded_with_the_model(device: torch.device, dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(3, 3), make(-1.0, 3.0)).to(device)
    scale = model[1].scale.clone()
    for change in (model.to, model.type):
        change(dtype)
        assert model[0].weight.dtype == dtype
        assert model[1].scale.dtype == torch.float32
        assert torch.equal(model[1].scale, scale)
        assert model[1].zero_point.dtype == torch.int32
        assert model(torch.randn(2, 3, device=device, dtype=dtype)).dtype == dtype
    model.cpu()
    assert model[1].scale.device.type == "cpu"


def test_meta_and_back() -> None:
    quantizer = make(-1.0, 3.0).to("meta")
    assert "no range" in repr(quantizer)
    quantizer.to_empty(device="cpu")
    quantizer.load_state_dict(make(-1.0, 3.0).state_dict())
    assert repr(quantizer) == repr(make(-1.0, 3.0))
