"""Exports for AIMET in AIMET: run by peers/aimet.py in an environment of its own.

FOLDER holds an export and batch.npz for each case. Each weight is first moved off its grid, by up
to 0.4 of the smallest scale: only where AIMET puts it back to the very codes that the encodings
describe, outputs are those wanted. Source: aimet_onnx.quantsim.
"""

import json
import logging
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from aimet_onnx.quantsim import QuantizationSimModel, load_encodings_to_sim
from onnx import numpy_helper


def main(folder: str, target: str) -> None:
    logging.disable(logging.ERROR)  # of every setting that differs from a new simulation's
    rows = {path.name: measure(path) for path in sorted(Path(folder).iterdir())}
    Path(target).write_text(json.dumps(rows))


def measure(folder: Path) -> dict[str, float]:
    batch = dict(np.load(folder / "batch.npz"))
    feeds = {name[3:]: x for name, x in batch.items() if name.startswith("in ")}
    expected = [batch[f"out {i}"] for i in range(len(batch) - len(feeds))]
    model = onnx.load(folder / "model.onnx")
    encodings = json.loads((folder / "model.encodings").read_text())
    move(model, encodings)
    moved = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    sim = QuantizationSimModel(model)
    load_encodings_to_sim(sim, str(folder / "model.encodings"), strict=False)
    outputs_of = {"moved": moved, "aimet": sim.session.run(None, feeds)}
    return {name: error(outputs, expected) for name, outputs in outputs_of.items()}


def move(model: onnx.ModelProto, encodings: dict) -> None:
    drawn = np.random.default_rng(0)
    scales = {
        entry["name"]: np.min(entry.get("scale", entry.get("y_scale")))
        for kind in ("param_encodings", "encodings")
        for entry in encodings.get(kind, ())
    }
    for tensor in model.graph.initializer:
        if tensor.name in scales:
            weight = numpy_helper.to_array(tensor)
            noise = drawn.uniform(-0.4, 0.4, weight.shape) * scales[tensor.name]
            moved = (weight + noise).astype(np.float32)
            tensor.CopyFrom(numpy_helper.from_array(moved, tensor.name))


def error(outputs: list, expected: list) -> float:
    """The largest relative error of an output."""
    pairs = zip(outputs, expected, strict=True)
    return float(max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in pairs))


if __name__ == "__main__":
    main(*sys.argv[1:])
