"""Data that the command line names, and in what order models and data are looked at."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.checks import device_here
from adaround_ext.cli.models import NAME, NamedModel, Source, imported, name_model
from adaround_ext.cli.options import DTYPES
from adaround_ext.export.goal.targets import EXPORT_TARGETS
from adaround_ext.tensors import converted

Batches = Callable[[], Iterable[Any]]


def check_data(name: str | None) -> None:
    """Raises what :func:`name_data` does for a name that is none, before any model is looked at."""
    if name is None or Path(name).expanduser().is_file():
        return
    if not NAME.fullmatch(name):
        raise FileNotFoundError(
            f"DATA must be a text file or module:loader, got {name!r}, which is neither"
        )
    imported("DATA", name)


def name_data(
    name: str, model: NamedModel, *, nsamples: int, seqlen: int, batch_size: int
) -> Batches:
    """How to get batches of a text file, for a model with a tokenizer, or of ``module:loader``.

    A text is read and cut before the model is in memory, a loader is called afterwards. Raises
    ValueError, FileNotFoundError, ImportError and TypeError that name DATA or the option.
    """
    check_data(name)
    path = Path(name).expanduser()
    if path.is_file():
        rows = _text(path, model, nsamples, seqlen)
        return lambda: [{"input_ids": batch} for batch in rows.split(batch_size)]
    loader = imported("DATA", name)

    def batches() -> Iterable[Any]:
        loaded = loader()
        if isinstance(loaded, (str, bytes)) or not isinstance(loaded, Iterable):
            rule = f"DATA {name} must return an iterable of batches"
            raise TypeError(f"{rule}, got {type(loaded).__name__}")
        return loaded

    return batches


def load_inputs(args: Namespace) -> tuple[Source, Iterable[Any]]:
    """The model and the data that a command names; no data where it names none.

    All that can be wrong without the model's weights is looked at before they are read.
    """
    check_data(args.data)
    device = args.device
    if device is not None:
        device = str(device_here(device))
    named = name_model(args.model, args.auto_class)
    batches: Batches = tuple
    if args.data is not None:
        sizes = {name: getattr(args, name) for name in ("nsamples", "seqlen", "batch_size")}
        batches = name_data(args.data, named, **sizes)
    dtype = None if args.dtype is None else DTYPES[args.dtype]
    target = None if args.export_for is None else EXPORT_TARGETS[args.export_for]
    if dtype is None and target is not None and torch.bfloat16 not in target.dtypes:
        # As quantize_ would make it, but without a copy in bfloat16 first.
        of_files = getattr(named.config, "dtype", None)
        dtype = torch.float32 if of_files == torch.bfloat16 else None
    source = named.load(dtype, device, args.quiet)
    return source, in_dtype_of(source, batches())


def load_data(
    name: str, source: Source, *, nsamples: int, seqlen: int, batch_size: int
) -> Iterable[Any]:
    """The batches of :func:`name_data` for a model in memory."""
    sizes = {"nsamples": nsamples, "seqlen": seqlen, "batch_size": batch_size}
    return in_dtype_of(source, name_data(name, source.named, **sizes)())


def in_dtype_of(source: Source, batches: Iterable[Any]) -> Iterable[Any]:
    """Floating-point tensors as a half-precision model of transformers takes them.

    A loader need not know the dtype of the files.
    """
    dtype = getattr(source.model, "dtype", None) if source.pretrained else None
    if dtype not in (torch.float16, torch.bfloat16):
        return batches
    return converted(batches, (torch.float32, torch.float64), dtype)


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


def _text(path: Path, model: NamedModel, nsamples: int, seqlen: int) -> Tensor:
    if model.origin is None:
        raise ValueError(f"DATA must be module:loader for a model from module:factory, got {path}")
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"DATA must be module:loader for an encoder-decoder model, got {path}")
    _check_length(model, seqlen)
    if model.tokenizer is None:
        raise FileNotFoundError(f"MODEL must hold a tokenizer for text, got {model.origin}")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"DATA must be UTF-8 text, got {path}: {error}") from error
    return text_windows(model.tokenizer, text, nsamples, seqlen)


def _check_length(model: NamedModel, seqlen: int) -> None:
    """ValueError unless the model has as many positions for tokens."""
    config = model.config
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or most < 1:
        return
    padding = 0
    if most - seqlen <= max(getattr(config, "pad_token_id", None) or 0, 1):
        padding = _padding_positions(model)
    if seqlen > most - padding:
        also = f" ({most} with those of padding)" if padding else ""
        raise ValueError(
            f"--seqlen must be at most the model's {most - padding} positions{also}, got {seqlen}"
        )


def _padding_positions(model: NamedModel) -> int:
    """How many come before the first token's: RoBERTa and its kin count on from padding's."""
    with torch.device("meta"):
        built: nn.Module = model.auto.from_config(model.config)
    for name, module in built.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0
