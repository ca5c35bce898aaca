"""Other packages on the two 384x384 layers: each in an environment of its own, made by this file.

auto-round is not among them: it tunes whole blocks of language models, not a layer.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import venv
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from benchmarks.common import Options
from benchmarks.quality.layers import Subject
from benchmarks.quality.methods import TITLES

LAYERS = ("3.query", "3.attn.output")


@dataclass(frozen=True)
class Peer:
    """What to install, and what to run there: SCRIPT LAYER.pt RESULT.pt, importing nothing of ours.

    LAYER.pt: weight, bias, inputs [sequences, tokens, features], bits, threads and steps, as many
    as the reference takes. RESULT.pt: the dequantized weight, and seconds.
    """

    title: str
    packages: tuple[str, ...]
    script: str
    takes_steps: bool = False


PEERS = {
    "brevitas-gptq": Peer(
        "Brevitas, GPTQ with act_order", ("brevitas==0.13.4", "torch"), "brevitas_gptq.py"
    ),
    "aimet-adaround": Peer("AIMET, AdaRound", ("aimet-torch==2.42.0",), "aimet_adaround.py", True),
}


def measure(subject: Subject, options: Options) -> list[dict[str, Any]]:
    """A row for each peer and number of bits; where it does not work, a row with the error."""
    assert options.peers is not None
    rows = []
    for name, peer in PEERS.items():
        folder = options.peers / name
        error = _install(folder, peer)
        title = peer.title
        if peer.takes_steps:
            title += f", {options.reference_steps:,} steps"
        for bits in options.bits:
            row = {"layer": subject.name, "bits": bits, "method": name, "title": title}
            row |= {"packages": list(peer.packages), "error": error}
            if error is None:
                row |= _measured(folder, peer, subject, bits, options)
            rows.append(row)
            common.note(f"{title}, {subject.name}, {bits} bits: {row}")
    return rows


def print_tables(rows: list[dict[str, Any]], layers: list[dict[str, Any]]) -> None:
    """Beside the peers all methods on the same layers."""
    for layer in dict.fromkeys(row["layer"] for row in rows):
        for bits in dict.fromkeys(row["bits"] for row in rows):
            here = (layer, bits)
            per_channel = [row for row in layers if row["granularity"] == "channel"]
            table = [
                [row.get("title") or TITLES[row["method"]], row.get("held_out"), row.get("seconds")]
                for row in per_channel + rows
                if (row["layer"], row["bits"]) == here
            ]
            title = f"Other packages on {layer}, {bits} bits, a scale for each channel"
            common.print_table(title, ["method", "held-out", "s"], table)
    for error in {row["error"] for row in rows} - {None}:
        print(f"\nA package was left out: {error}")


def _install(folder: Path, peer: Peer) -> str | None:
    """Makes the environment unless it is there; the end of pip's output where that fails."""
    done = folder / "installed"
    if done.exists():
        return None
    common.note(f"installing {', '.join(peer.packages)} into {folder}")
    venv.create(folder, with_pip=True, clear=True)
    problem = _called(_python(folder), "-m", "pip", "install", "--quiet", *peer.packages)
    if problem is None:
        done.touch()
    return problem


def _measured(
    folder: Path, peer: Peer, subject: Subject, bits: int, options: Options
) -> dict[str, Any]:
    layer = {
        "weight": subject.matrix.cpu(),
        "bias": subject.layer.bias.detach().cpu(),
        "inputs": subject.inputs.cpu(),
        "bits": bits,
        "threads": torch.get_num_threads(),
        "steps": options.reference_steps,
    }
    script = common.FOLDER / "peers" / peer.script
    with tempfile.TemporaryDirectory() as name:
        source, target = Path(name) / "layer.pt", Path(name) / "result.pt"
        torch.save(layer, source)
        error = _called(_python(folder), script, source, target)
        if error is not None:
            return {"error": error}
        result = torch.load(target)
    weight = result["weight"].to(subject.matrix)
    levels = max(len(row.unique()) for row in weight)
    if levels > 1 << bits:
        return {"error": f"{peer.title} gave {levels} values in a row at {bits} bits"}
    held_out, calibration = subject.relative_errors(weight, None)
    return {"held_out": held_out, "calibration": calibration, "seconds": result["seconds"]}


def _python(folder: Path) -> Path:
    return folder / ("Scripts" if sys.platform == "win32" else "bin") / "python"


def _called(*command: str | Path) -> str | None:
    """None, or the end of what the command printed where it failed."""
    done = subprocess.run(
        [str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return None if done.returncode == 0 else "\n".join(done.stdout.splitlines()[-5:])
