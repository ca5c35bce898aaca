"""Models that the command line names: directories, names on the Hub, and factories."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import nn

NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_ON_HUB = re.compile(r"\w[\w.-]*/[\w.-]+")
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.txt",
    "vocab.json",
    "spiece.model",
    "sentencepiece.bpe.model",
)


@dataclass(frozen=True)
class NamedModel:
    """A model that is there, but not in memory.

    Attributes:
        name: As it was given.
        origin: What transformers loads, a directory or a name on the Hub; None for a factory.
        config: Its configuration.
        auto: The class of transformers to load it with.
        make: The factory, where there is one.
    """

    name: str
    origin: Path | str | None = None
    config: Any = None
    auto: Any = None
    make: Callable[[], object] | None = None

    @cached_property
    def tokenizer(self) -> Any:
        """That of transformers, or None where there is none."""
        load: Any = None if self.origin is None else _transformers().AutoTokenizer.from_pretrained
        if isinstance(self.origin, str):
            try:
                return load(self.origin)
            except (OSError, ValueError):  # it has none
                return None
        # transformers would make an empty one of nothing, to which every word is unknown.
        if self.origin is None or not any((self.origin / n).exists() for n in _TOKENIZER_FILES):
            return None
        return load(self.origin, local_files_only=True)

    def file(self, name: str) -> Path | None:
        """A file beside the model's, or None."""
        if isinstance(self.origin, Path):
            return self.origin / name if (self.origin / name).is_file() else None
        if self.origin is None:
            return None
        try:
            path = _transformers().utils.cached_file(self.origin, name)
        except (OSError, ValueError):
            return None
        return None if path is None else Path(path)

    def load(
        self, dtype: torch.dtype | None = None, device: str | None = None, quiet: bool = False
    ) -> Source:
        """In memory; dtype None is that of the files, or what the factory made."""
        if self.make is None:
            if quiet:
                _transformers().utils.logging.disable_progress_bar()
            settings: dict[str, Any] = {"config": self.config, "dtype": dtype or "auto"}
            if isinstance(self.origin, Path):
                model = self.auto.from_pretrained(self.origin, local_files_only=True, **settings)
            else:
                with _asking_hub(str(self.origin)):
                    model = self.auto.from_pretrained(self.origin, **settings)
            model.eval()
        else:
            model = self.make if isinstance(self.make, nn.Module) else self.make()
            if not isinstance(model, nn.Module):
                came = type(model).__name__
                raise TypeError(f"MODEL {self.name} must return a torch module, got {came}")
            model = model if dtype is None else model.to(dtype)
        if device is not None:
            model.to(device)
        return Source(model, self)


@dataclass(frozen=True)
class Source:
    """A model in memory.

    Attributes:
        model: It.
        named: What it was loaded from.
    """

    model: nn.Module
    named: NamedModel

    @property
    def pretrained(self) -> bool:
        """Whether transformers loaded it."""
        return self.named.origin is not None

    def tokenizer(self) -> Any:
        """The tokenizer beside it, or None."""
        return self.named.tokenizer

    @contextmanager
    def without_cache(self) -> Iterator[None]:
        """Inside, a language model keeps no keys and values, which calibration never reads."""
        config = getattr(self.model, "config", None) if self.pretrained else None
        before = getattr(config, "use_cache", None)
        if before is None:
            yield
            return
        config.use_cache = False  # type: ignore[union-attr]
        try:
            yield
        finally:
            config.use_cache = before  # type: ignore[union-attr]


def name_model(name: str, auto_class: str | None = None) -> NamedModel:
    """A local Hugging Face directory, what ``module:factory`` names, or a name that the Hub knows.

    Raises ValueError, FileNotFoundError, ImportError and TypeError that name MODEL or --auto-class.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise FileNotFoundError(f"MODEL must hold a config.json, got {path}")
        config = _transformers().AutoConfig.from_pretrained(path, local_files_only=True)
        return NamedModel(name, path, config, _auto_class(config, auto_class))
    if NAME.fullmatch(name):
        return NamedModel(name, make=imported("MODEL", name))
    if not path.exists() and _ON_HUB.fullmatch(name):
        with _asking_hub(name):
            config = _transformers().AutoConfig.from_pretrained(name)
        return NamedModel(name, name, config, _auto_class(config, auto_class))
    raise FileNotFoundError(
        "MODEL must be a local Hugging Face directory or module:factory, or org/name on the Hub, "
        f"got {name!r}, which is none of them"
    )


def load_model(
    name: str,
    *,
    auto_class: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Source:
    """What :func:`name_model` names, in memory; dtype None is that of the files."""
    return name_model(name, auto_class).load(dtype, device, quiet)


@contextmanager
def _asking_hub(name: str) -> Iterator[None]:
    """What to do where the Hub does not answer, or not with this model."""
    try:
        yield
    except OSError as error:
        said = " ".join(str(error).split()) or type(error).__name__
        raise FileNotFoundError(
            f"MODEL must be a local directory or a name that the Hub answers to, got {name!r}: "
            f"download it where there is a network, by hf download {name} --local-dir DIR, and "
            f"give DIR ({said})"
        ) from error


def _auto_class(config: Any, name: str | None) -> Any:
    """The named class, or the one whose model for this configuration is its architecture."""
    transformers = _transformers()
    known = sorted(n for n in dir(transformers) if n.startswith("AutoModel"))
    if name is not None:
        if name not in known:
            raise ValueError(f"--auto-class must be one of {', '.join(known)}, got {name!r}")
        return getattr(transformers, name)
    for architecture in config.architectures or ():
        for candidate in known:
            mapped = getattr(transformers, candidate)._model_mapping.get(type(config), None)
            models = mapped if isinstance(mapped, (tuple, list)) else (mapped,)
            if architecture in [getattr(model, "__name__", None) for model in models]:
                return getattr(transformers, candidate)
    if config.architectures:
        raise ValueError(
            f"--auto-class must be given for the architecture {config.architectures[0]}, which is "
            f"that of none of transformers' classes for {type(config).__name__}"
        )
    return transformers.AutoModel


def imported(argument: str, name: str) -> Any:
    """What ``module:attribute`` names; the current directory is searched as well."""
    module_name, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        item: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # it is there, but something that it imports is not
        raise ImportError(f"{argument} must name a module that exists, got {module_name}") from None
    for attribute in path.split("."):
        if not hasattr(item, attribute):
            raise ImportError(f"{argument} must name what {module_name} has, got {path}")
        item = getattr(item, attribute)
    if not callable(item):
        raise TypeError(f"{argument} {name} must be callable, got {type(item).__name__}")
    return item


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "transformers is needed for Hugging Face directories: pip install adaround_ext[demo]"
        ) from error
    return transformers
