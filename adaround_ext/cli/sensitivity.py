"""Command ``adaround-ext sensitivity``, and what quantize does with its file."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaround_ext.cli.options import check_parent
from adaround_ext.cli.show import Output
from adaround_ext.cli.sources import load_inputs
from adaround_ext.export.goal.goal import Goal
from adaround_ext.mixed_precision import sensitivity as sensitivities
from adaround_ext.mixed_precision.assign import check_budget
from adaround_ext.mixed_precision.result import Sensitivity

Bits = dict[str, dict[str, Any] | str]


def sensitivity(args: Namespace) -> Output:
    """Measures layers at several bits; what was measured is the document."""
    check_parent("--output", args.output)
    if args.average_bits is not None:
        check_budget(args.average_bits, args.widths)
    torch.manual_seed(args.seed)
    source, data = load_inputs(args)
    with source.without_cache():
        measured = sensitivities.sensitivity(
            source.model,
            data,
            args.widths,
            average_bits=args.average_bits,
            overrides=args.overrides,
            batch_norm="keep",  # as quantize does
            batches=args.batches,
            progress=not args.quiet,
            **args.settings,
        )
    text = str(measured)
    if args.output is not None:
        measured.save(args.output)
        text += f"\nwritten to {args.output}, for quantize --layer-bits"
    return measured.to_dict(), "" if args.quiet else text


def layer_bits(path: str, average_bits: float | None) -> Bits:
    """Overrides from a file of ``sensitivity``, for this budget or the file's.

    ValueError naming --layer-bits or --average-bits.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"--layer-bits must be a file of sensitivity, got {path}")
    measured = Sensitivity.load(path)
    if average_bits is None and measured.average_bits is None:
        rule = "--average-bits must be given, here or to sensitivity"
        raise ValueError(f"{rule}, got none in {path}")
    return dict(measured.overrides(average_bits))


def without_left(bits: Bits, model: nn.Module, export_for: str | None) -> Bits:
    """Without the layers that the target leaves alone."""
    left = Goal(export_for, model).left_names() if bits else set()
    return {name: value for name, value in bits.items() if name not in left}
