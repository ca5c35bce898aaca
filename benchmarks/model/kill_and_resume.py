"""SIGKILL at random moments of a whole-model run, which is then resumed: are the codes the same?

The MiniLM encoder, preset "fast": all 36 layers of it, or those of the first blocks. A run that
nothing disturbs gives the expected codes and the time within which the moments are drawn. Each
other run has a folder of its own, is killed once, and is started again with the same call.

    python -m benchmarks kill_and_resume [--rounds 10] [--blocks 6] [--seed 0] [--output FILE.json]
"""

from __future__ import annotations

import argparse
import multiprocessing
import random
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adaround_ext import quantize_
from benchmarks import common
from benchmarks.common import Target
from benchmarks.workloads import minilm

# What a child would import before it begins, which takes seconds.
_IMPORTED = [
    "adaround_ext",
    "benchmarks.workloads.minilm",
    "transformers.models.auto.modeling_auto",
    "transformers.models.bert.modeling_bert",
    "transformers.quantizers.auto",
]


def child(folder: Path, result: Path, blocks: int, ready: Event) -> None:
    """One run, resumed where it can be; writes all codes and parameters."""
    torch.set_num_threads(1)
    prefixes = tuple(f"encoder.layer.{index}." for index in range(blocks))
    model, tokenizer = minilm.load_encoder()
    batches = minilm.text_batches(tokenizer)
    ready.set()
    quantize_(
        model, batches, preset="fast", checkpoint_dir=str(folder), progress=False,
        filter_fn=lambda _, name: name.startswith(prefixes),
    )  # fmt: skip
    save_file(minilm.quantized_state(model), result)


def start(folder: Path, result: Path, blocks: int) -> BaseProcess:
    """A run that has loaded its model."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED)
    ready = context.Event()
    process = context.Process(target=child, args=(folder, result, blocks, ready))
    process.start()
    if not ready.wait(timeout=300):
        raise RuntimeError("the run did not start")
    return process


def finish(process: BaseProcess) -> None:
    process.join()
    if process.exitcode != 0:
        raise RuntimeError(f"the run ended with {process.exitcode}")


def rounds(count: int, seed: int, folder: Path, blocks: int) -> tuple[float, list[dict[str, Any]]]:
    """Seconds of the undisturbed run, and what came of each kill."""
    process = start(folder / "whole", folder / "whole.safetensors", blocks)
    began = time.perf_counter()
    finish(process)
    seconds = time.perf_counter() - began
    expected = load_file(folder / "whole.safetensors")
    drawn = random.Random(seed)
    rows = []
    for index in range(count):
        run, result = folder / str(index), folder / f"{index}.safetensors"
        moment = drawn.uniform(0, seconds)
        process = start(run, result, blocks)
        time.sleep(moment)
        process.kill()
        process.join()
        finished = len(list(run.glob("layer_*.safetensors")))
        finish(start(run, result, blocks))
        got = load_file(result)
        same = got.keys() == expected.keys() and all(
            torch.equal(tensor, got[name]) for name, tensor in expected.items()
        )
        rows.append({"killed_after_seconds": moment, "layers_kept": finished, "identical": same})
        common.note(f"killed after {moment:.1f} s with {finished} layers: identical {same}")
    return seconds, rows


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks kill_and_resume")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    facts = common.machine_facts(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as folder:
        seconds, rows = rounds(options.rounds, options.seed, Path(folder), options.blocks)
    differing = sum(not row["identical"] for row in rows)
    targets = [Target("runs that ended with other bits", differing, most=0)]
    common.conclude(
        options.output, "kill_and_resume", facts, rows, targets,
        undisturbed_seconds=seconds, blocks=options.blocks,
    )  # fmt: skip
