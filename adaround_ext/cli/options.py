"""Values of options that argparse does not know: settings of layers, sizes, names."""

from __future__ import annotations

import argparse
import math
import os
import re
from pathlib import Path
from typing import Any

import torch

from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.config import make_config
from adaround_ext.export.goal.targets import EXPORT_TARGETS

Change = tuple[str, dict[str, Any] | str]  # pattern, and settings or "skip"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_WORDS: dict[str, Any] = {"none": None, "true": True, "false": False}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?", re.IGNORECASE)
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}


def size(text: str) -> int:
    """Bytes of "512M", "1.5 GiB" or "1000000"; units are powers of 1024."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise argparse.ArgumentTypeError(f"must be a size such as 512M or 2G, got {text!r}")
    return int(float(match[1]) * 1024 ** _UNITS[match[2].lower()])


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


def group_size(text: str) -> int:
    """Columns that share a scale; -1, as other tools have it, is a scale a channel."""
    return -1 if text == "-1" else positive(text)


def widths(text: str) -> tuple[int, ...]:
    """Bits of "2,3,4"."""
    return tuple(positive(width.strip()) for width in text.split(","))


def path(text: str) -> str:
    """A file or folder, which may begin with ~."""
    return os.path.expanduser(text)


def check_parent(option: str, name: str | None) -> None:
    """FileNotFoundError for a file that is to be written where there is no directory."""
    if name is not None and not Path(name).absolute().parent.is_dir():
        raise FileNotFoundError(f"{option} must be in a directory that exists, got {name}")


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
    for setting in settings.split(","):
        key, colon, value = setting.partition(":")
        key = key.strip().replace("-", "_")
        if not (key and colon and value.strip()):
            raise argparse.ArgumentTypeError(f"must have KEY:VALUE after =, got {setting!r}")
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


def settings(
    args: argparse.Namespace,
) -> tuple[dict[str, Any], dict[str, dict[str, Any] | str]]:
    """The settings of all layers that were given, and the changes by pattern, in their order.

    Of one pattern's settings the later ones win. Raises ValueError and TypeError, as the
    configuration itself, for values that it does not take.
    """
    chosen: dict[str, Any] = {"preset": args.preset, "steps": args.steps, "seed": args.seed}
    if args.bits is not None:
        chosen["bits"] = args.bits
    if args.per_tensor:
        chosen["granularity"] = "per_tensor"
    elif args.group_size == -1:
        chosen |= {"granularity": "per_channel", "group_size": None}
    elif args.group_size is not None:
        chosen |= {"granularity": "per_group", "group_size": args.group_size}
    if args.asymmetric:
        chosen["symmetric"] = False
    if args.narrow_range:
        chosen["narrow_range"] = True
    if args.scale_dtype is not None:
        chosen["scale_dtype"] = DTYPES[args.scale_dtype]
    config = make_config(None, chosen)
    if args.export_for is not None:
        target = EXPORT_TARGETS[args.export_for]
        target.check_config(make_config(None, target.choices | chosen))
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
    return chosen, changes


def activations(args: argparse.Namespace) -> ActivationConfig | None:
    """How activations are quantized, if they are."""
    target = None if args.export_for is None else EXPORT_TARGETS[args.export_for]
    if args.activation_bits is None:
        if args.activation_symmetric or args.activation_ranges is not None:
            raise ValueError("--activation-bits must be given with options of activations")
        return None
    config = ActivationConfig(
        bits=args.activation_bits,
        symmetric=args.activation_symmetric or bool(target and not target.activation_zero_points),
        ranges=args.activation_ranges or "mse",
    )
    if target is not None:
        target.check_activations(config)
    return config


# What Python calls settings, in messages, and what the command line has for them.
_IN_PYTHON = (
    (r"""by overrides, as \{"(.+?)": \{"granularity": "per_channel", "group_size": None\}\}""",
     r"by --group-size, or --override '\1=group_size:-1'"),
    (r"""granularity=["']per_group["'], group_size=(\d+)""", r"--group-size \1"),
    (r"""granularity=["']per_channel["']""", "--group-size -1"),
    (r"an even group_size", "an even --group-size"),
    (r"symmetric=True for activations", "--activation-symmetric"),
    (r"with symmetric=True", "without --asymmetric"),
    (r"^symmetric must be True (for .*), got False", r"--asymmetric must be left out \1"),
    (r"^activations must be None (for .*), got .*", r"--activation-bits must be left out \1"),
    (r"^activations must be symmetric (for .*), got .*",
     r"--activation-symmetric must be given \1"),
    (r"^activations must be of", "--activation-bits must be"),
    (r"scale_dtype=(?:torch\.)?(\w+)", r"--scale-dtype \1"),
    (r"narrow_range=True", "--narrow-range"),
    (r"; convert the model before it is quantized", "; quantize with --dtype float32"),
    (r', but for others="float",', ""),
    (r"^export_for=", "--for "),
    (r"^(bits|steps|seed|device|scale_dtype|average_bits)(?= must)|"
     r"\b(checkpoint_dir|cache_dir|memory_budget)\b",
     lambda match: f"--{match[0].replace('_', '-')}"),
)  # fmt: skip


def as_options(message: str) -> str:
    """A message of the library with the command line's options for Python's settings."""
    for pattern, option in _IN_PYTHON:
        message = re.sub(pattern, option, message)
    return message
