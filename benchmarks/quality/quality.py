"""Held-out error and seconds of every method, layer by layer, and what they do to a whole model.

The 36 Linear layers of MiniLM and the convolutions of a small CNN at 4, 3 and 2 bits, a scale for
each channel or for 128 columns. Methods see the same calibration data; all but those that search
scales themselves use the same MSE grid. Seconds are those of a whole layer, alone, statistics
included (where the method needs them; not for stochastic rounding).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks import common
from benchmarks.common import Options, Target
from benchmarks.quality import cnn as quality_cnn
from benchmarks.quality import layers as quality_layers
from benchmarks.quality import methods, peers, reference, summary
from benchmarks.quality import model as quality_model
from benchmarks.quality.layers import Subject
from benchmarks.quality.methods import Rounding
from benchmarks.workloads import minilm

PARTS = ("channel", "group", "cnn", "reference", "model")
_QUICK_BLOCKS, _QUICK_METHODS = (3,), ("nearest", "gptq", "fast", "balanced")
Results = dict[str, list[dict[str, Any]]]
# By (bits, granularity), then by method.
Roundings = dict[tuple[int, str], dict[str, Rounding]]


def run(options: Options) -> tuple[Results, list[Target]]:
    """Results by kind, and targets; prints the tables."""
    options = _filled(options)
    results: Results = {"layers": [], "means": [], "reference": [], "model": [], "peers": []}
    if set(options.parts) - {"cnn"} or options.peers is not None:
        _transformer(options, results)
    if "cnn" in options.parts:
        for subject in quality_cnn.convolutions(options.device):
            _layer(subject, ("channel", "group"), options, results)
    results["means"] = summary.means(results["layers"])
    summary.print_tables(results)
    if results["peers"]:
        peers.print_tables(results["peers"], results["layers"])
    return results, summary.targets(results)


def _filled(options: Options) -> Options:
    """What the command line leaves open."""
    quick = options.quick
    return dataclasses.replace(
        options,
        parts=options.parts or PARTS,
        bits=options.bits or ((4,) if quick else (4, 3, 2)),
        blocks=options.blocks or (_QUICK_BLOCKS if quick else tuple(range(quality_layers.BLOCKS))),
        methods=options.methods or (_QUICK_METHODS if quick else methods.METHODS),
    )


def _transformer(options: Options, results: Results) -> None:
    model, tokenizer = minilm.load_encoder()
    model.to(options.device)
    calibration = minilm.text_batches(tokenizer, "calibration")
    held_out = minilm.text_batches(tokenizer, "held_out")
    roundings: dict[tuple[int, str], dict[str, Rounding]] = {}
    for subject in quality_layers.transformer(model, calibration, held_out, options.blocks):
        granularities = _granularities(subject, options)
        of_layer = _layer(subject, granularities, options, results)
        if "reference" in options.parts and subject.name in reference.LAYERS:
            results["reference"] += _on_rows(subject, of_layer, options)
        if options.peers is not None and subject.name in peers.LAYERS:
            results["peers"] += peers.measure(subject, options)
        if "model" in options.parts:
            for bits in options.bits:
                for method, rounding in of_layer[bits, "channel"].items():
                    if method in quality_model.METHODS:
                        roundings.setdefault((bits, method), {})[subject.name] = rounding
    if "model" in options.parts:
        unused = minilm.text_batches(tokenizer, "calibration", unused=True)
        texts = {"held_out": held_out, "calibration_unused": unused}
        if options.quick:
            texts = {name: batches[:1] for name, batches in texts.items()}
        results["model"] = quality_model.measure(model, texts, roundings)


def _granularities(subject: Subject, options: Options) -> tuple[str, ...]:
    """The reference, the model and the peers are compared with a scale for each channel."""
    parts = set(options.parts)
    compared = subject.name in reference.LAYERS and "reference" in parts
    compared |= subject.name in peers.LAYERS and options.peers is not None
    needed = {"channel": bool(parts & {"channel", "model"}) or compared, "group": "group" in parts}
    return tuple(name for name, is_wanted in needed.items() if is_wanted)


def _layer(
    subject: Subject, granularities: tuple[str, ...], options: Options, results: Results
) -> Roundings:
    """Every method on one layer, at every number of bits; adds their rows."""
    of_layer: Roundings = {}
    if not results["layers"]:
        methods.round_layer(subject, options.bits[0], "channel", ("gptq",), True)  # warms up
    for bits in options.bits:
        for granularity in granularities:
            if not methods.fits(subject, granularity):
                continue
            roundings = methods.round_layer(
                subject, bits, granularity, options.methods, options.quick
            )
            of_layer[bits, granularity] = roundings
            rows = [
                _row(subject, bits, granularity, method, rounding)
                for method, rounding in roundings.items()
            ]
            results["layers"] += rows
            shown = ", ".join(
                f"{row['method']} {row['held_out']:.3g} in {row['seconds']:.2g} s" for row in rows
            )
            common.note(f"{subject.name}, {bits} bits a {granularity}: {shown}")
    return of_layer


def _row(
    subject: Subject, bits: int, granularity: str, method: str, rounding: Rounding
) -> dict[str, Any]:
    held_out, calibration = subject.relative_errors(rounding.weight, rounding.bias)
    return {
        "family": subject.family,
        "layer": subject.name,
        "shape": list(subject.layer.weight.shape),
        "bits": bits,
        "granularity": granularity,
        "method": method,
        "held_out": held_out,
        "calibration": calibration,
        "seconds": rounding.seconds,
        "repeats_agree": rounding.repeats_agree,
    }


def _on_rows(subject: Subject, of_layer: Roundings, options: Options) -> list[dict[str, Any]]:
    """The reference and all methods, on the same first rows; seconds of the whole layer."""
    count = min(options.reference_rows, len(subject.matrix))
    seconds = reference.seconds(subject, options.bits[0])
    rows = []
    for bits in options.bits:
        same = {"layer": subject.name, "rows": count, "bits": bits}
        runs = reference.runs(subject, bits, count, options.reference_steps)
        rows.append(
            same
            | {
                "method": "reference",
                "held_out": runs[0].held_out,
                "calibration": runs[0].calibration,
                "seconds": seconds,
                "seconds_extrapolated": True,
                "steps_run": options.reference_steps,
                "runs": [vars(run) for run in runs],
            }
        )
        common.note(f"{subject.name}, {bits} bits: reference {runs[0]}, ~{seconds:.0f} s a layer")
        for method, rounding in of_layer[bits, "channel"].items():
            held_out, calibration = subject.relative_errors(
                rounding.weight, rounding.bias, slice(count)
            )
            errors = {"method": method, "held_out": held_out, "calibration": calibration}
            rows.append(same | errors | {"seconds": rounding.seconds})
    return rows
