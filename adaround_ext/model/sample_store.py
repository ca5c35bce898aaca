"""Sample store: a tensor that grows by samples, where the objective needs them all."""

from __future__ import annotations

import os
import tempfile
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from adaround_ext.distributed import Ranks
from adaround_ext.files import path_from
from adaround_ext.replay.cache import room_on_disk


class GrowingTensor:
    """A tensor [n, ...] that grows in its first dimension: in memory or in a file."""

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        """folder: of the file, or None for memory; the file is gone with the tensor."""
        self._folder = None if folder is None else path_from(folder)
        self._batches: list[Tensor] = []
        self._file: Any = None
        self._rows = 0
        self._like: Tensor | None = None

    def append(self, batch: Tensor) -> None:
        """float32 copies of a batch; ValueError where its samples have another shape."""
        batch = batch.detach().float()
        if self._like is not None and batch.shape[1:] != self._like.shape[1:]:
            rule = "inputs must have one sample shape for the sampled objective"
            raise ValueError(
                f"{rule}, got {list(self._like.shape[1:])} and {list(batch.shape[1:])}"
            )
        self._like = batch[:0]
        self._rows += len(batch)
        if self._folder is None:
            self._batches.append(batch.clone())
            return
        with ExitStack() as undo, room_on_disk(self._folder, batch):
            if self._file is None:
                # Open as long as this object lives, gone with it.
                self._file = tempfile.NamedTemporaryFile(dir=self._folder)  # noqa: SIM115
            undo.callback(self._file.close)  # an error's traceback may keep this object alive
            batch.cpu().contiguous().numpy().tofile(self._file)
            undo.pop_all()

    def joined(self, ranks: Ranks) -> GrowingTensor:
        """What all ranks have, in their order."""
        joined = GrowingTensor(self._folder)
        tensor = None if self._like is None else self.tensor()
        for rows in ranks.gather(tensor, "the gathering of inputs"):
            if rows is not None:
                joined.append(rows if self._like is None else rows.to(self._like.device))
        return joined

    def tensor(self) -> Tensor:
        """All of it; from a file it is mapped, and on the CPU."""
        assert self._like is not None
        if self._file is None:
            return torch.cat(self._batches)
        self._file.flush()
        shape = (self._rows, *self._like.shape[1:])
        size = torch.Size(shape).numel()
        flat = torch.from_file(
            self._file.name, shared=False, size=size, dtype=torch.float32, device="cpu"
        )
        self._file.close()
        return flat.view(shape)
