"""The parser of the command line: what each command takes, and its help."""

from __future__ import annotations

import argparse
from typing import Any

from adaround_ext import cli_commands, cli_export
from adaround_ext import cli_options as options
from adaround_ext.distributed import REDUCTIONS
from adaround_ext.export.formats import FORMATS
from adaround_ext.export.parity import TOLERANCE
from adaround_ext.native import build_info

_COMMANDS = {
    "quantize": cli_commands.quantize,
    "export": cli_export.export,
    "verify": cli_export.verify,
    "inspect": cli_commands.inspect,
    "compare": cli_commands.compare,
    "env": cli_commands.env,
}
_QUANTIZE = """Quantizes the weights of all Linear and convolution layers of a model with AdaRound.

The output directory gets the model with its quantized weights as floating point (a Hugging Face
directory again, with the tokenizer; else model.safetensors of the state dict), the codes
(adaround.safetensors, adaround.json), report.json and report.html. It appears when all of it is
written; adaround-ext export goes on from there. Batch norms are kept as they are: the weights must
fit the class of the model."""
_QUANTIZE_EXAMPLES = """examples:
  adaround-ext quantize ./Llama --data wiki.txt --output ./Llama-w4 --group-size 128 --skip lm_head
  adaround-ext quantize nets:resnet --data nets:batches --output out --override '<first>=bits:8'
  torchrun --nproc-per-node 8 -m adaround_ext quantize ./Llama --data wiki.txt --output out \\
    --device cuda"""
_EXPORT = """Writes a quantized model, a directory that quantize wrote, in formats that runtimes
load, to RUN/FORMAT or --output. safetensors: packed codes and all else, for load_quantized. onnx:
QDQ with 4-bit and 8-bit integers. compressed-tensors: a Hugging Face directory for transformers,
vLLM and SGLang. torchao: tensors for torch.export and torch.compile. aimet: ONNX and encodings for
Qualcomm's tools. gguf: Q4_0 and Q8_0. all: every one that can hold the model; the others are listed
with the reason."""
_EXPORT_EXAMPLES = """examples:
  adaround-ext export out --format onnx
  adaround-ext export out --format onnx --target openvino --output out-openvino
  adaround-ext export out --format all --model nets:resnet --data nets:batches"""
_VERIFY = """Runs exported models in the runtimes that load them, beside the quantized model they
came from, and compares all outputs: largest and relative error, and how often the largest element
is at the same place. Where a runtime's defaults change the arithmetic, both figures are shown, with
the option that restores equality. Ends with status 1 where one that promises equality differs."""
_VERIFY_EXAMPLES = """examples:
  adaround-ext verify out --data text.txt
  adaround-ext verify out out-openvino --data nets:batches --model nets:resnet"""
_INSPECT = """Lists the layers of a model that would be quantized, with their shapes and their share
of all parameters, and the modules that would not, with reasons; or what a report.json says."""
_INSPECT_EXAMPLES = """examples:
  adaround-ext inspect ./Llama --skip lm_head
  adaround-ext inspect ./bert --data wiki.txt --seqlen 128
  adaround-ext inspect out/report.json"""
_COMPARE = "Puts two reports side by side: errors layer by layer, their ratios, time and memory."
_COMPARE_EXAMPLES = "example:\n  adaround-ext compare fast/report.json best/report.json"
_ENV = "Prints versions, how the package was built, devices, threads and the instruction set."
_ENV_EXAMPLES = "example:\n  adaround-ext env --json"
_EXIT = "exit status: 0 done, 1 failed, 2 wrong usage, 130 interrupted"


def make_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    description = "AdaRound: learned weight rounding for whole models."
    parser = argparse.ArgumentParser("adaround-ext", description=description, epilog=_EXIT)
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {build_info()['version']}"
    )
    found = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(found, "quantize", "quantize a model", _QUANTIZE, _QUANTIZE_EXAMPLES)
    _add_model(command, needs_data=True)
    _add_grid(command)
    _add_method(command)
    _add_output(command)

    command = _command(found, "export", "write deployable formats", _EXPORT, _EXPORT_EXAMPLES)
    _add_run(command)
    _add_export(command)

    command = _command(found, "verify", "prove exported models", _VERIFY, _VERIFY_EXAMPLES)
    _add_run(command)
    _add_verify(command)

    command = _command(found, "inspect", "what would be quantized", _INSPECT, _INSPECT_EXAMPLES)
    _add_model(command, needs_data=False)
    _add_grid(command)
    command.set_defaults(preset="balanced", steps=None, seed=0, quiet=False)

    command = _command(found, "compare", "two reports", _COMPARE, _COMPARE_EXAMPLES)
    for name in ("a", "b"):
        text = "a report.json, or the directory that quantize wrote it to"
        command.add_argument(name, metavar=name.upper(), help=text)

    _command(found, "env", "versions and devices", _ENV, _ENV_EXAMPLES)
    return parser


