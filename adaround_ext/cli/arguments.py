"""Arguments of the commands, by what they are about."""

from __future__ import annotations

import argparse

import adaround_ext.cli.options as options
from adaround_ext.activations.quantizer import RANGES
from adaround_ext.distributed import REDUCTIONS
from adaround_ext.export.formats import FORMATS
from adaround_ext.export.goal.targets import EXPORT_TARGETS
from adaround_ext.export.parity import TOLERANCE
from adaround_ext.replay.cache import MEMORY_BUDGET

Parser = argparse.ArgumentParser


def add_model(parser: Parser, needs_data: bool) -> None:
    """MODEL, what it is loaded as, and DATA."""
    report = "" if needs_data else "; or a report.json"
    parser.add_argument(
        "model",
        metavar="MODEL",
        type=options.path,
        help="local Hugging Face directory; org/name on the Hub; or module:factory, a callable "
        f"without arguments that returns a torch module (found from here too){report}",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=needs_data,
        type=options.path,
        metavar="DATA",
        help="calibration data: a UTF-8 text file, for models of transformers with a tokenizer, "
        "or module:loader, a callable that returns an iterable of batches"
        + ("" if needs_data else "; with it, layers are listed in the order in which they run"),
    )
    if needs_data:
        add_number(group, "--nsamples", 128, "windows of text, spread evenly over the file")
    add_number(group, "--seqlen", 512, "tokens of a window, special ones included")
    if needs_data:
        add_number(group, "--batch-size", 8, "windows of a batch")
    group = parser.add_argument_group("model")
    group.add_argument(
        "--auto-class",
        metavar="NAME",
        help="transformers' class to load with, such as AutoModelForCausalLM (default: the one "
        "that fits the architecture in config.json)",
    )
    text = "dtype of the model (default: that of its files; of a factory: as it is)"
    group.add_argument("--dtype", choices=tuple(options.DTYPES), help=text)
    text = "such as cuda or cuda:1 (default: cpu; of a factory: where it is)"
    group.add_argument("--device", metavar="DEVICE", help=text)


def add_number(
    group: argparse._ActionsContainer, name: str, default: int | None, text: str
) -> None:
    """A whole number from 1."""
    text = text if default is None else f"{text} (default: %(default)s)"
    group.add_argument(name, type=options.positive, default=default, metavar="N", help=text)


def add_target(parser: Parser) -> None:
    """--for, which chooses a grid."""
    _add_for(
        parser,
        f"where the model is to end: {', '.join(EXPORT_TARGETS)}. Chooses what that takes "
        "(grid, groups, dtype of scales, layers left alone) before anything is optimised, where "
        "other options leave it open, and refuses what cannot end there",
    )


def _add_for(group: argparse._ActionsContainer, text: str) -> None:
    choices = tuple(EXPORT_TARGETS)
    group.add_argument("--for", dest="export_for", choices=choices, metavar="TARGET", help=text)


def add_grid(parser: Parser, bits: bool = True) -> None:
    """Of the weights; of single layers."""
    group = parser.add_argument_group("grid")
    if bits:
        text = "bits of a weight, 2 to 8 (default: 4)"
        group.add_argument("--bits", type=int, metavar="N", help=text)
    else:
        parser.set_defaults(bits=None)
    scales = group.add_mutually_exclusive_group()
    scales.add_argument(
        "--group-size",
        type=options.group_size,
        metavar="N",
        help="a scale for every N columns of a row (default, and -1: a scale for each row)",
    )
    text = "one scale for the whole weight"
    scales.add_argument("--per-tensor", action="store_true", help=text)
    text = "codes from 0 with a zero point (default: signed codes, zero point 0)"
    group.add_argument("--asymmetric", "--asym", action="store_true", help=text)
    text = "signed codes without the lowest one, as TensorRT wants 8 bits"
    group.add_argument("--narrow-range", action="store_true", help=text)
    text = "dtype of scales (default: float32; of a model of transformers in 16 bits, its own)"
    group.add_argument("--scale-dtype", choices=tuple(options.DTYPES), help=text)
    group.add_argument(
        "--override",
        dest="changes",
        type=options.override,
        action="append",
        default=[],
        metavar="PATTERN=KEY:VALUE[,KEY:VALUE]|skip",
        help="other settings (fields of AdaRoundConfig) for layers whose name matches, or lies "
        "within a module that does: 'lm_head=bits:8', 'encoder.*.fc2=bits:8,group_size:64', "
        "'<first>=bits:8'; again for more, later ones win",
    )
    group.add_argument(
        "--skip",
        dest="changes",
        type=options.skip,
        action="append",
        metavar="PATTERN",
        help="leave matching layers alone, as in --skip lm_head; again for more",
    )


def add_layer_bits(parser: Parser) -> None:
    """What the command sensitivity measured."""
    group = parser.add_argument_group("bits of single layers")
    text = "what sensitivity wrote: gives each layer the bits chosen there; --override comes after"
    group.add_argument("--layer-bits", type=options.path, metavar="FILE", help=text)
    text = "of the weights, with --layer-bits (default: as given to sensitivity)"
    group.add_argument("--average-bits", type=float, metavar="X", help=text)


def add_activations(parser: Parser) -> None:
    """Simulated quantization of activations."""
    group = parser.add_argument_group("activations")
    text = "quantize activations too, simulated, to 2 to 16 bits (default: they stay floats)"
    group.add_argument("--activation-bits", type=int, metavar="N", help=text)
    text = "signed codes with zero point 0 (default: from 0, with a zero point)"
    group.add_argument("--activation-symmetric", action="store_true", help=text)
    text = "how ranges are chosen: %(choices)s (default: mse)"
    group.add_argument("--activation-ranges", choices=RANGES, help=text)


