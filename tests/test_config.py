"""AdaRoundConfig: every field's rule, the way to JSON and back, overrides."""

from __future__ import annotations

import dataclasses
import inspect
import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, optimize_layer, quantize_, sensitivity
from adaround_ext.config import ACTIVATIONS, make_config

FIELDS = {field.name for field in dataclasses.fields(AdaRoundConfig)}
WRONG_VALUES = [
    ("preset", "slow"),
    ("preset", None),
    ("bits", 1),
    ("bits", 9),
    ("symmetric", 1),
    ("narrow_range", 1),
    ("granularity", "per_row"),
    ("group_size", 0),
    ("scale", "max"),
    ("scale", 0.5),
    ("scale", torch.ones(4, 1, device="meta")),
    ("scale", torch.ones(4, 1, dtype=torch.complex64)),
    ("scale_candidates", 0),
    ("scale_dtype", torch.float64),
    ("scale_dtype", "float32"),
    ("bias", True),
    ("bias", "drop"),
    ("objective", "hessian"),
    ("activation", "tanh"),
    ("activation", ["relu"]),
    ("positions", 0),
    ("damping", -0.01),
    ("damping", float("inf")),
    ("starts", ()),
    ("starts", "gptq"),
    ("starts", ("gptq", "floor")),
    ("search_steps", -1),
    ("search_steps", 2**23 + 1),
    ("rounds", -1),
    ("steps", -1),
    ("batch_size", 0),
    ("learning_rate", 0.0),
    ("learning_rate", float("nan")),
    ("reg_weight", -0.1),
    ("reg_weight", float("inf")),
    ("beta", (20.0, 0.5)),
    ("beta", (20.0, 10.0, 2.0)),
    ("beta", 20.0),
    ("warmup", 1.5),
    ("warmup", -0.1),
    ("scale_free", None),
    ("products", "float16"),
    ("refine", "yes"),
    ("seed", -1),
    ("progress", 2),
]
WRONG_TYPES = [
    ("bits", 4.0),
    ("bits", True),
    ("group_size", 8.0),
    ("positions", "all"),
    ("scale_candidates", 3.0),
    ("damping", "much"),
    ("search_steps", 10.0),
    ("rounds", True),
    ("steps", 1e3),
    ("batch_size", None),
    ("learning_rate", "fast"),
    ("reg_weight", "0.1"),
    ("reg_weight", True),
    ("beta", ("20", 2)),
    ("warmup", None),
    ("seed", None),
]
# Another value than the default of every field, as far as they go together.
CHANGED: dict[str, Any] = {
    "preset": "best",
    "bits": 3,
    "symmetric": False,
    "narrow_range": False,  # goes with symmetric alone
    "granularity": "per_group",
    "group_size": 16,
    "scale": "min_max",
    "scale_candidates": 5,
    "scale_dtype": torch.bfloat16,
    "bias": "keep",
    "objective": "sampled",
    "activation": "gelu",
    "positions": 5,
    "damping": 0.02,
    "starts": ("nearest", "adaround"),
    "search_steps": 70,
    "rounds": 2,
    "steps": 7,
    "batch_size": 9,
    "learning_rate": 0.003,
    "reg_weight": 0.25,
    "beta": (10.0, 3.0),
    "warmup": 0.5,
    "scale_free": False,
    "products": "bfloat16",
    "refine": False,
    "seed": 11,
    "progress": True,
}


def double(x: Tensor) -> Tensor:
    return 2 * x


def test_every_field_is_tested() -> None:
    assert {name for name, _ in WRONG_VALUES} == FIELDS
    assert set(CHANGED) == FIELDS


