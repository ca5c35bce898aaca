"""Export goal: a model and the target that it is quantized for, which settles its layers."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from glob import escape
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.config import SCALE_DTYPES, AdaRoundConfig, make_config
from adaround_ext.export.goal.layer_checks import check_layers
from adaround_ext.export.goal.targets import ExportTarget, export_target
from adaround_ext.export.goal.trial import check_loads, check_traces
from adaround_ext.export.hugging_face import check_alike, skeleton
from adaround_ext.layers.matrix import SUPPORTED
from adaround_ext.planning.overrides import Overrides
from adaround_ext.planning.plan import Target
from adaround_ext.tensors import converted
from adaround_ext.transforms.batch_norm import BatchNorm

_GRID = ("symmetric", "narrow_range", "granularity", "group_size", "scale_dtype")


class Goal:
    """What ``export_for`` asks of ``model``; with None, nothing.

    Args:
        export_for: The name of a target.
        model: The model to quantize.

    Attributes:
        notes: What the goal changed.

    Raises:
        ImportError: Packages of the target are missing.
        TypeError: The model is of a class that cannot end there.
        ValueError: There is no such target, or the model cannot end there.
    """

    def __init__(self, export_for: str | None, model: nn.Module) -> None:
        self.notes: list[str] = []
        self._model = model
        self._target = None if export_for is None else export_target(export_for)
        self._config = AdaRoundConfig()
        self._asked: set[str] = set()  # settings of all layers that are the caller's
        if self._target is not None:
            self._target.check_packages()
            self._check_model(self._target)

    def _check_model(self, target: ExportTarget) -> None:
        if target.pretrained:
            from transformers import PreTrainedModel

            if not isinstance(self._model, PreTrainedModel):
                came = type(self._model).__name__
                rule = f"model must be a PreTrainedModel of transformers for {target.name}"
                raise TypeError(f"{rule}, got {came}")
            check_alike(self._model, skeleton(self._model))
            if _merges_weights(self._model):
                rule = "model must not have weights that transformers merges while it loads them"
                came = type(self._model).__name__
                raise ValueError(f"{rule}, as fused experts, for {target.name}, got {came}")
        for name, module in self._model.named_modules():
            if not target.circular and getattr(module, "padding_mode", "") == "circular":
                rule = f"model must have no circular padding for {target.name}"
                raise ValueError(f"{rule}, got that of {name}")

    def config(
        self,
        config: AdaRoundConfig | None,
        settings: Mapping[str, Any],
        function: Callable[..., Any] | None = None,
    ) -> AdaRoundConfig:
        """That of all layers, see :func:`make_config`; ValueError where the target has no such
        grid."""
        self._config = make_config(config, settings, function)
        if self._target is None:
            return self._config
        plain = AdaRoundConfig()
        changed = {n for n in _GRID if getattr(self._config, n) != getattr(plain, n)}
        self._asked = changed | set(settings)
        left = {n: v for n, v in self._target.choices.items() if n not in self._asked}
        self._config = dataclasses.replace(self._config, **left)
        self._target.check_config(self._config)
        return self._config

    def check_activations(self, config: ActivationConfig | None) -> None:
        """ValueError for quantized activations that the target has not."""
        if self._target is not None:
            self._target.check_activations(config)

    def batch_norm(self, chosen: BatchNorm) -> BatchNorm:
        """ "keep" where the class of the model must fit what is exported."""
        return "keep" if self._target is not None and self._target.pretrained else chosen

    @contextmanager
    def widened(self) -> Iterator[None]:
        """The model in float32 where the target has no bfloat16; as it was after an error."""
        before: list[tuple[Tensor, Tensor]] = []
        if self._target is not None and torch.bfloat16 not in self._target.dtypes:
            wide: dict[object, Tensor] = {}  # what shares memory goes on doing so
            for tensor in _tensors(self._model):
                if tensor.dtype == torch.bfloat16:
                    before.append((tensor, tensor.data))
                    place = (tensor.data_ptr(), tensor.shape, tensor.stride())
                    tensor.data = wide.setdefault(place, tensor.data.float())
            if before:
                self.notes.append(f"the model is float32 now: {self._target.name} has no bfloat16")
        try:
            yield
        except BaseException:
            for tensor, data in before:
                tensor.data = data
            raise

    def batches(self, calibration: Iterable[Any]) -> Iterable[Any]:
        """As the model takes them now: bfloat16 as float32 where it was made so."""
        if not self.notes or not isinstance(calibration, Iterable):  # what is none is refused later
            return calibration
        return converted(calibration, (torch.bfloat16,), torch.float32)

    def overrides(self, overrides: Overrides | None) -> Overrides | None:
        """The caller's, after the target's: to leave the output embedding alone."""
        if self._target is None or self._target.head != "skip":
            return overrides
        heads: dict[Any, Any] = {escape(name): "skip" for name in self.heads()}
        if overrides is None or isinstance(overrides, Mapping):
            return heads | dict(overrides or {})
        return overrides  # which is refused where it is read

    def heads(self) -> list[str]:
        """Names of the output embedding, where it is a layer that the target leaves alone."""
        find = getattr(self._model, "get_output_embeddings", None)
        if self._target is None or self._target.head == "quantize" or not callable(find):
            return []
        head, owners = find(), self._owners()
        return [
            name
            for name, module in self._model.named_modules()
            if module is head and isinstance(module, SUPPORTED) and owners[id(module.weight)] == 1
        ]

    def refused(self) -> dict[nn.Module, str]:
        """Layers that the target cannot hold at any setting, and why."""
        target = self._target
        if target is None:
            return {}
        owners = self._owners()
        never = self.heads() if target.head == "never" else []
        reasons: dict[nn.Module, str] = {}
        for name, module in self._model.named_modules():
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if not isinstance(module, SUPPORTED) or weight is None:
                continue
            reason = self._reason(target, module, weight, owners[id(weight)])
            if name in never:
                reason = reason or "an output embedding has no packed form there"
            if reason is not None:
                reasons[module] = f"{target.name}: {reason}"
        return reasons

    def left_names(self) -> set[str]:
        """Layers that stay as they are, by their names as patterns."""
        left = self.refused()
        names = {name for name, module in self._model.named_modules() if module in left}
        return {escape(name) for name in names | set(self.heads())}

    def _owners(self) -> Counter[int]:
        """How many modules have each parameter."""
        modules = self._model.modules()
        return Counter(id(p) for module in modules for p in module.parameters(recurse=False))

    def _reason(
        self, target: ExportTarget, layer: nn.Module, weight: Tensor, owners: int
    ) -> str | None:
        dtypes = target.dtypes
        if target.pretrained:
            dtypes = tuple(dtype for dtype in dtypes if dtype == self._model.dtype)
        if target.linear_only and not isinstance(layer, nn.Linear):
            return f"it must be a Linear, got {type(layer).__name__}"
        if isinstance(layer, nn.Linear) and layer.in_features % target.columns:
            return f"its columns must be whole blocks of {target.columns}, got {layer.in_features}"
        if target.pretrained and owners > 1:
            return f"packed weights cannot be shared, got that of {owners} modules"
        if _dtype_there(target, weight) not in dtypes:
            names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            return f"its dtype must be {names or 'one that it has'}, got {weight.dtype}"
        return None

    def settings(self, layer: nn.Module, given: Mapping[str, Any]) -> dict[str, Any]:
        """``given`` by overrides for a layer, and what they and the caller leave to the target."""
        target, config = self._target, self._config
        if target is None:
            return dict(given)
        asked = self._asked | set(given)
        dtype = _dtype_there(target, layer.get_parameter("weight"))
        bits = given.get("bits", config.bits)
        choices: dict[str, Any] = {}
        if isinstance(layer, nn.Linear):
            if layer.in_features % 2 and bits < target.odd_bits and "bits" not in given:
                bits = choices["bits"] = target.odd_bits
            grouped = asked & {"granularity", "group_size"} or isinstance(config.scale, Tensor)
            if bits <= target.group_bits and not grouped:
                size = self._group_size(target, layer.in_features)
                if size is not None:
                    choices |= {"granularity": "per_group", "group_size": size}
        if target.scale_dtype is None and dtype in SCALE_DTYPES and "scale_dtype" not in asked:
            choices["scale_dtype"] = dtype
        signed = given.get("symmetric", config.symmetric)
        if target.narrow_range and bits == 8 and signed and "narrow_range" not in asked:
            choices["narrow_range"] = True
        return {**choices, **given}

    @cached_property
    def _widths(self) -> set[int]:
        """Columns of the Linears that are not left alone."""
        left = {*self.refused(), *map(self._model.get_submodule, self.heads())}
        linears = (m for m in self._model.modules() if isinstance(m, nn.Linear))
        return {linear.in_features for linear in linears if linear not in left}

    def _group_size(self, target: ExportTarget, cols: int) -> int | None:
        """One for all Linears where there is one, since a format may have one setting only."""
        for size in target.group_sizes:
            if not any(width % size for width in self._widths):
                return size
        if not self._config.symmetric:  # there zero points allow no mixed settings
            return None
        return next((size for size in target.group_sizes if cols % size == 0), None)

    def check(self, targets: Sequence[Target], run: Callable[[], object] | None = None) -> None:
        """ValueError naming the layers whose settings the target cannot hold, and why.

        Also where transformers cannot load what would be written of the model's class, and where
        the model, as ``run`` calls it, cannot be traced for ONNX.
        """
        if self._target is not None:
            check_layers(self._target, self._model, targets)
            if self._target.pretrained:
                check_loads(self._model, targets)  # type: ignore[arg-type]
            if self._target.format == "onnx" and run is not None:
                check_traces(self._model, run)


def _dtype_there(target: ExportTarget, weight: Tensor) -> torch.dtype:
    """That of a weight when it is quantized."""
    widened = weight.dtype == torch.bfloat16 and torch.bfloat16 not in target.dtypes
    return torch.float32 if widened else weight.dtype


def _merges_weights(model: Any) -> bool:
    """Whether transformers loads several tensors as one, which fails beside packed weights."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter
    except ImportError:  # before transformers 5
        return False
    return any(isinstance(c, WeightConverter) for c in get_model_conversion_mapping(model))


def _tensors(model: nn.Module) -> list[Tensor]:
    """Parameters, their gradients, and buffers."""
    parameters = list(model.parameters())
    gradients = [p.grad for p in parameters if p.grad is not None]
    return [*gradients, *parameters, *model.buffers()]