def _command(
    commands_: Any, name: str, short: str, description: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands_.add_parser(
        name,
        help=short,
        description=description,
        epilog=f"{examples}\n\n{_EXIT}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document, nothing else")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.set_defaults(command=_COMMANDS[name], parser=parser)
    return parser


def _add_model(parser: argparse.ArgumentParser, needs_data: bool) -> None:
    report = "" if needs_data else "; or a report.json"
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="local Hugging Face directory, or module:factory, a callable without arguments that "
        f"returns a torch module (found from the current directory too){report}",
    )
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        required=needs_data,
        metavar="DATA",
        help="calibration data: a UTF-8 text file, for Hugging Face directories with a tokenizer, "
        "or module:loader, a callable that returns an iterable of batches"
        + ("" if needs_data else "; with it, layers are listed in the order in which they run"),
    )
    if needs_data:
        group.add_argument(
            "--nsamples",
            type=options.positive,
            default=128,
            metavar="N",
            help="windows of text, spread evenly over the file (default: %(default)s)",
        )
    group.add_argument(
        "--seqlen",
        type=options.positive,
        default=512,
        metavar="N",
        help="tokens of a window, special ones included (default: %(default)s)",
    )
    if needs_data:
        group.add_argument(
            "--batch-size",
            type=options.positive,
            default=8,
            metavar="N",
            help="windows of a batch (default: %(default)s)",
        )
    group = parser.add_argument_group("model")
    group.add_argument(
        "--auto-class",
        metavar="NAME",
        help="transformers' class to load with, such as AutoModelForCausalLM (default: the one "
        "that fits the architecture in config.json)",
    )
    text = "dtype of the model (default: float32; of a factory: as it is)"
    group.add_argument("--dtype", choices=tuple(options.DTYPES), help=text)
    text = "such as cuda or cuda:1 (default: cpu; of a factory: where it is)"
    group.add_argument("--device", metavar="DEVICE", help=text)


def _add_grid(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("grid")
    text = "bits of a weight, 2 to 8 (default: %(default)s)"
    group.add_argument("--bits", type=int, default=4, metavar="N", help=text)
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


def _add_method(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("method")
    group.add_argument(
        "--preset",
        choices=("fast", "balanced", "best"),
        default="balanced",
        help="what time a lower error is worth (default: %(default)s)",
    )
    group.add_argument(
        "--mode",
        choices=("sequential", "parallel"),
        default="sequential",
        help="sequential: layers see the inputs that the quantized ones before them give; "
        "parallel: those of the full-precision model (default: %(default)s)",
    )
    text = "of AdaRound's annealing, which fast leaves out (default: the preset's)"
    group.add_argument("--steps", type=int, metavar="N", help=text)
    text = "of everything that is drawn (default: %(default)s)"
    group.add_argument("--seed", type=int, default=0, metavar="N", help=text)
    group.add_argument(
        "--memory-budget",
        type=options.size,
        default=options.size("512M"),
        metavar="SIZE",
        help="memory for kept activations, the rest goes to disk (default: 512M)",
    )
    text = "keep finished layers here: the same command goes on where it was stopped"
    group.add_argument("--checkpoint-dir", metavar="DIR", help=text)
    text = (
        "under torchrun: fast gives up that the codes are those of one process (default: ordered)"
    )
    group.add_argument("--reduction", choices=REDUCTIONS, default="ordered", help=text)


def _add_output(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("output")
    text = "directory to write, new or empty"
    group.add_argument("--output", "-o", required=True, metavar="DIR", help=text)
    text = "replace the directory of an earlier run"
    group.add_argument("--overwrite", action="store_true", help=text)
    group.add_argument("--html", metavar="FILE", help="write the report's page here too")
    text = "no progress and no summary, errors only"
    group.add_argument("--quiet", action="store_true", help=text)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="a directory that quantize wrote")
    text = "module:factory that the model came from; not for Hugging Face directories"
    parser.add_argument("--model", metavar="MODULE:FACTORY", help=text)


def _add_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--format",
        required=True,
        nargs="+",
        choices=[*FORMATS, "all"],
        metavar="FORMAT",
        help=f"{', '.join(FORMATS)} or all",
    )
    text = "runtime that ONNX files are for: %(choices)s (default: %(default)s)"
    targets = ("ort", "openvino", "tensorrt", "qnn")
    parser.add_argument("--target", choices=targets, default="ort", help=text)
    text = "directory to write, new or empty (default: RUN/FORMAT)"
    parser.add_argument("--output", "-o", metavar="DIR", help=text)
    text = "as of quantize: its first batch is the example that models are traced with"
    parser.add_argument("--data", metavar="DATA", help=text)
    text = "tokens of the example (default: %(default)s)"
    parser.add_argument("--seqlen", type=options.positive, default=32, metavar="N", help=text)
    parser.add_argument("--quiet", action="store_true", help="no summary, errors only")


def _add_verify(parser: argparse.ArgumentParser) -> None:
    text = "exports written elsewhere (default: all that are in RUN)"
    parser.add_argument("exports", nargs="*", metavar="EXPORT", help=text)
    text = "inputs to compare on, as of quantize: a UTF-8 text file, or module:loader"
    parser.add_argument("--data", required=True, metavar="DATA", help=text)
    for name, default, text in (
        ("--nsamples", 8, "windows of text, spread evenly over the file"),
        ("--seqlen", 512, "tokens of a window, special ones included"),
        ("--batch-size", 8, "windows of a batch"),
    ):
        text = f"{text} (default: %(default)s)"
        parser.add_argument(name, type=options.positive, default=default, metavar="N", help=text)
    text = "relative error that counts as equal (default: %(default)s)"
    parser.add_argument(
        "--tolerance", type=options.tolerance, default=TOLERANCE, metavar="X", help=text
    )
