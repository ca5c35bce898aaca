"""Damaged and hostile files: an error each, no crash, no memory out of proportion."""

from __future__ import annotations

import json
import random
import resource
import struct
import tracemalloc
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from adaround_ext import (
    LayerResult,
    export_model,
    load_quantized,
    optimize_layer,
    save_quantized,
)
from adaround_ext.export.formats import FORMATS, format_module
from adaround_ext.export.manifest import NAME, read_manifest, write_manifest
from adaround_ext.export.packed.stored import FILE, KIND
from tests.support.export_models import Tied, quantized, tied

pytestmark = pytest.mark.usefixtures("one_thread")

MUTATIONS = 1000  # of each loader
PACKAGES = {
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "aimet": ("onnx", "onnxscript", "onnxruntime"),
    "compressed-tensors": ("transformers", "compressed_tensors"),
}


def hostile_header(data: bytes, draw: random.Random) -> bytes:
    """A safetensors file whose header has a length, offsets or shapes out of proportion."""
    length = struct.unpack("<Q", data[:8])[0]
    kind = draw.randrange(3)
    if kind == 0:
        wrong = draw.choice([0, 1, length - 1, length + 1, len(data), 1 << 40, (1 << 64) - 1])
        return struct.pack("<Q", wrong) + data[8:]
    header = json.loads(data[8 : 8 + length])
    entry = header[draw.choice([name for name in header if name != "__metadata__"])]
    if kind == 1:
        entry["shape"] = draw.choice([[1 << 40], [1 << 32, 1 << 32], [-1], [1 << 63], ["x"], None])
    else:
        entry["data_offsets"] = draw.choice([[0, 1 << 50], [1 << 50, 0], [-1, 3], [0], "all"])
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


def mutate(data: bytes, draw: random.Random, tensors: bool) -> bytes:
    """The file cut, grown, with bits flipped, bytes replaced or pieces moved; never as it was."""
    at = draw.randrange(len(data))
    other = bytearray(data)
    kind = draw.randrange(7 if tensors else 6)
    if kind == 0:
        del other[at:]
    elif kind == 1:
        other[at] ^= 1 << draw.randrange(8)
    elif kind == 2:
        other[at:at] = draw.randbytes(draw.randint(1, 64))
    elif kind == 3:
        other[at : at + draw.randint(1, 64)] = draw.randbytes(draw.randint(1, 64))
    elif kind == 4:
        del other[at : at + draw.randint(1, 64)]
    elif kind == 5:
        other[at:] = other[at:] + other[:at]
        other[:at] = b""
    else:
        other = bytearray(hostile_header(data, draw))
    return bytes(other) if bytes(other) != data else bytes(other) + b"\0"


def assert_refused(
    load: Callable[[], object], path: Path, tensors: bool, count: int = MUTATIONS
) -> None:
    """Every mutation of the file at ``path`` is refused, in memory of the order of its size."""
    original = path.read_bytes()
    draw = random.Random(path.name)
    load()
    for _ in range(count):
        other = mutate(original, draw, tensors)
        path.write_bytes(other)
        tracemalloc.start()
        try:
            with pytest.raises(ValueError):
                load()
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 64 * len(original) + (1 << 20), other[:80]
    path.write_bytes(original)
    load()


@pytest.fixture
def saved(tmp_path: Path) -> tuple[Path, nn.Module]:
    model, x = tied()
    quantized(model, x, bits=3, symmetric=False)
    save_quantized(model, tmp_path / "saved")
    return tmp_path / "saved", model


@pytest.mark.parametrize("name", [NAME, FILE])
def test_own_format(saved: tuple[Path, nn.Module], name: str) -> None:
    folder, _ = saved
    target, _ = tied()
    load_quantized(folder, target)
    before = {key: value.clone() for key, value in target.state_dict().items()}
    load = partial(load_quantized, folder, target)
    assert_refused(load, folder / name, name == FILE, MUTATIONS // 2)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())


def test_own_format_with_an_agreeing_manifest(saved: tuple[Path, nn.Module]) -> None:
    """Files made with intent pass the hashes; where their content fits, it is what they say."""
    folder, _ = saved
    details = read_manifest(folder).details
    path = folder / FILE
    original = path.read_bytes()
    draw = random.Random(1)
    refused, memory = 0, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(MUTATIONS // 2):
        path.write_bytes(mutate(original, draw, True))
        write_manifest(folder, KIND, details)
        try:
            target = load_quantized(folder, Tied())
        except ValueError:
            refused += 1
        else:
            assert all(value.isfinite().all() for value in target.last.parameters())
    assert refused > MUTATIONS // 4
    # The tensors' own memory, which Python does not count; in KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 64 << 10


def test_layer_result(tmp_path: Path) -> None:
    result = optimize_layer(nn.Linear(8, 4), torch.randn(64, 8), preset="fast")
    path = tmp_path / "layer.safetensors"
    result.save(path)
    assert_refused(partial(LayerResult.load, path), path, True)


@pytest.mark.parametrize("kind", [kind for kind in FORMATS if kind != KIND])
def test_every_other_format(kind: str, tmp_path: Path) -> None:
    """Damaged files do not even reach the runtime that would parse them."""
    for package in PACKAGES.get(kind, (kind,)):
        pytest.importorskip(package)
    folder = tmp_path / kind
    if kind == "compressed-tensors":
        model, batch = bert(), torch.randint(32, (4, 8))
    else:
        model, batch = nn.Sequential(nn.Linear(32, 8)), torch.randn(64, 32)
    quantized(model, batch, scale_dtype=torch.float16)
    export_model(model, folder, kind, batch=batch)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    load = partial(format_module(kind).runners, folder, model)
    load()
    for path in paths:
        count = -(-MUTATIONS // len(paths))
        assert_refused(partial(read_manifest, folder), path, path.suffix == ".safetensors", count)
        path.write_bytes((content := path.read_bytes())[:-1])
        with pytest.raises(ValueError, match="must be a directory that an export wrote"):
            load()
        path.write_bytes(content)


def bert() -> nn.Module:
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2}
    return BertModel(BertConfig(vocab_size=32, num_hidden_layers=1, **sizes))


def test_missing_links_and_escapes(saved: tuple[Path, nn.Module], tmp_path: Path) -> None:
    folder, model = saved
    outside = tmp_path / "outside"
    outside.write_bytes(b"x")
    details = read_manifest(folder).details
    (folder / FILE).unlink()
    with pytest.raises(ValueError, match=f"{FILE} is not there"):
        load_quantized(folder, model)
    (folder / FILE).symlink_to(outside)
    with pytest.raises(ValueError, match=f"{FILE} is not there"):
        load_quantized(folder, model)
    (folder / FILE).unlink()
    write_manifest(folder, KIND, details, ["../outside"])
    with pytest.raises(ValueError, match=r"\.\./outside is not there"):
        load_quantized(folder, model)
    write_manifest(folder, "onnx", details, [])
    with pytest.raises(ValueError, match="it holds the format 'onnx', not 'safetensors'"):
        load_quantized(folder, model)
    write_manifest(folder, KIND, details, [])
    with pytest.raises(ValueError, match=FILE):
        load_quantized(folder, model)


def test_deep_and_large_manifests(saved: tuple[Path, nn.Module]) -> None:
    folder, model = saved
    for text in ("[" * 100_000, "9" * 100_000, '{"format": 1e999}', "null", "", "\ud800x"):
        (folder / NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
        with pytest.raises(ValueError, match="must be a directory that an export wrote"):
            load_quantized(folder, model)
