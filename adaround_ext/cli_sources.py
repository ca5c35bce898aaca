"""The models and the data that the command line names."""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
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
class Source:
    """A model; ``directory`` is the Hugging Face directory that it came from, or None."""

    model: nn.Module
    directory: Path | None

    def tokenizer(self) -> Any:
        """The directory's tokenizer, or None where it has no files of one.

        transformers would make an empty one of nothing, to which every word is unknown.
        """
        folder = self.directory
        if folder is None or not any((folder / name).exists() for name in _TOKENIZER_FILES):
            return None
        return _transformers().AutoTokenizer.from_pretrained(folder, local_files_only=True)

    @contextmanager
    def without_cache(self) -> Iterator[None]:
        """Inside, a language model keeps no keys and values, which calibration never reads."""
        config = getattr(self.model, "config", None) if self.directory is not None else None
        before = getattr(config, "use_cache", None)
        if before is None:
            yield
            return
        config.use_cache = False  # type: ignore[union-attr]
        try:
            yield
        finally:
            config.use_cache = before  # type: ignore[union-attr]


def load_model(
    name: str,
    *,
    auto_class: str | None = None,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    quiet: bool = False,
) -> Source:
    """A local Hugging Face directory's model, or what ``module:factory`` returns.

    dtype: None is float32 for a directory, and what the factory made. Raises ValueError,
    FileNotFoundError, ImportError and TypeError that name MODEL or --auto-class.
    """
    if Path(name).is_dir():
        source = _pretrained(Path(name), auto_class, dtype or torch.float32, quiet)
    elif _NAME.fullmatch(name):
        made = _imported("MODEL", name)
        made = made if isinstance(made, nn.Module) else made()
        if not isinstance(made, nn.Module):
            raise TypeError(f"MODEL {name} must return a torch module, got {type(made).__name__}")
        source = Source(made if dtype is None else made.to(dtype), None)
    else:
        raise FileNotFoundError(
            f"MODEL must be a local Hugging Face directory or module:factory, got {name!r}, "
            "which is neither"
        )
    if device is not None:
        source.model.to(device)
    return source


def load_data(
    name: str, source: Source, *, nsamples: int, seqlen: int, batch_size: int
) -> Iterable[Any]:
    """Batches of a text file, for a directory with a tokenizer, or what ``module:loader`` returns.

    Raises ValueError, FileNotFoundError, ImportError and TypeError that name DATA.
    """
    if Path(name).is_file():
        rows = _text(Path(name), source, nsamples, seqlen)
        return [{"input_ids": batch} for batch in rows.split(batch_size)]
    if not _NAME.fullmatch(name):
        raise FileNotFoundError(
            f"DATA must be a text file or module:loader, got {name!r}, which is neither"
        )
    batches = _imported("DATA", name)()
    if isinstance(batches, (str, bytes)) or not isinstance(batches, Iterable):
        rule = f"DATA {name} must return an iterable of batches"
        raise TypeError(f"{rule}, got {type(batches).__name__}")
    return batches


def text_windows(tokenizer: Any, text: str, count: int, length: int) -> Tensor:
    """``count`` windows of the text, spread evenly over it: int64 [count, length].

    Each is ``length`` tokens with those that the tokenizer puts before and after a sequence; there
    is no padding. ValueError that says how many windows there are, where they are too few.
    """
    start = text.lstrip()[:200]
    marked, plain = (tokenizer(start, add_special_tokens=s)["input_ids"] for s in (True, False))
    before = next(
        (i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), len(marked)
    )
    prefix, suffix = marked[:before], marked[before + len(plain) :]
    body = length - len(prefix) - len(suffix)
    if body < 1:
        least = length - body + 1
        raise ValueError(f"--seqlen must be at least {least} for this tokenizer, got {length}")
    # verbose=False: no warning that the text is longer than the model takes, it is cut here.
    tokens = torch.tensor(
        tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"],
        dtype=torch.int64,
        device="cpu",
    )
    there = len(tokens) // body
    if there < count:
        raise ValueError(
            f"DATA must hold {count} windows of {length} tokens, got {there} ({len(tokens)} "
            "tokens): give more text, or lower --nsamples or --seqlen"
        )
    taken = tokens[: there * body].view(there, body)[
        torch.arange(count, device="cpu") * there // count
    ]
    ends = (
        torch.tensor(end, dtype=torch.int64, device="cpu").expand(count, -1)
        for end in (prefix, suffix)
    )
    first, last = ends
    return torch.cat([first, taken, last], 1)


def _text(path: Path, source: Source, nsamples: int, seqlen: int) -> Tensor:
    if source.directory is None:
        raise ValueError(f"DATA must be module:loader for a model from module:factory, got {path}")
    config = source.model.config
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(f"DATA must be module:loader for an encoder-decoder model, got {path}")
    most = getattr(config, "max_position_embeddings", None)
    if isinstance(most, int) and 0 < most < seqlen:
        raise ValueError(f"--seqlen must be at most the model's {most} positions, got {seqlen}")
    tokenizer = source.tokenizer()
    if tokenizer is None:
        raise FileNotFoundError(f"MODEL must hold a tokenizer for text, got {source.directory}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"DATA must be UTF-8 text, got {path}: {error}") from error
    return text_windows(tokenizer, text, nsamples, seqlen)


def _pretrained(folder: Path, auto_class: str | None, dtype: torch.dtype, quiet: bool) -> Source:
    if not (folder / "config.json").exists():
        raise FileNotFoundError(f"MODEL must hold a config.json, got {folder}")
    transformers = _transformers()
    if quiet:
        transformers.utils.logging.disable_progress_bar()
    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    chosen = _auto_class(transformers, config, auto_class)
    model = chosen.from_pretrained(folder, config=config, dtype=dtype, local_files_only=True)
    return Source(model.eval(), folder)


def _auto_class(transformers: Any, config: Any, name: str | None) -> Any:
    """The named class, or the one whose model for this configuration is its architecture."""
    known = sorted(n for n in dir(transformers) if n.startswith("AutoModel"))
    if name is not None:
        if name not in known:
            raise ValueError(f"--auto-class must be one of {', '.join(known)}, got {name!r}")
        return getattr(transformers, name)
    for architecture in config.architectures or ():
        for candidate in known:
            found = getattr(transformers, candidate)._model_mapping.get(type(config), None)
            models = found if isinstance(found, (tuple, list)) else (found,)
            if architecture in [getattr(model, "__name__", None) for model in models]:
                return getattr(transformers, candidate)
    if config.architectures:
        raise ValueError(
            f"--auto-class must be given for the architecture {config.architectures[0]}, which is "
            f"that of none of transformers' classes for {type(config).__name__}"
        )
    return transformers.AutoModel


def _imported(argument: str, name: str) -> Any:
    """What ``module:attribute`` names; the current directory is searched as well."""
    module_name, _, path = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # it is there, but something that it imports is not
        raise ImportError(f"{argument} must name a module that exists, got {module_name}") from None
    for part in path.split("."):
        if not hasattr(found, part):
            raise ImportError(f"{argument} must name what {module_name} has, got {path}")
        found = getattr(found, part)
    if not callable(found):
        raise TypeError(f"{argument} {name} must be callable, got {type(found).__name__}")
    return found


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            "transformers is needed for Hugging Face directories: pip install adaround_ext[demo]"
        ) from error
    return transformers
