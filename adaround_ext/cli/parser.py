"""Parser: what each command takes, and its help."""

from __future__ import annotations

import argparse
from typing import Any

import adaround_ext.cli.arguments as add
from adaround_ext.cli.commands import compare, env, inspect, quantize
from adaround_ext.cli.deploy import export, verify
from adaround_ext.cli.options import path
from adaround_ext.cli.sensitivity import sensitivity
from adaround_ext.ops.library import build_info

_COMMANDS = {
    "quantize": quantize,
    "export": export,
    "verify": verify,
    "sensitivity": sensitivity,
    "inspect": inspect,
    "compare": compare,
    "env": env,
}
_QUANTIZE = """Quantizes the weights of all Linear and convolution layers of a model with AdaRound.

The output directory gets the model with its quantized weights as floating point (a Hugging Face
directory again, with the tokenizer; else model.safetensors of the state dict), the codes
(adaround.safetensors, adaround.json), report.json and report.html. It appears when all of it is
written; adaround-ext export goes on from there. Batch norms are kept as they are: the weights must
fit the class of the model."""
_QUANTIZE_EXAMPLES = """examples:
  adaround-ext quantize ./Llama --data wiki.txt --output ./Llama-w4 --group-size 128 --skip lm_head
  adaround-ext quantize ./Llama --data wiki.txt --output ./Llama-vllm --for vllm
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
  adaround-ext export out --for vllm
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
_SENSITIVITY = """Measures what quantizing each layer alone costs the model's outputs, at several
bits, and with --average-bits chooses bits for each layer under that budget. The table has the worst
layers first; the JSON file is for quantize --layer-bits, which gives layers their bits."""
_SENSITIVITY_EXAMPLES = """examples:
  adaround-ext sensitivity ./bert --data text.txt --bits 2,3,4 --average-bits 3 --output bits.json
  adaround-ext quantize ./bert --data text.txt --output out --layer-bits bits.json"""
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
    subparsers = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    command = _command(subparsers, "quantize", "quantize a model", _QUANTIZE, _QUANTIZE_EXAMPLES)
    add.add_target(command)
    add.add_model(command, needs_data=True)
    add.add_grid(command)
    add.add_layer_bits(command)
    add.add_activations(command)
    add.add_method(command)
    add.add_output(command)

    command = _command(subparsers, "export", "write deployable formats", _EXPORT, _EXPORT_EXAMPLES)
    add.add_run(command)
    add.add_export(command)

    command = _command(subparsers, "verify", "prove exported models", _VERIFY, _VERIFY_EXAMPLES)
    add.add_run(command)
    add.add_verify(command)

    texts = "which layers hurt", _SENSITIVITY, _SENSITIVITY_EXAMPLES
    command = _command(subparsers, "sensitivity", *texts)
    add.add_sensitivity(command)
    add.add_model(command, needs_data=True)
    add.add_grid(command, bits=False)
    command.set_defaults(steps=None, export_for=None)

    command = _command(
        subparsers, "inspect", "what would be quantized", _INSPECT, _INSPECT_EXAMPLES
    )
    add.add_target(command)
    add.add_model(command, needs_data=False)
    add.add_grid(command)
    command.set_defaults(preset="balanced", steps=None, seed=0, quiet=False)

    command = _command(subparsers, "compare", "two reports", _COMPARE, _COMPARE_EXAMPLES)
    for name in ("a", "b"):
        text = "a report.json, or the directory that quantize wrote it to"
        command.add_argument(name, type=path, metavar=name.upper(), help=text)

    _command(subparsers, "env", "versions and devices", _ENV, _ENV_EXAMPLES)
    return parser


def _command(
    subparsers: Any, name: str, short: str, description: str, examples: str
) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = subparsers.add_parser(
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
