"""Values of the command line that argparse does not know: settings of layers, sizes, names."""

from __future__ import annotations

import argparse
import math
import re
from typing import Any

import torch

from adaround_ext.config import AdaRoundConfig, make_config

Change = tuple[str, dict[str, Any] | str]  # pattern, and settings or "skip"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WORDS: dict[str, Any] = {"none": None, "true": True, "false": False}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size(text: str) -> int:
    """Bytes of "512M", "1.5 GiB" or "1000000"; units are powers of 1024."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 512M or 2G, got {text!r}")
    return int(float(found[1]) * 1024 ** _UNITS[found[2].lower()])


def positive(text: str) -> int:
    """A whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")
    return int(text)


def tolerance(text: str) -> float:
    """A finite number from 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"must be a finite number of at least 0, got {text!r}")
    return value


def group_size(text: str) -> int | None:
    """Columns that share a scale; -1, as other tools have it, is a scale a channel."""
    return None if text == "-1" else positive(text)


def skip(pattern: str) -> Change:
    """The change that leaves matching layers alone."""
    if not pattern:
        raise argparse.ArgumentTypeError("must be a pattern of layer names, got ''")
    return pattern, "skip"


def override(text: str) -> Change:
    """PATTERN=skip or PATTERN=KEY:VALUE[,KEY:VALUE], the keys fields of AdaRoundConfig.

    Lists are joined by +, as in starts:nearest+gptq. group_size alone also sets the granularity,
    and a granularity without groups also the group_size.
    """
    pattern, equals, settings = text.partition("=")
    if not (pattern and equals and settings):
        rule = "must be PATTERN=KEY:VALUE[,KEY:VALUE] or PATTERN=skip"
        raise argparse.ArgumentTypeError(f"{rule}, got {text!r}")
    if settings == "skip":
        return skip(pattern)
    values: dict[str, Any] = {}
    for part in settings.split(","):
        key, colon, value = part.partition(":")
        key = key.strip().replace("-", "_")
        if not (key and colon and value.strip()):
            raise argparse.ArgumentTypeError(f"must have KEY:VALUE after =, got {part!r}")
        values[key] = _value(key, value.strip())
    if "group_size" in values:
        values["group_size"] = None if values["group_size"] == -1 else values["group_size"]
        grouped = values["group_size"] is not None
        values.setdefault("granularity", "per_group" if grouped else "per_channel")
    elif values.get("granularity") in ("per_channel", "per_tensor"):
        values["group_size"] = None
    if values.get("bias") == "create":
        # The model that loads the files has no such parameter.
        raise argparse.ArgumentTypeError("must have refit or keep for bias, got 'create'")
    return pattern, values


def _value(key: str, text: str) -> Any:
    if key == "scale_dtype":
        return DTYPES.get(text, text)
    if key in ("starts", "beta") and text.lower() != "none":
        return tuple(_number(item) for item in text.split("+"))
    return _WORDS[text.lower()] if text.lower() in _WORDS else _number(text)


def _number(text: str) -> Any:
    for kind in (int, float):
        try:
            value = kind(text)
        except ValueError:
            continue
        if math.isfinite(value):
            return value
    return text


def settings(args: argparse.Namespace) -> tuple[AdaRoundConfig, dict[str, dict[str, Any] | str]]:
    """The configuration of all layers, and the changes by pattern, in the order they were given.

    Of one pattern's settings the later ones win. Raises ValueError and TypeError, as the
    configuration itself, for values that it does not take.
    """
    granularity = "per_tensor" if args.per_tensor else "per_channel"
    config = make_config(
        None,
        {
            "preset": args.preset,
            "bits": args.bits,
            "symmetric": not args.asymmetric,
            "narrow_range": args.narrow_range,
            "granularity": granularity if args.group_size is None else "per_group",
            "group_size": args.group_size,
            "steps": args.steps,
            "seed": args.seed,
        },
    )
    changes: dict[str, dict[str, Any] | str] = {}
    for pattern, change in args.changes:
        before = changes.pop(pattern, None)
        if isinstance(change, dict):
            try:
                make_config(config, change)
            except (TypeError, ValueError) as error:
                raise type(error)(f"argument --override: {pattern}: {error}") from None
            if isinstance(before, dict):
                change = {**before, **change}
        changes[pattern] = change
    return config, changes
