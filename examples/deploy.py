"""Quantized models through every export format, run in the runtimes that load them.

MiniLM's encoder (trained weights) and the two digits CNNs, at several settings: which formats hold
them and which refuse, with the reason; how many bytes they take; and how the outputs on held-out
data differ from the simulated model's, by runtime. Every run that promises equality must keep to a
relative error of 1e-5.

    python -m examples.deploy [--models minilm residual separable] [--quick] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaround_ext import ActivationConfig, export_model, quantize_, verify
from adaround_ext.export import FORMATS
from adaround_ext.export.parity import TOLERANCE, RunnerParity
from adaround_ext.export.quantized_layers import quantized_layers
from adaround_ext.export.runner import module_runner
from adaround_ext.tracing.arguments import Arguments
from benchmarks import common
from benchmarks.common import Options, Target
from benchmarks.workloads import digits, minilm

MODELS = ("minilm", "residual", "separable")
PACKAGES = (
    "onnx",
    "onnxruntime",
    "openvino",
    "compressed-tensors",
    "transformers",
    "torchao",
    "gguf",
)
GROUPS = {"granularity": "per_group", "scale_dtype": torch.float16}
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "minilm": {
        "4 bits, a scale a channel": {"bits": 4},
        "4 bits, groups of 32, float16 scales": {"bits": 4, "group_size": 32, **GROUPS},
        "4 bits, groups of 128, asymmetric": {
            **{"bits": 4, "group_size": 128, "symmetric": False},
            **GROUPS,
        },
        "8 bits, groups of 32, float16 scales": {"bits": 8, "group_size": 32, **GROUPS},
        "3 bits, a scale a channel": {"bits": 3},
        "2 bits, a scale a channel": {"bits": 2},
        "8 bits, quantized activations": {"bits": 8, "activations": ActivationConfig(bits=8)},
    },
    "residual": {
        "4 bits, a scale a channel": {"bits": 4},
        "3 bits, a scale a tensor": {"bits": 3, "granularity": "per_tensor"},
        "8 bits, narrow, quantized activations": {
            **{"bits": 8, "narrow_range": True},
            "activations": ActivationConfig(bits=8),
        },
    },
}
SETTINGS["separable"] = SETTINGS["residual"]
Row = dict[str, Any]


def load(name: str, quick: bool) -> tuple[nn.Module, list[Any], list[Any]]:
    """A trained model in full precision, its calibration batches, and others to compare on."""
    if name == "minilm":
        encoder, tokenizer = minilm.load_encoder()
        sequences = 32 if quick else 320
        calibration = minilm.text_batches(tokenizer, "calibration", sequences=sequences)
        held_out = [
            {**batch, "attention_mask": torch.ones_like(batch["input_ids"])}
            for size, length in ((8, 32), (3, 50))
            for batch in minilm.text_batches(
                tokenizer, "held_out", sequences=size, length=length, batch_size=size
            )
        ]
        return encoder, calibration, held_out
    images = digits.load()
    model = digits.trained(name, epochs=1 if quick else None)  # type: ignore[arg-type]
    return model, [images.training_images[:256]], [images.test_images[:97], images.test_images[97:]]


def rows_of(name: str, quick: bool) -> Iterator[Row]:
    """A row for every setting and format: bytes and runs, or the reason of a refusal."""
    for title, settings in SETTINGS[name].items():
        model, calibration, batches = load(name, quick)
        common.note(f"{name}, {title}")
        if name == "minilm":
            settings = settings | {"overrides": {"pooler": "skip"}}
        quantize_(model, calibration, preset="fast", progress=False, **settings)
        if "activations" in settings:
            yield {"model": name, "settings": title, "format": None, "drift": drift(model, batches)}
        for kind in FORMATS:
            with tempfile.TemporaryDirectory() as folder:
                yield {"model": name, "settings": title, "format": kind} | exported(
                    model, kind, Path(folder) / kind, batches
                )


@torch.no_grad()
def drift(model: nn.Module, batches: Sequence[Any], draws: int = 5) -> float:
    """How far the simulated model's own outputs move, relatively, at most.

    All parameters that are not quantized change by a relative 1e-7, the size of float32's last
    bits: with quantized activations some values then cross a rounding threshold.
    """
    quantized = {id(layer.matrix.layer.weight) for layer in quantized_layers(model)}
    reader = Arguments(model, "batch")
    given = [reader.of(batch) for batch in batches]
    want = [module_runner("", model).run(*arguments) for arguments in given]
    drifts = []
    for seed in range(draws):
        generator = torch.Generator().manual_seed(seed)
        other = copy.deepcopy(model)
        for parameter, original in zip(other.parameters(), model.parameters(), strict=True):
            if id(original) not in quantized:
                parameter *= 1 + 1e-7 * torch.randn(original.shape, generator=generator)
        got = [module_runner("", other).run(*arguments) for arguments in given]
        for left, right in zip(chain(*got), chain(*want), strict=True):
            drifts.append(float((left - right).norm() / right.norm()))
    return max(drifts)


def exported(model: nn.Module, kind: str, folder: Path, batches: Sequence[Any]) -> Row:
    """What became of one format."""
    try:
        export_model(model, folder, kind, batch=batches[0])
    except (TypeError, ValueError) as error:
        return {"refused": str(error)}
    report = verify(model, [folder], batches)
    row: Row = {
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "runs": [plain(run) for run in report.runs],
    }
    if kind == "onnx":
        from adaround_ext.export.onnx.runner import matmul_nbits

        row["matmul_nbits"] = matmul_nbits(folder)
    return row


def plain(run: RunnerParity) -> Row:
    """The worst output of one way of running it."""
    agreements = [o.agreement for o in run.outputs if o.agreement is not None]
    return {
        "runner": run.runner,
        "exact": run.exact,
        "note": run.note,
        "relative_error": run.relative_error,
        "max_error": max(output.max_error for output in run.outputs),
        "argmax_agreement": min(agreements, default=None),
    }


def targets(rows: Sequence[Row]) -> list[Target]:
    """What was promised: equality, and fused 4-bit products in ONNX Runtime."""
    runs = [run for row in rows for run in row.get("runs", ()) if run["exact"]]
    worst = max((run["relative_error"] for run in runs), default=0.0)
    counts = [row["matmul_nbits"] for row in rows if row.get("matmul_nbits")]
    products, fused = (sum(count[k] for count in counts) for k in ("products", "matmul_nbits"))
    return [
        Target(f"worst relative error of {len(runs)} exact runs", worst, most=TOLERANCE),
        Target(f"of {products} 4-bit Linears fused by ONNX Runtime", fused, least=products),
    ]


def show(rows: Sequence[Row]) -> None:
    """The rows as a table for people, and the refusals."""
    cells = []
    for row in rows:
        where = f"{row['model']}, {row['settings']}"
        for run in row.get("runs", ()):
            kind = f"{row['format']}: {run['runner']}"
            agreement = run["argmax_agreement"]
            cells.append((where, kind, row["bytes"] / 1e6, run["relative_error"], agreement))
    common.print_table(
        "Exported against simulated models on held-out data",
        ("model", "format and runtime", "MB", "relative error", "argmax equal"),
        cells,
    )
    for row in rows:
        if "drift" in row:
            print(
                f"{row['model']}, {row['settings']}: parameters that change by 1e-7 move the "
                f"simulated model's outputs by up to {row['drift']:.2g}"
            )
        if "refused" in row:
            print(f"{row['model']}, {row['settings']}, {row['format']} refused: {row['refused']}")


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m examples.deploy", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS)
    parser.add_argument("--quick", action="store_true", help="little data and training")
    parser.add_argument("--output", type=Path, metavar="FILE")
    chosen = parser.parse_args(arguments)
    options = Options(torch.device("cpu"), quick=chosen.quick)
    facts = common.machine_facts(options.device)
    rows = [row for name in chosen.models for row in rows_of(name, chosen.quick)]
    show(rows)
    goals = targets(rows)
    common.print_targets(goals)
    values: Mapping[str, Any] = common.document("deploy", options, facts, rows, goals)
    path = chosen.output or common.FOLDER / "results" / facts["name"] / "deploy.json"
    common.write_json(path, {**values, "packages": {name: version(name) for name in PACKAGES}})


if __name__ == "__main__":
    main()
