"""Whole models of known shapes in one call: seconds and memory, and NOTHING about accuracy.

Weights are random and data are synthetic, so no error here says anything about a trained model.
Each model is quantized in a process of its own, whose peak of memory is counted above the loaded
model, on CUDA also that of the device, with the model. Calibration data come from a generator, so
what is kept of them counts too. llama-tiny and llama-small are decoders of 2 and 4 layers,
calibrated with 64 sequences of 128 tokens, of which half are padded on the right; llama-8b has the
shape of Llama 3's, with 128 sequences of 2,048 tokens: for a GPU, in bfloat16.

    python -m examples.shapes [--models resnet18 resnet50 mobilenet_v2 llama-tiny llama-small]
        [--images 256] [--preset balanced] [--mode sequential] [--output FILE.json]
    python -m examples.shapes --models resnet18 --compare-images 256 1024
    python -m examples.shapes --device cuda --dtype bfloat16 --models llama-8b --group-size 128
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from adaround_ext import quantize_
from adaround_ext.layers.matrix import SUPPORTED
from benchmarks import common
from benchmarks.common import Options
from benchmarks.model import measured
from benchmarks.workloads import decoder, networks

NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "resnet18": networks.resnet18,
    "resnet50": networks.resnet50,
    "mobilenet_v2": networks.mobilenet_v2,
}


class Decoder(NamedTuple):
    """Arguments of llama_shaped, and its sequences; half of them may be padded."""

    shape: dict[str, int]
    sequences: int = 64
    length: int = 128
    batch_size: int = 8
    padded: bool = True


DECODERS = {
    "llama-tiny": Decoder(decoder.PRESETS["tiny"]),
    "llama-small": Decoder(
        {
            "layers": 4,
            "hidden": 512,
            "intermediate": 1408,
            "heads": 8,
            "kv_heads": 4,
            "vocabulary": 4096,
        }
    ),
    "llama-8b": Decoder(decoder.PRESETS["8b"], 128, 2048, 16, padded=False),
}
MODELS = (*NETWORKS, *DECODERS)
USUAL = tuple(model for model in MODELS if model != "llama-8b")  # it takes a GPU
WARNING = "RANDOM WEIGHTS, SYNTHETIC DATA: seconds and memory only, errors mean nothing here"
PARTS = ("calibration", "tracing", "forward", "statistics", "solving", "total")
Batches = Iterator[Any]  # of images, or of a decoder's arguments by name
Row = dict[str, Any]


def workload(
    model: str,
    images: int,
    batch_size: int,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[nn.Module, int, Callable[[], Batches]]:
    """A model on ``device``, its number of samples, and what makes their batches anew there."""
    if model in NETWORKS:
        network = NETWORKS[model]().to(device, dtype)

        def image_batches() -> Batches:
            return (x.to(device, dtype) for x in networks.synthetic_images(images, batch_size))

        return network, images, image_batches
    shape, count, length, sequence_batch, padded = DECODERS[model]
    half, kind = count // 2 * padded, (sequence_batch, length, shape["vocabulary"])

    def token_batches() -> Batches:
        """Without padding no mask is needed, whose look-up would hold a GPU up."""
        batches = [decoder.token_batches(count - half, *kind, seed=0)]
        if half:
            batches.append(decoder.token_batches(half, *kind, seed=1, padded=True))
        names = ("input_ids", "attention_mask") if padded else ("input_ids",)
        return ({name: batch[name].to(device) for name in names} for batch in chain(*batches))

    return decoder.llama_shaped(**shape, dtype=dtype, device=device), count, token_batches


def quantized(
    meter: measured.Meter,
    *,
    model: str,
    images: int,
    batch_size: int,
    bits: int,
    preset: Literal["fast", "balanced", "best"],
    mode: Literal["sequential", "parallel"],
    limit: int | None,
    group_size: int | None,
    device: str,
    dtype: str,
) -> Row:
    """One model by quantize_, all layers or the first ``limit``. For a process of its own."""
    stored = getattr(torch, dtype)
    network, samples, batches = workload(model, images, batch_size, stored, device)
    layers = [name for name, m in network.named_modules() if isinstance(m, SUPPORTED)]
    chosen = set(layers[:limit])
    data_bytes = _first_forward(network, batches()) * samples
    with meter:
        report = quantize_(
            network,
            batches(),
            mode=mode,
            filter_fn=lambda _, name: name in chosen,
            progress=sys.stderr.isatty(),
            bits=bits,
            preset=preset,
            granularity="per_channel" if group_size is None else "per_group",
            group_size=group_size,
        )
    row = {
        "model": model,
        "parameters": report.parameters,
        "samples": report.samples,
        "data_mb": data_bytes / 1e6,
    }
    return row | measured.summary(report)


@torch.no_grad()
def _first_forward(network: nn.Module, batches: Batches) -> int:
    """Runs the first batch; bytes of one of its samples."""
    batch = next(batches)
    named = isinstance(batch, dict)
    tensors: list[Tensor] = list(batch.values()) if named else [batch]
    if named:
        network(**batch)
    else:
        network(batch)
    return sum(tensor.nbytes // len(tensor) for tensor in tensors)


def show(rows: Sequence[Row]) -> None:
    """The rows as a table for people."""
    common.print_table(
        f"Seconds by part; {WARNING}",
        ("model", "samples", "layers", "passes", *PARTS),
        [
            (
                *(row[name] for name in ("model", "samples", "layers", "passes")),
                *(row["seconds_by_part"].get(part) for part in PARTS),
            )
            for row in rows
        ],
    )
    print("calibration: making the data, and keeping them.")
    names = ("model", "samples", "weights_mb", "data_mb", "peak_mb", "device_peak_mb")
    names += ("over_nearest",)
    header = ("model", "samples", "model MB", "data MB", "host MB", "device MB")
    common.print_table(
        f"Peak of host memory above the loaded model, of the device's with it; {WARNING}",
        (*header, "error over nearest's"),
        [[row[name] for name in names] for row in rows],
    )


def show_growth(rows: Sequence[Row]) -> None:
    """The peaks of each network by number of images, side by side."""
    peaks: dict[str, dict[int, float]] = {}
    for row in rows:
        if row["model"] in NETWORKS:
            peaks.setdefault(row["model"], {})[row["samples"]] = row["peak_mb"]
    if not peaks:
        return
    counts = sorted(next(iter(peaks.values())))
    common.print_table(
        "Peak MB above the loaded model, by number of images",
        ("model", *map(str, counts), "last over first"),
        [
            (model, *(peak_of[n] for n in counts), peak_of[counts[-1]] / peak_of[counts[0]])
            for model, peak_of in peaks.items()
        ],
    )


def rows_of(options: argparse.Namespace) -> Iterator[Row]:
    """Every model, a network once for each number of images, each as soon as it is there."""
    same = _settings(options)
    counts = options.compare_images or [options.images]
    for model in options.models:
        for images in counts if model in NETWORKS else counts[:1]:
            run = measured.run("examples.shapes:quantized", model=model, images=images, **same)
            nearest, error = run.result["nearest_error"], run.result["relative_error"]
            yield run.result | {
                "seconds": run.seconds,
                "weights_mb": getattr(torch, options.dtype).itemsize
                * run.result["parameters"]
                / 1e6,
                "peak_mb": run.peak_mb,
                "device_peak_mb": run.result["memory"].get("device_peak", 0) / 1e6,
                "over_nearest": error / nearest if nearest else None,
            }


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parse(arguments)
    device = torch.device(options.device)
    facts = common.machine_facts(device)
    common.note(WARNING)
    rows: list[Row] = []
    for row in rows_of(options):
        figures = f"{row['seconds']:.1f} s, {row['peak_mb']:.0f} MB above the model"
        common.note(f"{row['model']}, {row['samples']} samples: {figures}")
        rows.append(row)
        if options.output is not None:  # after each model, as all of them take long
            plain = common.document("shapes", Options(device), facts, rows, [])
            plain |= {"warning": WARNING, "settings": _settings(options)}
            common.write_json(options.output, plain)
    show(rows)
    if options.compare_images:
        show_growth(rows)
    print(f"\n{WARNING}.")


def _settings(options: argparse.Namespace) -> dict[str, Any]:
    names = ("batch_size", "bits", "preset", "mode", "limit", "group_size", "device", "dtype")
    return {name: getattr(options, name) for name in names}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m examples.shapes", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--models", nargs="+", default=list(USUAL), choices=MODELS)
    parser.add_argument("--images", type=int, default=256, metavar="N")
    parser.add_argument(
        "--compare-images", nargs="+", type=int, metavar="N", help="peaks side by side"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="of images")
    parser.add_argument("--bits", type=int, default=4, choices=range(2, 9))
    parser.add_argument("--preset", default="balanced", choices=("fast", "balanced", "best"))
    parser.add_argument("--mode", default="sequential", choices=("sequential", "parallel"))
    parser.add_argument("--group-size", type=int, metavar="N", help="columns that share a scale")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N layers")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    if options.limit is not None and options.limit < 1:
        parser.error(f"--limit must be at least 1, got {options.limit}")
    return options


if __name__ == "__main__":
    main()