@pytest.mark.parametrize(("name", "value"), WRONG_VALUES, ids=str)
def test_wrong_value_is_refused(name: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be "):
        AdaRoundConfig(**{name: value})


def test_narrow_range_is_for_symmetric_grids() -> None:
    assert AdaRoundConfig(narrow_range=True) != AdaRoundConfig()
    with pytest.raises(ValueError, match=r"^narrow_range must be False unless symmetric, got True"):
        AdaRoundConfig(narrow_range=True, symmetric=False)


@pytest.mark.parametrize(("name", "value"), WRONG_TYPES, ids=str)
def test_wrong_type_is_refused(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{name} must be "):
        AdaRoundConfig(**{name: value})


def test_message_says_rule_and_what_came() -> None:
    with pytest.raises(ValueError, match=r"^bits must be from 2 to 8, got 9$"):
        AdaRoundConfig(bits=9)
    with pytest.raises(ValueError, match=r"^beta must be at least 1\.0, got 0\.5$"):
        AdaRoundConfig(beta=(20.0, 0.5))


def test_per_group_needs_a_group_size() -> None:
    with pytest.raises(ValueError, match=r"^group_size must be set exactly when .*got None"):
        AdaRoundConfig(granularity="per_group")


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_group_size_of_another_granularity(granularity: Any) -> None:
    with pytest.raises(ValueError, match=r"^group_size must be set exactly when .*got 8"):
        AdaRoundConfig(granularity=granularity, group_size=8)


def test_a_group_size_alone_means_per_group() -> None:
    config = AdaRoundConfig(group_size=8)
    assert config.granularity == "per_group" and AdaRoundConfig().granularity == "per_channel"
    assert config == AdaRoundConfig(granularity="per_group", group_size=8)
    assert AdaRoundConfig.from_dict({"group_size": 8}) == config
    assert AdaRoundConfig.from_dict(config.to_dict()) == config


@pytest.mark.parametrize(
    ("base", "changes", "granularity", "size"),
    [
        ({}, {"group_size": 8}, "per_group", 8),
        ({"granularity": "per_tensor"}, {"group_size": 8}, "per_group", 8),
        ({"granularity": "per_tensor"}, {"group_size": None}, "per_tensor", None),
        ({"group_size": 4}, {"group_size": 8}, "per_group", 8),
        ({"group_size": 4}, {"group_size": None}, "per_channel", None),
        ({"group_size": 4}, {"granularity": "per_channel"}, "per_channel", None),
        ({"group_size": 4}, {"granularity": "per_tensor"}, "per_tensor", None),
        ({"group_size": 4}, {"granularity": "per_group"}, "per_group", 4),
        ({"group_size": 4}, {"bits": 3}, "per_group", 4),
        ({"granularity": "per_tensor"}, {"bits": 3}, "per_tensor", None),
    ],
)
def test_changes_of_groups(
    base: dict[str, Any], changes: dict[str, Any], granularity: str, size: int | None
) -> None:
    config = make_config(AdaRoundConfig(**base), changes)
    assert (config.granularity, config.group_size) == (granularity, size)


def test_gram_objective_refuses_an_activation() -> None:
    with pytest.raises(ValueError, match=r"^objective must be .*got 'gram'"):
        AdaRoundConfig(objective="gram", activation="relu")


@pytest.mark.parametrize("settings", [{"objective": "sampled"}, {"activation": "relu"}], ids=str)
def test_a_bias_is_created_under_the_gram_objective_only(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"^bias must be refit or keep .*got 'create'"):
        AdaRoundConfig(bias="create", **settings)


def test_edges_of_the_ranges_are_allowed() -> None:
    AdaRoundConfig(bits=2, steps=0, warmup=0.0, reg_weight=0.0, beta=(1.0, 1.0), seed=0)
    AdaRoundConfig(search_steps=2**23, rounds=0, damping=0.0, scale_candidates=1, bias="create")
    AdaRoundConfig(bits=8, warmup=1.0, positions=1, batch_size=1, learning_rate=1e-300)


def test_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        AdaRoundConfig().bits = 3  # type: ignore[misc]


def test_beta_may_be_a_list_of_integers() -> None:
    assert AdaRoundConfig(beta=[10, 2]).beta == (10.0, 2.0)  # type: ignore[arg-type]


def test_starts_may_be_a_list() -> None:
    assert AdaRoundConfig(starts=["gptq"]).starts == ("gptq",)  # type: ignore[arg-type]


def test_activation_function() -> None:
    assert AdaRoundConfig().activation_function is None
    assert AdaRoundConfig(activation=double).activation_function is double
    x = torch.linspace(-9, 9, 41)
    modules = {
        "relu": torch.nn.ReLU(),
        "relu6": torch.nn.ReLU6(),
        "gelu": torch.nn.GELU(),
        "silu": torch.nn.SiLU(),
    }
    assert set(modules) == set(ACTIVATIONS)
    for name, module in modules.items():
        function = AdaRoundConfig(activation=name).activation_function
        assert function is not None
        torch.testing.assert_close(function(x), module(x), rtol=0, atol=0)


@pytest.mark.parametrize("values", [{}, CHANGED], ids=["defaults", "changed"])
def test_dict_round_trip_through_json(values: dict[str, Any]) -> None:
    config = AdaRoundConfig(**values)
    plain = config.to_dict()
    assert set(plain) == FIELDS
    back = AdaRoundConfig.from_dict(json.loads(json.dumps(plain)))
    assert back == config
    assert {name: getattr(back, name) for name in values} == values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_tensor_scale_survives_json(device: torch.device, dtype: torch.dtype) -> None:
    scale = torch.rand(3, 2, device=device).to(dtype) + 0.1
    config = AdaRoundConfig(scale=scale, granularity="per_group", group_size=4)
    back = AdaRoundConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert isinstance(back.scale, Tensor)
    assert torch.equal(back.scale, scale.double().cpu())
    assert back == config


def test_callable_activation_cannot_be_written() -> None:
    with pytest.raises(ValueError, match=r"^activation must be a name"):
        AdaRoundConfig(activation=double).to_dict()


def test_from_dict_refuses_unknown_keys_and_wrong_values() -> None:
    with pytest.raises(ValueError, match=r"has no 'bitz'; it has .*bits"):
        AdaRoundConfig.from_dict({"bitz": 4})
    with pytest.raises(ValueError, match=r"^scale_dtype must be .*got 'float128'"):
        AdaRoundConfig.from_dict({"scale_dtype": "float128"})
    with pytest.raises(ValueError, match=r"^bits must be "):
        AdaRoundConfig.from_dict({"bits": 77})


def test_from_dict_leaves_its_argument_alone() -> None:
    plain = AdaRoundConfig(scale=torch.ones(2, 1)).to_dict()
    before = json.dumps(plain)
    AdaRoundConfig.from_dict(plain)
    assert json.dumps(plain) == before


@pytest.mark.parametrize(
    "name", sorted(set(CHANGED) - {"granularity", "group_size", "narrow_range"})
)
def test_each_field_counts_for_equality(name: str) -> None:
    assert AdaRoundConfig(**{name: CHANGED[name]}) != AdaRoundConfig()


def test_equality_and_hash() -> None:
    assert AdaRoundConfig() != "AdaRoundConfig"
    twins = [
        (AdaRoundConfig(**CHANGED), AdaRoundConfig(**CHANGED)),
        (AdaRoundConfig(warmup=0), AdaRoundConfig(warmup=0.0)),
        (AdaRoundConfig(activation=double), AdaRoundConfig(activation=double)),
        (AdaRoundConfig(scale=torch.ones(2, 1)), AdaRoundConfig(scale=torch.ones(2, 1).double())),
    ]
    for one, other in twins:
        assert one == other
        assert hash(one) == hash(other)
    assert AdaRoundConfig(scale=torch.ones(2, 1)) != AdaRoundConfig(scale=torch.ones(1, 2))
    assert len({AdaRoundConfig(), AdaRoundConfig(bits=3), AdaRoundConfig()}) == 2


def test_make_config() -> None:
    base = AdaRoundConfig(bits=3, steps=5)
    assert make_config(None, {}) == AdaRoundConfig()
    assert make_config(base, {}) == base
    assert make_config(base, {"steps": 6}) == AdaRoundConfig(bits=3, steps=6)
    assert base.steps == 5
    with pytest.raises(TypeError, match=r"'bitz' is no setting; did you mean bits\? \(the "):
        make_config(base, {"bitz": 4})
    with pytest.raises(TypeError, match="config must be an AdaRoundConfig, got dict"):
        make_config({"bits": 4}, {})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^bits must be "):
        make_config(base, {"bits": 1})


@pytest.mark.parametrize(
    ("function", "name", "meant"),
    [
        (quantize_, "overide", "overrides"),
        (quantize_, "Overrides", "overrides"),
        (quantize_, "check_point_dir", "checkpoint_dir"),
        (quantize_, "bit", "bits"),
        (quantize_, "groupsize", "group_size"),
        (sensitivity, "avg_bits", "average_bits"),
        (sensitivity, "filter", "filter_fn"),
        (sensitivity, "preset_", "preset"),
        (optimize_layer, "target", "targets"),
        (optimize_layer, "symetric", "symmetric"),
    ],
)
def test_misspelt_keywords(function: Callable[..., Any], name: str, meant: str) -> None:
    """The nearest name first, and then all others that the function takes."""
    with pytest.raises(TypeError) as caught:
        function(nn.Linear(2, 2), [torch.ones(1, 2)], **{name: 1})
    said = str(caught.value)
    start = f"'{name}' is no setting; did you mean {meant}? (the arguments and settings of "
    assert said.startswith(f"{start}{function.__name__} are {meant}, ")
    listed = said.removesuffix(")").partition(" are ")[2].split(", ")
    parameters = inspect.signature(function).parameters.values()
    own = {
        parameter.name for parameter in parameters if parameter.kind is not parameter.VAR_KEYWORD
    }
    assert sorted(listed) == sorted(FIELDS | own)


def test_a_keyword_like_no_other() -> None:
    with pytest.raises(TypeError, match=r"^'zzz' is no setting; the arguments and settings of q"):
        quantize_(nn.Linear(2, 2), [torch.ones(1, 2)], zzz=1)
