"""Overrides: settings of single layers by name, by type, first and last."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from adaround_ext.checks import some, suggestion
from adaround_ext.config import AdaRoundConfig, make_config, with_granularity
from adaround_ext.tracing.evaluation import plain_module_name

Overrides = Mapping[str | type[nn.Module], Mapping[str, Any] | str]
RESERVED = ("<first>", "<last>")  # in execution order


def module_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of every module, as they are without torch.compile."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(plain_module_name(name))
    return names


class LayerSettings:
    """The overrides of a model; one config object for layers with the same settings.

    names: of :func:`module_names`. Keys may have the part that torch.compile adds, or not.
    TypeError and ValueError that name ``overrides`` and the key.
    """

    def __init__(
        self, overrides: Overrides, config: AdaRoundConfig, names: Mapping[nn.Module, list[str]]
    ) -> None:
        if not isinstance(overrides, Mapping):
            raise TypeError(f"overrides must be a mapping, got {type(overrides).__name__}")
        self._base = config
        self._items = [
            (plain_module_name(key) if isinstance(key, str) else key, value)
            for key, value in overrides.items()
        ]
        self._configs: dict[tuple[tuple[str, int], ...], AdaRoundConfig] = {(): config}
        self._settings: list[object] = []  # held, so that ids stay
        self._names = names
        for key, value in self._items:
            self._check_key(key)
            self._check_value(key, value)
        self._used: set[int] = set()

    def _check_key(self, key: object) -> None:
        if not isinstance(key, str) and not (isinstance(key, type) and issubclass(key, nn.Module)):
            raise TypeError(f"overrides must have patterns or module types as keys, got {key!r}")
        if self._matches(key) or key in RESERVED:
            return
        hint = ""
        if isinstance(key, str):
            known = [name for names in self._names.values() for name in names if name]
            hint = suggestion(key, [*known, *RESERVED])
        rule = "overrides must match modules of the model"
        raise ValueError(f"{rule}, got {key!r}{hint and ': ' + hint}")

    def _check_value(self, key: object, value: object) -> None:
        if value != "skip" and not isinstance(value, Mapping):
            raise TypeError(f"overrides[{key!r}] must be settings or 'skip', got {value!r}")
        if isinstance(value, Mapping):
            try:
                make_config(self._base, value)
            except (TypeError, ValueError) as error:
                raise type(error)(f"overrides[{key!r}]: {error}") from None

    def of(self, names: list[str], module: nn.Module) -> dict[str, Any] | None:
        """The settings for a module, of all that match it: later ones win. None to skip it."""
        settings: dict[str, Any] | None = {}
        for index, (key, value) in enumerate(self._items):
            if not _means(key, names, module):
                continue
            self._used.add(index)
            if isinstance(value, str):
                settings = None
            else:
                settings = {**(settings or {}), **with_granularity(value)}
        return settings

    def config(self, settings: Mapping[str, Any]) -> AdaRoundConfig:
        key = tuple(sorted((name, _identity(value)) for name, value in settings.items()))
        if key not in self._configs:
            self._settings.append(dict(settings))
            self._configs[key] = make_config(self._base, settings)
        return self._configs[key]

    def unused(self, skipped: Mapping[str, str]) -> list[str]:
        """Notes on what says to skip layers that are skipped anyway; skipped: reasons by name.

        ValueError where there are settings for none but such layers.
        """
        notes = []
        for index, (key, value) in enumerate(self._items):
            if index in self._used:
                continue
            reasons = [
                f"{name}: {skipped[name]}"
                for module, names in self._names.items()
                for name in names
                if name in skipped and _means(key, names, module)
            ]
            why = f" ({some(reasons)})" if reasons else ""
            if value != "skip":
                rule = "overrides must match layers to quantize"
                raise ValueError(f"{rule}, {key!r} matches none{why}")
            notes.append(f"overrides skip {_key_text(key)}, which is not quantized anyway{why}")
        return notes

    def _matches(self, key: str | type[nn.Module]) -> bool:
        """Whether there is such a module at all."""
        if isinstance(key, str):
            return any(fnmatchcase(n, key) for names in self._names.values() for n in names)
        return any(isinstance(module, key) for module in self._names)


def check_overrides(overrides: Overrides | None, config: AdaRoundConfig, model: nn.Module) -> None:
    """That keys name modules of the model and values are settings, before anything is run."""
    LayerSettings({} if overrides is None else overrides, config, module_names(model))


def _means(key: str | type[nn.Module], names: list[str], module: nn.Module) -> bool:
    """Whether a key means this module; a pattern that names one means all inside it."""
    if isinstance(key, str):
        return any(fnmatchcase(n, key) or fnmatchcase(n, f"{key}.*") for n in names)
    return isinstance(module, key)


def _key_text(key: str | type[nn.Module]) -> str:
    return key if isinstance(key, str) else key.__name__


def _identity(value: object) -> int:
    try:
        return hash((type(value), value))
    except TypeError:
        return id(value)
