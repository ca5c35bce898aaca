"""Weights that stay in files: loaded into a model without data, and quantized there."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from adaround_ext import map_weights_, quantize_
from tests.model.test_quantize import codes
from tests.support import models

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {"preset": "fast", "bits": 3, "progress": False}


def mapped_bytes(path: Path) -> int:
    """Bytes of this process's memory that are backed by a file, or were by one that is gone."""
    found = 0
    for line in Path("/proc/self/maps").read_text().splitlines():
        if str(path) in line:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            found += end - begin
    return found


def in_shards(model: nn.Module, folder: Path, shards: int = 3) -> None:
    """The model's tensors in files as large models have them; a tied one is there once."""
    tensors = {name: t.contiguous() for name, t in model.named_parameters()}
    tensors |= dict(model.named_buffers())
    names = sorted(tensors)
    for shard in range(shards):
        part = {name: tensors[name].detach() for name in names[shard::shards]}
        save_file(part, folder / f"model-{shard + 1:05d}-of-{shards:05d}.safetensors")


def empty(model: nn.Module) -> nn.Module:
    """The same model without data."""
    return copy.deepcopy(model).to("meta")


def data() -> list[dict[str, torch.Tensor]]:
    return [{"ids": models.tokens(4, 6)} for _ in range(3)]


def test_a_model_gets_its_values_from_shards(tmp_path: Path) -> None:
    model = models.Transformer()
    in_shards(model, tmp_path)
    made = empty(model)
    made.head.weight.requires_grad_(False)
    assert map_weights_(made, tmp_path) == sorted(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(made.state_dict()[name], tensor)
    assert [n for n, p in made.named_parameters() if not p.requires_grad] == ["head.weight"]
    assert mapped_bytes(tmp_path) > 0
    batch = data()[0]
    assert torch.equal(made(**batch)[0], model(**batch)[0])


def test_writing_to_the_model_leaves_the_files(tmp_path: Path) -> None:
    model = models.Transformer()
    in_shards(model, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    made = empty(model)
    map_weights_(made, tmp_path)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(1)
    assert before == {path: path.read_bytes() for path in tmp_path.iterdir()}


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = models.Reused()
    in_shards(model, tmp_path)
    made = empty(model)
    made.right.weight = made.left.weight
    assert "right.weight" in map_weights_(made, tmp_path)
    assert made.right.weight is made.left.weight
    assert torch.equal(made.left.weight, model.left.weight)


def test_what_has_data_stays(tmp_path: Path) -> None:
    model = models.Transformer()
    in_shards(model, tmp_path)
    made = empty(model)
    made.head = nn.Linear(model.head.in_features, model.head.out_features)
    kept = made.head.weight
    assert "head.weight" not in map_weights_(made, tmp_path)
    assert made.head.weight is kept


@pytest.mark.parametrize("mode", ["sequential", "parallel"])
def test_quantized_in_files_as_in_memory(mode: str, tmp_path: Path) -> None:
    model, batches = models.Transformer(), data()
    (tmp_path / "shards").mkdir()
    (tmp_path / "offload").mkdir()
    in_shards(model, tmp_path / "shards")
    made = empty(model)
    map_weights_(made, tmp_path / "shards")
    parameters = dict(made.named_parameters())
    offload = str(tmp_path / "offload")
    quantize_(made, batches, mode=mode, offload_dir=offload, memory_budget=0, **FAST)
    quantize_(model, batches, mode=mode, **FAST)
    one, two = codes(model), codes(made)
    assert one and one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
    for name, parameter in made.named_parameters():
        assert parameter is parameters[name]
        assert torch.equal(parameter, model.get_parameter(name))
    size = sum(c.numel() * (1 + made.head.weight.element_size()) for c in two.values())
    assert mapped_bytes(tmp_path / "offload") >= size
    assert list((tmp_path / "offload").iterdir()) == []


def test_after_an_error_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, batches = models.Transformer(), data()
    before = copy.deepcopy(model.state_dict())
    batches[1] = {"ids": torch.full((4, 6), 10**6)}
    with pytest.raises(IndexError):
        quantize_(model, batches, offload_dir=str(tmp_path), **FAST)
    assert list(tmp_path.iterdir()) == []
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ("none", FileNotFoundError, "folder must hold safetensors files, got none in"),
        ("damaged", ValueError, "folder must hold safetensors files, got .*00002"),
        ("twice", ValueError, "every name once, got .* twice"),
        ("missing", ValueError, "must be in .*, got none for .*and 7 more: computed buffers"),
        ("shape", ValueError, r"head.weight must have shape \[.*\] and torch.float32 as in the"),
        ("dtype", ValueError, "head.weight must have shape .* got .* torch.float16"),
    ],
)
def test_files_that_do_not_fit(
    fault: str, error: type[Exception], message: str, tmp_path: Path
) -> None:
    model = models.Transformer()
    made = empty(model)
    stored = copy.deepcopy(model)
    if fault == "shape":
        stored.head.weight = nn.Parameter(torch.zeros(2, 2))
    elif fault == "dtype":
        stored.head.half()
    if fault != "none":
        in_shards(stored, tmp_path)
    second = tmp_path / "model-00002-of-00003.safetensors"
    if fault == "damaged":
        second.write_bytes(second.read_bytes()[:50])
    elif fault == "twice":
        (tmp_path / "more.safetensors").write_bytes(second.read_bytes())
    elif fault == "missing":
        second.unlink()
    with pytest.raises(error, match=message):
        map_weights_(made, tmp_path)
    assert all(parameter.is_meta for parameter in made.parameters())


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="model must be a torch module, got dict"):
        map_weights_({}, tmp_path)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="offload_dir must be an existing folder, got nowhere"):
        quantize_(models.Transformer(), data(), offload_dir="nowhere", **FAST)