def add_method(parser: Parser) -> None:
    """How it is solved, and with what."""
    group = parser.add_argument_group("method")
    add_preset(group, "balanced")
    group.add_argument(
        "--mode",
        choices=("sequential", "parallel"),
        default="sequential",
        help="sequential: layers see the inputs that the quantized ones before them give; "
        "parallel: those of the full-precision model (default: %(default)s)",
    )
    text = "of AdaRound's annealing, which fast leaves out (default: the preset's)"
    group.add_argument("--steps", type=int, metavar="N", help=text)
    add_seed(group)
    text = f"memory for kept activations, the rest goes to disk (default: {MEMORY_BUDGET >> 20}M)"
    group.add_argument(
        "--memory-budget", type=options.size, default=MEMORY_BUDGET, metavar="SIZE", help=text
    )
    text = "folder for what goes to disk (default: the system's for temporary files)"
    group.add_argument("--cache-dir", type=options.path, metavar="DIR", help=text)
    text = "keep finished layers here: the same command goes on where it was stopped"
    group.add_argument("--checkpoint-dir", type=options.path, metavar="DIR", help=text)
    text = (
        "under torchrun: fast gives up that the codes are those of one process (default: ordered)"
    )
    group.add_argument("--reduction", choices=REDUCTIONS, default="ordered", help=text)


def add_preset(group: argparse._ActionsContainer, default: str) -> None:
    """--preset."""
    choices, text = ("fast", "balanced", "best"), "what time a lower error is worth"
    text = f"{text} (default: %(default)s)"
    group.add_argument("--preset", choices=choices, default=default, help=text)


def add_seed(group: argparse._ActionsContainer) -> None:
    """--seed."""
    text = "of everything that is drawn (default: %(default)s)"
    group.add_argument("--seed", type=int, default=0, metavar="N", help=text)


def add_sensitivity(parser: Parser) -> None:
    """What is measured, and where it goes."""
    text = "bits of a weight to measure, each 2 to 8 (default: 2,3,4,8)"
    parser.add_argument(
        "--bits", dest="widths", type=options.widths, default=(2, 3, 4, 8), metavar="N,N", help=text
    )
    text = "choose bits for each layer, with at most so many on average over the weights"
    parser.add_argument("--average-bits", type=float, metavar="X", help=text)
    group = parser.add_argument_group("method")
    add_preset(group, "fast")
    add_seed(group)
    add_number(group, "--batches", None, "batches to measure on (default: about 64 samples)")
    text = "JSON file to write, for quantize --layer-bits"
    parser.add_argument("--output", "-o", type=options.path, metavar="FILE", help=text)
    parser.add_argument("--quiet", action="store_true", help="no progress and no table")


def add_output(parser: Parser) -> None:
    """What quantize writes."""
    group = parser.add_argument_group("output")
    text = "directory to write, new or empty"
    group.add_argument("--output", "-o", required=True, type=options.path, metavar="DIR", help=text)
    text = "replace the directory of an earlier run"
    group.add_argument("--overwrite", action="store_true", help=text)
    text = "write the report's page here too"
    group.add_argument("--html", type=options.path, metavar="FILE", help=text)
    text = "no progress and no summary, errors only"
    group.add_argument("--quiet", action="store_true", help=text)


def add_run(parser: Parser) -> None:
    """RUN, and the model it came from."""
    text = "a directory that quantize wrote"
    parser.add_argument("run", metavar="RUN", type=options.path, help=text)
    text = "module:factory that the model came from; not for models of transformers"
    parser.add_argument("--model", metavar="MODULE:FACTORY", help=text)


def add_export(parser: Parser) -> None:
    """What export writes."""
    formats = parser.add_mutually_exclusive_group(required=True)
    formats.add_argument(
        "--format",
        nargs="+",
        choices=[*FORMATS, "all"],
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)} or all",
    )
    names = ", ".join(EXPORT_TARGETS)
    _add_for(formats, f"instead: the format that this takes, of {names}")
    text = "runtime that ONNX files are for: %(choices)s (default: ort, or as --for says)"
    parser.add_argument("--target", choices=("ort", "openvino", "tensorrt", "qnn"), help=text)
    text = "directory to write, new or empty (default: RUN/FORMAT)"
    parser.add_argument("--output", "-o", type=options.path, metavar="DIR", help=text)
    text = "as of quantize: its first batch is the example that models are traced with"
    parser.add_argument("--data", type=options.path, metavar="DATA", help=text)
    add_number(parser, "--seqlen", 32, "tokens of the example")
    parser.add_argument("--quiet", action="store_true", help="no summary, errors only")


def add_verify(parser: Parser) -> None:
    """What verify compares, and on what."""
    text = "exports written elsewhere (default: all that are in RUN)"
    parser.add_argument("exports", nargs="*", type=options.path, metavar="EXPORT", help=text)
    text = "inputs to compare on, as of quantize: a UTF-8 text file, or module:loader"
    parser.add_argument("--data", required=True, type=options.path, metavar="DATA", help=text)
    add_number(parser, "--nsamples", 8, "windows of text, spread evenly over the file")
    add_number(parser, "--seqlen", 512, "tokens of a window, special ones included")
    add_number(parser, "--batch-size", 8, "windows of a batch")
    text = "relative error that counts as equal (default: %(default)s)"
    parser.add_argument(
        "--tolerance", type=options.tolerance, default=TOLERANCE, metavar="X", help=text
    )
