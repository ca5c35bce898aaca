"""Settings of :func:`adaround_ext.optimize_layer`, and their rules."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from adaround_ext.checks import (
    Check,
    check_flag,
    check_number,
    choice,
    fail,
    integer,
    nearest_first,
    number,
    or_none,
    refuse_unknown,
    suggestion,
)

Granularity = Literal["per_tensor", "per_channel", "per_group"]

Start = Literal["nearest", "gptq", "adaround"]

_STARTS = ("nearest", "gptq", "adaround")
_SCALES = ("gram", "mse", "min_max")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "relu6": torch.nn.functional.relu6,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}
_MAX_SEARCH_STEPS = 1 << 23  # the tabu search counts them in float32
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def _check_scale(name: str, value: Any) -> None:
    if not isinstance(value, Tensor) and value not in _SCALES:
        fail(name, f"{', '.join(_SCALES)} or a tensor", value)
    if isinstance(value, Tensor) and (value.is_meta or value.is_complex()):
        fail(name, "a tensor of real numbers", value)


def _check_scale_dtype(name: str, value: Any) -> None:
    if value not in SCALE_DTYPES:
        fail(name, "float32, float16 or bfloat16", value)


def _check_activation(name: str, value: Any) -> None:
    if not (value is None or callable(value)) and value not in list(ACTIVATIONS):
        fail(name, f"None, {', '.join(ACTIVATIONS)} or a callable", value)


def _check_starts(name: str, value: Any) -> None:
    if (
        not isinstance(value, (tuple, list))
        or not value
        or any(start not in _STARTS for start in value)
    ):
        fail(name, f"a tuple of {', '.join(_STARTS)}", value)
    if len(set(value)) < len(value):
        fail(name, "a tuple without repeats", value)


def _check_beta(name: str, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != 2:
        fail(name, "a pair (from, to)", value)
    for exponent in value:
        check_number(name, exponent, 1.0)


# Of each setting by itself.
_CHECKS: dict[str, Check] = {
    "preset": choice("fast", "balanced", "best"),
    "granularity": choice("per_tensor", "per_channel", "per_group"),
    "objective": choice("auto", "gram", "sampled"),
    "bias": choice("refit", "create", "keep"),
    "products": choice("auto", "float32", "tf32", "bfloat16"),
    "bits": integer(2, 8),
    "batch_size": integer(1),
    "seed": integer(0, 2**63 - 1),
    "positions": or_none(integer(1)),
    "group_size": or_none(integer(1)),
    "scale_candidates": or_none(integer(1)),
    "steps": or_none(integer(0)),
    "search_steps": or_none(integer(0, _MAX_SEARCH_STEPS)),
    "rounds": or_none(integer(0)),
    "symmetric": check_flag,
    "narrow_range": check_flag,
    "refine": check_flag,
    "progress": check_flag,
    "scale_free": check_flag,
    "scale": _check_scale,
    "scale_dtype": _check_scale_dtype,
    "activation": _check_activation,
    "starts": or_none(_check_starts),
    "damping": or_none(number(0.0)),
    "learning_rate": or_none(number(0.0, exclusive=True)),
    "reg_weight": or_none(number(0.0)),
    "warmup": number(0.0, 1.0),
    "beta": _check_beta,
}


@dataclasses.dataclass(frozen=True, eq=False)
class AdaRoundConfig:
    """Settings of one layer's reconstruction; names as in the paper and its implementations.

    Of the settings marked (*) None takes the preset's value (docs/tuning.md has the measurements).
    Settings of a part that does not run for a layer have no effect; the report says which ran.

    Attributes:
        preset: "fast", "balanced" or "best": how much time a lower error is worth.
        bits: The grid's, 2 to 8.
        symmetric: Codes in [-2^(b-1), 2^(b-1) - 1] with zero point 0, else [0, 2^b - 1].
        narrow_range: Symmetric codes from -2^(b-1) + 1, as TensorRT wants 8 bits.
        granularity: A scale "per_tensor", "per_channel" (row) or "per_group" of ``group_size``
            columns; None is per_group where there is a group_size, else per_channel.
        group_size: Columns that share a scale, for per_group alone.
        scale: "gram" (the scale, and zero point, of least output error; where the objective is
            sampled, "mse"), "mse" (of least squared weight error), "min_max" or a tensor: [1, 1]
            for per_tensor, else [rows or 1, n_groups] or, without groups, [rows].
        scale_candidates: (*) How many scales "gram" tries for each row, all but a few near the best
            so far.
        scale_dtype: The dtype that scales are stored in; they are rounded to it before they are
            used, and the report notes where that costs digits.
        bias: "refit" puts the mean error of the outputs into biases that exist, "create" also makes
            one where the layer has none, "keep" leaves biases alone, as the sampled objective
            always does (the report notes where "refit" was asked for).
        objective: The loss: "gram" (exact for a loss without activation function), "sampled"
            (minibatches through the layer and ``activation``), or "auto": "sampled" with an
            activation function, else "gram".
        activation: None, "relu", "relu6", "gelu", "silu" or a callable that works elementwise.
        positions: For convolutions, the number of output positions per sample that the Gram
            objective looks at; None is all.
        damping: Share of the median of G's diagonal that is added to the diagonal, against
            overfitting; None is 5 / sqrt(positions seen), at most 0.3.
        starts: (*) Which solutions the search of the Gram objective starts from, of "nearest",
            "gptq" and "adaround"; the best is taken row by row.
        refine: Coordinate descent over the whole grid, until no single change of a code helps;
            without it there is no tabu search either. For the Gram objective.
        search_steps: (*) Of the tabu search, a row. For the Gram objective.
        rounds: (*) How often scales are then refitted and the search repeated. For the Gram
            objective.
        steps: (*) Of the annealing of AdaRound.
        batch_size: Samples a step of the sampled objective; of a linear layer a sample is 32
            tokens, whatever the shape of its inputs.
        learning_rate: Of the annealing; None takes the objective's measured default.
        reg_weight: Lambda, of the annealing's regularizer; None takes the objective's measured
            default.
        beta: (from, to) of the regularizer's exponent along half a cosine.
        warmup: The share of steps before the regularizer is on.
        scale_free: Divide the loss by the layer's own scale, so that one reg_weight serves all
            layers; False is the paper's loss.
        products: The arithmetic of the annealing's matrix products: "float32", "bfloat16", "tf32"
            (on CUDA, elsewhere float32), or "auto", which is bfloat16 where the processor has it.
            On CUDA the search for scales takes TF32, unless this is "float32".
        seed: Of everything that is drawn.
        progress: Show a bar.

    Raises:
        ValueError: A setting is outside its range, or does not go with another; the error names it,
            the rule and what came.
        TypeError: A setting that is a number is none.
    """

    preset: Literal["fast", "balanced", "best"] = "balanced"
    bits: int = 4
    symmetric: bool = True
    narrow_range: bool = False
    granularity: Granularity | None = None
    group_size: int | None = None
    scale: str | Tensor = "gram"
    scale_candidates: int | None = None
    scale_dtype: torch.dtype = torch.float32
    bias: Literal["refit", "create", "keep"] = "refit"
    objective: Literal["auto", "gram", "sampled"] = "auto"
    activation: str | Callable[[Tensor], Tensor] | None = None
    positions: int | None = None
    damping: float | None = None
    starts: tuple[Start, ...] | None = None
    refine: bool = True
    search_steps: int | None = None
    rounds: int | None = None
    steps: int | None = None
    batch_size: int = 32
    learning_rate: float | None = None
    reg_weight: float | None = None
    beta: tuple[float, float] = (20.0, 2.0)
    warmup: float = 0.2
    scale_free: bool = True
    products: Literal["auto", "float32", "tf32", "bfloat16"] = "auto"
    seed: int = 0
    progress: bool = False

    def __post_init__(self) -> None:
        if self.granularity is None:
            implied = "per_channel" if self.group_size is None else "per_group"
            object.__setattr__(self, "granularity", implied)
        for name, check in _CHECKS.items():
            check(name, getattr(self, name))
        self._check_combinations()
        object.__setattr__(self, "beta", tuple(float(value) for value in self.beta))
        if self.starts is not None:
            object.__setattr__(self, "starts", tuple(self.starts))

    def _check_combinations(self) -> None:
        activated = self.activation is not None
        per_group = self.granularity == "per_group"
        rules = (
            ("narrow_range", self.symmetric or not self.narrow_range, "False unless symmetric"),
            (
                "group_size",
                per_group == (self.group_size is not None),
                "set exactly when granularity is per_group",
            ),
            (
                "objective",
                not (activated and self.objective == "gram"),
                "auto or sampled with an activation function",
            ),
            (
                "bias",
                self.bias != "create" or not (activated or self.objective == "sampled"),
                "refit or keep unless the objective is gram",
            ),
        )
        for name, holds, rule in rules:
            if not holds:
                fail(name, rule, getattr(self, name))

    @property
    def searches_scales(self) -> bool:
        """Whether the Gram solver looks for scales itself."""
        return isinstance(self.scale, str) and self.scale == "gram"

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, AdaRoundConfig):
            return NotImplemented
        return _plain(self) == _plain(other)

    def __hash__(self) -> int:
        values = _plain(self).values()  # lists (scale, beta) cannot be hashed
        return hash(tuple(str(v) if isinstance(v, list) else v for v in values))

    @property
    def activation_function(self) -> Callable[[Tensor], Tensor] | None:
        """The activation function itself."""
        return ACTIVATIONS[self.activation] if isinstance(self.activation, str) else self.activation

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON.

        Returns:
            A dict with a value for each setting.

        Raises:
            ValueError: The activation is a callable, which has none.
        """
        if self.activation is not None and not isinstance(self.activation, str):
            fail("activation", "a name, to be written to a dict", self.activation)
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaRoundConfig:
        """The inverse of :meth:`to_dict`.

        Args:
            values: Settings by name; those that are missing have their defaults.

        Returns:
            The configuration.

        Raises:
            ValueError: A key is unknown, or a value not allowed.
        """
        refuse_unknown(cls, values)
        values = dict(values)
        if isinstance(values.get("scale"), list):
            values["scale"] = torch.tensor(values["scale"], dtype=torch.float64, device="cpu")
        if isinstance(values.get("scale_dtype"), str):
            values["scale_dtype"] = getattr(torch, values["scale_dtype"], values["scale_dtype"])
        return cls(**values)


