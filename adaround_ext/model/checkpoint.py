"""Checkpoint: what a run is, and its results on disk, so that one that was killed goes on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from adaround_ext.config import make_config
from adaround_ext.files import path_from, write_atomically
from adaround_ext.ops.library import build_info
from adaround_ext.planning.plan import Plan, Target
from adaround_ext.replay.calibration import Calibration
from adaround_ext.result import LayerResult
from adaround_ext.tensors import add_tensor
from adaround_ext.tracing.blocks import BlockCall

_FORMAT = "adaround_ext.checkpoint.1"
_RECORD = "checkpoint.json"


class Checkpoint:
    """A folder with a file a layer, and what they belong to.

    fingerprint: what must be the same for the files to count, by part ("model", "data", ...).
    Raises ValueError naming ``checkpoint_dir`` and the parts that differ, and for a folder with
    other files.
    """

    def __init__(self, folder: str | os.PathLike[str], fingerprint: Mapping[str, object]) -> None:
        self._folder = path_from(folder)
        self._folder.mkdir(parents=True, exist_ok=True)
        path = self._folder / _RECORD
        record = {"format": _FORMAT, **json.loads(json.dumps(fingerprint))}
        if path.exists():
            self._compare(path, record)
            return
        others = sorted(item.name for item in self._folder.iterdir() if item.suffix != ".part")
        if others:
            raise ValueError(
                "checkpoint_dir must be empty, or that of the same run, "
                f"got {folder} with {others[0]}"
            )
        write_atomically(path, json.dumps(record, indent=1))

    def discard(self) -> None:
        """Removes what says which run the folder is of, before there is any result."""
        (self._folder / _RECORD).unlink()

    def _compare(self, path: Path, record: Mapping[str, object]) -> None:
        rule = f"checkpoint_dir must be that of the same run or empty, got {self._folder}"
        try:
            stored = dict(json.loads(path.read_text()))
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{rule} with an unreadable {path.name}: {error}") from error
        different = sorted(k for k in {*record, *stored} if record.get(k) != stored.get(k))
        if different:
            raise ValueError(f"{rule} of a run with another {', '.join(different)}")

    def load(self, indices: Sequence[int], device: torch.device) -> list[LayerResult] | None:
        """The results of these layers, or None where one of them is missing."""
        paths = [self._path(index) for index in indices]
        if not all(path.exists() for path in paths):
            return None
        return [LayerResult.load(path, device) for path in paths]

    def save(self, index: int, result: LayerResult) -> None:
        """Writes one layer's result, whole or not at all."""
        result.save(self._path(index))

    def _path(self, index: int) -> Path:
        return self._folder / f"layer_{index:05d}.safetensors"


def traced_batches(folder: str | os.PathLike[str] | None, batches: int) -> list[int]:
    """The batches, of so many, that a run in this folder has watched; the first one without a run.

    What is no list of them is left to :class:`Checkpoint` to refuse.
    """
    path = None if folder is None else Path(folder) / _RECORD
    if path is None or not path.is_file():
        return [0]
    try:
        traced = json.loads(path.read_text())["traced"]
        return [batch for batch in traced if type(batch) is int and 0 <= batch < batches] or [0]
    except (ValueError, TypeError, KeyError, OSError):
        return [0]


def run_fingerprint(
    model: str, data: Calibration, plan: Plan, calls: list[BlockCall]
) -> dict[str, object]:
    """By part, what decides the result apart from the arguments of quantize_ itself.

    model: its :func:`model_digest`.
    """
    layers = {target.name: plain_config(target) for target in plan.targets}
    return {
        "model": model,
        "calibration": data.digest(),
        "configuration": layers,
        "blocks": [call.name for call in calls],
        "version": versions(),
    }


def plain_config(target: Target) -> dict[str, Any]:
    """A target's configuration as plain values; a callable activation as its name."""
    activation = target.config.activation
    if not callable(activation):
        return target.config.to_dict()
    plain = make_config(target.config, {"activation": None}).to_dict()
    return plain | {"activation": plain_name(activation)}


def plain_name(value: object) -> str | None:
    """A function's name, or what is given instead of one."""
    if value is None or isinstance(value, str):
        return value
    return str(getattr(value, "__qualname__", type(value).__qualname__))


def versions() -> dict[str, str]:
    """Of what decides the bits of a result."""
    return {
        "adaround_ext": str(build_info()["version"]),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def model_digest(model: nn.Module) -> str:
    """Of all parameters and buffers, with their names, and the modules' classes."""
    digest = hashlib.blake2b(digest_size=16)
    for name, module in model.named_modules():
        digest.update(f"{name}: {type(module).__qualname__};".encode())
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        digest.update(f"{name}=".encode())
        add_tensor(digest, tensor)
    return digest.hexdigest()
