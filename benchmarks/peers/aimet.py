"""Exports for AIMET beside AIMET itself: do both compute the same?

PYTHON is that of an environment with aimet-onnx, which ours is not.
"""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from adaround_ext import ActivationConfig, quantize_
from adaround_ext.export.aimet import export_aimet
from adaround_ext.export.runner import output_tensors
from adaround_ext.export.torch_export import bind
from adaround_ext.tracing.arguments import Arguments
from benchmarks import common
from benchmarks.common import Target
from benchmarks.workloads import digits, minilm

GROUPS = {"bits": 3, "symmetric": False, "granularity": "per_group"}
TENSOR = {"bits": 8, "symmetric": False, "granularity": "per_tensor"}


def cases() -> Iterator[tuple[str, nn.Module, Any, str]]:
    """Name, quantized model, batch that it has not seen, version of the encodings."""
    data = digits.load()
    for kind in ("residual", "separable"):
        net = digits.trained(kind)
        for name, settings in (
            ("4 bits", {"bits": 4}),
            ("8 bits asymmetric per tensor", TENSOR),
            ("4 bits, activations 8 bits", {"bits": 4, "activations": ActivationConfig(bits=8)}),
        ):
            model = quantized(net, [data.training_images[:256]], **settings)
            yield f"digits {kind}, {name}", model, data.test_images[:1], "1.0.0"
    encoder, tokenizer = minilm.load_encoder()
    batches = minilm.text_batches(tokenizer, sequences=32)
    held_out = minilm.text_batches(tokenizer, "held_out", sequences=8)[0]
    held_out["attention_mask"] = torch.ones_like(held_out["input_ids"])
    yield "MiniLM, 4 bits", quantized(encoder, batches, bits=4), held_out, "1.0.0"
    model = quantized(encoder, batches, group_size=32, **GROUPS)
    for version in ("1.0.0", "2.0.0"):
        yield f"MiniLM, 3 bits asymmetric, groups, {version}", model, held_out, version


def quantized(model: nn.Module, batches: list[Any], **settings: Any) -> nn.Module:
    """A quantized copy."""
    model = copy.deepcopy(model)
    quantize_(model, batches, preset="fast", progress=False, **settings)
    return model


@torch.no_grad()
def write(folder: Path, model: nn.Module, batch: Any, version: str) -> None:
    """The export, and beside it a batch and what the simulated model makes of it."""
    export_aimet(model, batch, folder, version=version)
    args, kwargs = Arguments(model, "batch").of(batch)
    arrays = {f"in {name}": x.numpy() for name, x in bind(model, args, kwargs).items()}
    for index, output in enumerate(output_tensors(model.eval()(*args, **kwargs))):
        arrays[f"out {index}"] = output.numpy()
    np.savez(folder / "batch.npz", **arrays)


def measure(python: Path) -> list[dict[str, Any]]:
    """A row for each case."""
    with tempfile.TemporaryDirectory() as name:
        exports, result = Path(name) / "exports", Path(name) / "result.json"
        exports.mkdir()
        for case, model, batch, version in cases():
            common.note(case)
            write(exports / case, model, batch, version)
        script = common.FOLDER / "peers" / "aimet_encodings.py"
        subprocess.run([str(python), str(script), str(exports), str(result)], check=True)
        errors: dict[str, dict[str, float]] = json.loads(result.read_text())
    return [{"case": case} | row for case, row in errors.items()]


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks aimet", description=__doc__)
    parser.add_argument("python", type=Path, metavar="PYTHON")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    facts = common.machine_facts(torch.device("cpu"))
    rows = measure(options.python)
    table = [[row["case"], f"{row['moved']:.1e}", f"{row['aimet']:.1e}"] for row in rows]
    header = ["model", "weights moved", "AIMET, with encodings"]
    common.print_table("Relative error against the simulated model", header, table)
    weights = [row for row in rows if "activations" not in row["case"]]
    targets = [
        Target("largest relative error in AIMET", max(r["aimet"] for r in weights), most=1e-5),
        Target("least effect of moved weights", min(r["moved"] for r in rows), least=1e-4),
    ]
    common.conclude(options.output, "aimet", facts, rows, targets)