def make_config(
    config: AdaRoundConfig | None,
    overrides: Mapping[str, Any],
    function: Callable[..., Any] | None = None,
) -> AdaRoundConfig:
    """``config`` (or the defaults) with ``overrides``; errors name the argument.

    Of granularity and group_size the one that is given decides on the other. function: that was
    called with ``overrides`` among its keywords: an unknown one may be a misspelt argument.
    """
    if config is not None and not isinstance(config, AdaRoundConfig):
        raise TypeError(f"config must be an AdaRoundConfig, got {type(config).__name__}")
    fields = {field.name for field in dataclasses.fields(AdaRoundConfig)}
    unknown = sorted(set(overrides) - fields)
    if unknown:
        name, names, kind = unknown[0], fields, "the settings"
        if function is not None:
            parameters = inspect.signature(function).parameters.values()
            names = names | {p.name for p in parameters if p.kind is not p.VAR_KEYWORD}
            kind = f"the arguments and settings of {function.__name__}"
        hint = suggestion(name, names)
        listed = f"{kind} are {', '.join(nearest_first(name, names))}"
        raise TypeError(f"{name!r} is no setting; {hint + ' (' + listed + ')' if hint else listed}")
    base, changes = config or AdaRoundConfig(), with_granularity(overrides)
    if "granularity" in changes and changes["granularity"] is None:
        changes["granularity"] = None if base.granularity == "per_group" else base.granularity
    return dataclasses.replace(base, **changes)


def with_granularity(changes: Mapping[str, Any]) -> dict[str, Any]:
    """Changes of settings in which granularity and group_size are both set if one of them is."""
    changes = dict(changes)
    if changes.get("granularity") is None and "group_size" in changes:
        changes["granularity"] = None if changes["group_size"] is None else "per_group"
    elif changes.get("granularity") in ("per_channel", "per_tensor"):
        changes.setdefault("group_size", None)
    return changes


def _plain(config: AdaRoundConfig) -> dict[str, Any]:
    values = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if isinstance(config.scale, Tensor):
        values["scale"] = config.scale.double().tolist()
    values["scale_dtype"] = str(config.scale_dtype).removeprefix("torch.")
    values["beta"] = list(config.beta)
    values["starts"] = None if config.starts is None else list(config.starts)
    return values
