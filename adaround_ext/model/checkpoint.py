"""Results on disk, layer by layer, so that a run that was killed goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from adaround_ext.files import path_from, write_atomically
from adaround_ext.result import LayerResult

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
        own = {"format": _FORMAT, **json.loads(json.dumps(fingerprint))}
        if path.exists():
            self._compare(path, own)
            return
        others = sorted(item.name for item in self._folder.iterdir() if item.suffix != ".part")
        if others:
            raise ValueError(
                "checkpoint_dir must be empty, or that of the same run, "
                f"got {folder} with {others[0]}"
            )
        write_atomically(path, json.dumps(own, indent=1))

    def discard(self) -> None:
        """Removes what says which run the folder is of, before there is any result."""
        (self._folder / _RECORD).unlink()

    def _compare(self, path: Path, own: Mapping[str, object]) -> None:
        rule = f"checkpoint_dir must be that of the same run or empty, got {self._folder}"
        try:
            there = dict(json.loads(path.read_text()))
        except (ValueError, TypeError, OSError) as error:
            raise ValueError(f"{rule} with an unreadable {path.name}: {error}") from error
        different = sorted(k for k in {*own, *there} if own.get(k) != there.get(k))
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
