"""The settings of :func:`adaround_ext.optimize_layer`."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from adaround_ext.checks import (
    check_flag,
    check_int,
    check_number,
    fail,
    nearest_first,
    refuse_unknown,
    suggestion,
)

Granularity = Literal["per_tensor", "per_channel", "per_group"]

Start = Literal["nearest", "gptq", "adaround"]

_CHOICES = {
    "preset": ("fast", "balanced", "best"),
    "granularity": ("per_tensor", "per_channel", "per_group"),
    "objective": ("auto", "gram", "sampled"),
    "bias": ("refit", "create", "keep"),
    "products": ("auto", "float32", "tf32", "bfloat16"),
}
_STARTS = ("nearest", "gptq", "adaround")
_SCALES = ("gram", "mse", "min_max")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.nn.functional.relu,
    "relu6": torch.nn.functional.relu6,
    "gelu": torch.nn.functional.gelu,
    "silu": torch.nn.functional.silu,
}
# The tabu search counts its steps in float32.
_MOST = {"steps": None, "search_steps": 1 << 23, "rounds": None}
SCALE_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclasses.dataclass(frozen=True, eq=False)
class AdaRoundConfig:
    """Settings of one layer's reconstruction; names as in the paper and its implementations.

    Of the settings marked *, None takes the preset's value (docs/tuning.md has the measurements).
    Settings of a part that does not run for a layer have no effect; the report says which ran.
    preset: "fast", "balanced" or "best": how much time a lower error is worth.

    The grid. bits: 2 to 8. symmetric: codes in [-2^(b-1), 2^(b-1) - 1] with zero point 0, else
    [0, 2^b - 1]. narrow_range: symmetric codes from -2^(b-1) + 1, as TensorRT wants 8 bits.
    granularity: a scale per_tensor, per_channel (row) or per_group of ``group_size`` columns; None
    is per_group where there is a group_size, else per_channel. scale: "gram" (the scale, and zero
    point, of least output error; where the objective is sampled, "mse"), "mse" (of least squared
    weight error), "min_max" or a tensor: [1, 1] for per_tensor, else [rows or 1, n_groups] or,
    without groups, [rows]. scale_candidates*: how many scales "gram" tries for each row, all but a
    few near the best so far. scale_dtype: the dtype that scales are stored in; they are rounded to
    it before they are used, and the report notes where that costs digits.
    bias: "refit" puts the mean error of the outputs into biases that exist, "create" also makes one
    where the layer has none, "keep" leaves biases alone, as the sampled objective always does (the
    report notes where "refit" was asked for).

    The loss. objective: "gram" (exact for a loss without activation function), "sampled"
    (minibatches through the layer and ``activation``), or "auto": "sampled" with an activation
    function, else "gram". activation: None, "relu",
    "relu6", "gelu", "silu" or a callable that works elementwise. positions: for convolutions, the
    number of output positions per sample that the Gram objective looks at; None is all. damping:
    share of the median of G's diagonal that is added to the diagonal, against overfitting; None is
    5 / sqrt(positions seen), at most 0.3.

    The search. starts*: which solutions it starts from, of "nearest", "gptq" and "adaround"; the
    best is taken row by row. refine: coordinate descent over the whole grid, until no single change
    of a code helps; without it there is no tabu search either. search_steps*: of the tabu search, a
    row. rounds*: how often scales
    are then refitted and the search repeated. All of these are for the Gram objective.

    The annealing of AdaRound. steps*, learning_rate, reg_weight (lambda): None takes the
    objective's measured default. beta: (from, to) of the regularizer's exponent along half a
    cosine. warmup: the share of steps before the regularizer is on. scale_free: divide the loss by
    the layer's own scale, so that one reg_weight serves all layers; False is the paper's loss.
    products: the arithmetic of its matrix products: "float32", "bfloat16", "tf32" (on CUDA,
    elsewhere float32), or "auto", which is bfloat16 where the processor has it. On CUDA the search
    for scales takes TF32, unless this is "float32". batch_size: samples a step of the sampled
    objective; of a linear layer a sample is 32 tokens, whatever the shape of its inputs.

    seed: of everything that is drawn. progress: show a bar.
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
        for name, choices in _CHOICES.items():
            if getattr(self, name) not in choices:
                fail(name, f"one of {', '.join(choices)}", getattr(self, name))
        check_int("bits", self.bits, 2, 8)
        check_int("batch_size", self.batch_size, 1)
        check_int("seed", self.seed, 0, 2**63 - 1)
        for name in ("positions", "group_size", "scale_candidates"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 1)
        for name in ("steps", "search_steps", "rounds"):
            if getattr(self, name) is not None:
                check_int(name, getattr(self, name), 0, _MOST[name])
        for name in ("symmetric", "narrow_range", "refine", "progress", "scale_free"):
            check_flag(name, getattr(self, name))
        if self.narrow_range and not self.symmetric:
            fail("narrow_range", "False unless symmetric", self.narrow_range)
        if (self.granularity == "per_group") != (self.group_size is not None):
            fail("group_size", "set exactly when granularity is per_group", self.group_size)
        if not isinstance(self.scale, Tensor) and self.scale not in _SCALES:
            fail("scale", f"{', '.join(_SCALES)} or a tensor", self.scale)
        if isinstance(self.scale, Tensor) and (self.scale.is_meta or self.scale.is_complex()):
            fail("scale", "a tensor of real numbers", self.scale)
        if self.scale_dtype not in SCALE_DTYPES:
            fail("scale_dtype", "float32, float16 or bfloat16", self.scale_dtype)
        if not (self.activation is None or callable(self.activation)) and (
            self.activation not in list(ACTIVATIONS)
        ):
            fail("activation", f"None, {', '.join(ACTIVATIONS)} or a callable", self.activation)
        if self.activation is not None and self.objective == "gram":
            fail("objective", "auto or sampled with an activation function", self.objective)
        if self.bias == "create" and (self.activation is not None or self.objective == "sampled"):
            fail("bias", "refit or keep unless the objective is gram", self.bias)
        self._check_starts()
        if self.damping is not None:
            check_number("damping", self.damping, 0.0)
        if self.learning_rate is not None:
            check_number("learning_rate", self.learning_rate, 0.0, exclusive=True)
        if self.reg_weight is not None:
            check_number("reg_weight", self.reg_weight, 0.0)
        check_number("warmup", self.warmup, 0.0, 1.0)
        if not isinstance(self.beta, (tuple, list)) or len(self.beta) != 2:
            fail("beta", "a pair (from, to)", self.beta)
        for value in self.beta:
            check_number("beta", value, 1.0)
        object.__setattr__(self, "beta", tuple(float(value) for value in self.beta))

    def _check_starts(self) -> None:
        if self.starts is None:
            return
        if not isinstance(self.starts, (tuple, list)) or not self.starts:
            fail("starts", f"a tuple of {', '.join(_STARTS)}", self.starts)
        for start in self.starts:
            if start not in _STARTS:
                fail("starts", f"a tuple of {', '.join(_STARTS)}", self.starts)
        if len(set(self.starts)) < len(self.starts):
            fail("starts", "a tuple without repeats", self.starts)
        object.__setattr__(self, "starts", tuple(self.starts))

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
        """Plain values for JSON. A callable activation has none: ValueError."""
        if self.activation is not None and not isinstance(self.activation, str):
            fail("activation", "a name, to be written to a dict", self.activation)
        return _plain(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> AdaRoundConfig:
        """The inverse of :meth:`to_dict`; unknown keys are refused with ValueError."""
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
