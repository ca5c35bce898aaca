"""Entry point: ``adaround-ext COMMAND``, run, with its result on standard output."""

from __future__ import annotations

import json
import logging
import os
import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from math import isfinite
from typing import Any

import torch

from adaround_ext.cli.options import activations, as_options, settings
from adaround_ext.cli.parser import make_parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; returns 0, 1 after an error, 130 on Ctrl-C. SystemExit(2) for bad usage."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if hasattr(args, "changes"):
        try:
            args.settings, args.overrides = settings(args)
            if hasattr(args, "activation_bits"):
                args.activations = activations(args)
        except (TypeError, ValueError) as error:
            args.parser.error(as_options(str(error)))
    try:
        # Standard output is for the result alone, whatever models and loaders print.
        with redirect_stdout(sys.stderr), _process_as_before():
            document, text, *ok = args.command(args)
        if args.json and document is not None:
            text = json.dumps(_strict(document), indent=2, allow_nan=False)
        if text:
            print(text, flush=True)
    except KeyboardInterrupt:
        print(f"{args.parser.prog}: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader has seen enough; nothing more goes there, also at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if args.debug:
            traceback.print_exc()
        print(f"{args.parser.prog}: error: {_line(error)}", file=sys.stderr)
        return 1
    return 0 if all(ok) else 1


@contextmanager
def _process_as_before() -> Iterator[None]:
    """For those who call :func:`main` from a program of theirs: what commands set comes back."""
    path = list(sys.path)
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    bars = _progress_bars()
    logger = logging.getLogger("adaround_ext")
    logger.addFilter(_no_warning)  # the summary has it
    try:
        with torch.random.fork_rng(list(devices)):
            yield
    finally:
        logger.removeFilter(_no_warning)
        sys.path[:] = path
        if bars != _progress_bars():
            sys.modules["transformers.utils.logging"].enable_progress_bar()


def _no_warning(record: logging.LogRecord) -> bool:
    return record.levelno != logging.WARNING


def _progress_bars() -> bool:
    """Whether transformers shows them, which --quiet switches off."""
    module = sys.modules.get("transformers.utils.logging")
    return module is None or module.is_progress_bar_enabled()


def _line(error: Exception) -> str:
    """An error in one line; with its type where the message alone may say little."""
    text = as_options(" ".join(str(error).split()))
    if type(error) in (ValueError, TypeError, ImportError, FileNotFoundError) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _strict(value: Any) -> Any:
    """With None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {name: _strict(item) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return None if isinstance(value, float) and not isfinite(value) else value
