"""Settings of single layers: by name, by type, first and last."""

from __future__ import annotations

from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from adaround_ext.config import AdaRoundConfig, make_config

Overrides = Mapping[str | type[nn.Module], Mapping[str, Any] | str]
RESERVED = ("<first>", "<last>")  # in execution order


class LayerSettings:
    """The overrides of a model; one config object for layers with the same settings."""

    def __init__(
        self, overrides: Overrides, config: AdaRoundConfig, names: Mapping[nn.Module, list[str]]
    ) -> None:
        if not isinstance(overrides, Mapping):
            raise TypeError(f"overrides must be a mapping, got {type(overrides).__name__}")
        self._base = config
        self._items = list(overrides.items())
        self._configs: dict[tuple[tuple[str, int], ...], AdaRoundConfig] = {(): config}
        self._kept: list[object] = []  # so that ids stay
        everything = [name for known in names.values() for name in known] + list(RESERVED)
        for key, value in self._items:
            if isinstance(key, str):
                matched = any(fnmatchcase(name, key) for name in everything)
            elif isinstance(key, type) and issubclass(key, nn.Module):
                matched = any(isinstance(module, key) for module in names)
            else:
                raise TypeError(
                    f"overrides must have patterns or module types as keys, got {key!r}"
                )
            if not matched:
                raise ValueError(f"overrides must match modules of the model, got {key!r}")
            if value != "skip" and not isinstance(value, Mapping):
                raise TypeError(f"overrides[{key!r}] must be settings or 'skip', got {value!r}")
            if isinstance(value, Mapping):
                try:
                    make_config(config, value)
                except (TypeError, ValueError) as error:
                    raise type(error)(f"overrides[{key!r}]: {error}") from None
        self._used: set[int] = set()

    def of(self, names: list[str], module: nn.Module) -> dict[str, Any] | None:
        """The settings for a module, of all that match it: later ones win. None to skip it."""
        settings: dict[str, Any] | None = {}
        for index, (key, value) in enumerate(self._items):
            if isinstance(key, str):
                # A pattern that names a module means all inside it.
                hit = any(fnmatchcase(n, key) or fnmatchcase(n, f"{key}.*") for n in names)
            else:
                hit = isinstance(module, key)
            if not hit:
                continue
            self._used.add(index)
            if isinstance(value, str):
                settings = None
            else:
                settings = {**(settings or {}), **value}
        return settings

    def config(self, settings: Mapping[str, Any]) -> AdaRoundConfig:
        key = tuple(sorted((name, _identity(value)) for name, value in settings.items()))
        if key not in self._configs:
            self._kept.append(dict(settings))
            self._configs[key] = make_config(self._base, settings)
        return self._configs[key]

    def check_used(self) -> None:
        for index, (key, _) in enumerate(self._items):
            if index not in self._used:
                raise ValueError(f"overrides must match layers to quantize, {key!r} matches none")


def _identity(value: object) -> int:
    try:
        return hash((type(value), value))
    except TypeError:
        return id(value)
