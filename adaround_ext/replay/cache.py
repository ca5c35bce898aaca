"""Activation cache: trees of tensors by key, on the device, in memory, then in files."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from adaround_ext.files import path_from
from adaround_ext.tensors import is_dense

MEMORY_BUDGET = 1 << 28  # bytes, where the caller says nothing


@dataclass(frozen=True)
class _Held:
    """A tensor's elements in one run of memory, and its form."""

    flat: Tensor | None  # None where it is in ``path``
    path: str | None
    count: int
    dtype: torch.dtype  # as stored
    shape: torch.Size
    stride: tuple[int, ...]
    original: torch.dtype
    device: torch.device

    @property
    def bytes(self) -> int:
        return self.count * self.dtype.itemsize


class ActivationCache:
    """Activations and calibration batches by key, within a budget of memory, then in files.

    memory_budget: bytes of host memory, pinned where the tensors come from a GPU; what does not fit
    goes to files in a new folder under ``directory`` (None: the system's folder for temporary
    files), which are mapped into memory when read. device_budget: bytes that tensors on a GPU may
    take there first. dtype: None, or bfloat16 or float16 to store float32 tensors in; then what
    is read back is rounded. TypeError and ValueError, naming what :func:`quantize_` calls them, for
    another folder or dtype: found out when memory runs short, they would cost the time until then.
    """

    def __init__(
        self,
        memory_budget: int,
        directory: str | os.PathLike[str] | None = None,
        device_budget: int = 0,
        dtype: torch.dtype | None = None,
    ) -> None:
        if not isinstance(directory, (str, os.PathLike, NoneType)):
            raise TypeError(f"cache_dir must be a path or None, got {directory!r}")
        self._directory = None if directory is None else path_from(directory)
        if self._directory is not None and not self._directory.is_dir():
            raise ValueError(f"cache_dir must be a folder that exists, got {str(directory)!r}")
        if dtype not in (None, torch.bfloat16, torch.float16):
            raise ValueError(f"cache_dtype must be bfloat16, float16 or None, got {dtype!r}")
        self._budgets = {"device": device_budget, "memory": memory_budget}
        self._used = {"device": 0, "memory": 0, "file": 0}
        self.peak = dict(self._used)  # most bytes at any time
        self._dtype = dtype
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._trees: dict[Hashable, tuple[list[Any], Any]] = {}
        # What may be dropped, by place: bytes by key, and their sum.
        self._optional: dict[str, dict[Hashable, int]] = {"device": {}, "memory": {}}
        self._spare = {"device": 0, "memory": 0}
        self._files = 0

    def __enter__(self) -> ActivationCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._trees.clear()
        if self._folder is not None:
            self._folder.cleanup()

    @property
    def room_on_device(self) -> int:
        """Bytes of the device's budget that are left."""
        return self._budgets["device"] - self._used["device"]

    @property
    def rounds(self) -> bool:
        """Whether float32 tensors lose bits."""
        return self._dtype is not None

    def rounded(self, tree: Any) -> Any:
        """The tree as it is after :meth:`put` and :meth:`get`; itself, where nothing is rounded."""
        if self._dtype is None:
            return tree
        return pytree.tree_map_only(Tensor, lambda t: self._stored(t).to(t.dtype), tree)

    def _stored(self, tensor: Tensor) -> Tensor:
        half = self._dtype is not None and tensor.dtype == torch.float32 and is_dense(tensor)
        return tensor.to(self._dtype) if half else tensor

    def __contains__(self, key: Hashable) -> bool:
        return key in self._trees

    def put(self, key: Hashable, tree: object) -> None:
        """Copies the tree's tensors; what else is in it, and sparse ones, stay as they are."""
        self.drop(key)
        leaves, spec = pytree.tree_flatten(tree)
        held = [self._hold(leaf) if is_dense(leaf) else leaf for leaf in leaves]
        self._trees[key] = held, spec

    def put_if_room(self, key: Hashable, tensor: Tensor) -> bool:
        """Copies a tensor if its own memory has room for it, until :meth:`put` needs that room.

        Whether it had; ``key in cache`` says whether it is still there.
        """
        self.drop(key)
        place = _memory_of(tensor)
        size = tensor.numel() * tensor.element_size()
        if self._used[place] + size > self._budgets[place]:
            return False
        self.put(key, tensor)
        self._optional[place][key] = size
        self._spare[place] += size
        return True

    def _make_room(self, place: str, size: int) -> bool:
        """Whether there is room, if need be without the last of what may be dropped."""
        budget = self._budgets[place] - size
        if self._used[place] - self._spare[place] > budget:
            return False
        while self._used[place] > budget:
            self.drop(next(reversed(self._optional[place])))
        return True

    def get(self, key: Hashable) -> Any:
        """The tree, its tensors copies where they were; KeyError where there is none."""
        held, spec = self._trees[key]
        leaves = [self._read(item) if isinstance(item, _Held) else item for item in held]
        return pytree.tree_unflatten(leaves, spec)

    def drop(self, key: Hashable) -> None:
        """Forgets a tree, if it is there."""
        for place, keys in self._optional.items():
            self._spare[place] -= keys.pop(key, 0)
        held, _ = self._trees.pop(key, ([], None))
        for item in held:
            if isinstance(item, _Held):
                self._used[self._place(item)] -= item.bytes
                if item.path is not None:
                    os.unlink(item.path)

    @staticmethod
    def _place(item: _Held) -> str:
        if item.flat is None:
            return "file"
        return _memory_of(item.flat)

    def _hold(self, tensor: Tensor) -> _Held:
        original, device = tensor.dtype, tensor.device
        tensor = self._stored(tensor.detach())
        dense = tensor.clone(memory_format=torch.preserve_format)  # without holes
        flat = dense.as_strided((dense.numel(),), (1,))
        form = (flat.dtype, dense.shape, dense.stride(), original, device)
        place = self._choose(flat)
        if place == "file":
            held = _Held(None, self._write(flat.cpu()), flat.numel(), *form)
        elif place == "memory" and device.type == "cuda":
            pinned = torch.empty(flat.shape, dtype=flat.dtype, device="cpu", pin_memory=True)
            held = _Held(pinned.copy_(flat), None, flat.numel(), *form)
        else:
            held = _Held(flat if place == "device" else flat.cpu(), None, flat.numel(), *form)
        self._used[place] += held.bytes
        self.peak[place] = max(self.peak[place], self._used[place])
        return held

    def _choose(self, flat: Tensor) -> str:
        size = flat.numel() * flat.element_size()
        places = ["memory"] if flat.device.type == "cpu" else ["device", "memory"]
        for place in places:
            if self._make_room(place, size):
                return place
        return "file" if size else "memory"

    def _write(self, flat: Tensor) -> str:
        with room_on_disk(self._directory, flat):
            if self._folder is None:
                self._folder = tempfile.TemporaryDirectory(
                    prefix="adaround_ext_", dir=self._directory
                )
            path = Path(self._folder.name) / f"{self._files}.bin"
            self._files += 1
            flat.view(torch.uint8).numpy().tofile(path)
        return str(path)

    def _read(self, held: _Held) -> Tensor:
        if held.path is not None:
            # A private mapping: writing to it does not change the file.
            flat = torch.from_file(
                held.path, shared=False, size=held.count, dtype=held.dtype, device="cpu"
            )
            if held.device.type != "cpu" or held.dtype != held.original:
                flat = flat.to(held.device, held.original)
        else:
            assert held.flat is not None
            flat = held.flat.to(held.device, held.original, copy=True)
        return flat.as_strided(held.shape, held.stride)


def _memory_of(tensor: Tensor) -> str:
    return "memory" if tensor.device.type == "cpu" else "device"


@contextmanager
def room_on_disk(directory: str | os.PathLike[str] | None, tensor: Tensor) -> Iterator[None]:
    """OSError with the folder, the bytes needed and free, and the cause where writing fails."""
    try:
        yield
    except OSError as error:
        folder = tempfile.gettempdir() if directory is None else os.fspath(directory)
        given = "cache_dir" if directory is not None else "cache_dir (None: the system's folder)"
        free = shutil.disk_usage(folder).free
        needed = tensor.numel() * tensor.element_size()
        rule = f"{given} must have room for what memory_budget does not hold"
        got = f"got {free} bytes free in {folder} where {needed} more are needed: {error}"
        # NumPy, which writes, says how much it wrote and not what was wrong.
        raise OSError(error.errno or errno.ENOSPC, f"{rule}, {got}") from error
