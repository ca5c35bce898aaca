"""Onloading: a model's tensors brought to a device block by block, and sent home again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from adaround_ext.replay.recordings import other_forwards


class Onloader:
    """Brings a model's blocks to ``device`` as they are needed; for None all stays where it is.

    Inside the context everything that is in no block is on ``device``; afterwards all is back, with
    the same parameter objects and the same memory as before.
    """

    def __init__(
        self, model: nn.Module, blocks: Iterable[nn.Module], device: torch.device | None
    ) -> None:
        self._device = device
        self._blocks = list(dict.fromkeys(blocks))
        self._model = model
        inside = {m for block in self._blocks for m in block.modules()}
        outside = [m for m in model.modules() if m not in inside]
        # Tensors that blocks share, with each other or with the rest, stay for the whole time.
        holders = Counter(i for block in self._blocks for i in {id(t) for t in _tensors(block)})
        holders.update(id(t) for m in outside for t in _tensors(m, recurse=False))
        blockwise = {id(t) for block in self._blocks for t in _tensors(block)}
        self._moving = {i for i in blockwise if holders[i] == 1}  # ids of what comes and goes
        self._home: dict[int, tuple[Tensor, Tensor]] = {}  # by id: the tensor, and its data at home

    @property
    def moves(self) -> bool:
        """Whether only a part of the model is on its device at a time."""
        return self._device is not None

    def __enter__(self) -> Onloader:
        if self._device is not None:
            self._bring(t for t in _tensors(self._model) if id(t) not in self._moving)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._send_home(list(self._home))

    def only(self, blocks: Iterable[nn.Module]) -> None:
        """These blocks are on the device from now on, and no others."""
        if self._device is None:
            return
        needed = [t for block in dict.fromkeys(blocks) for t in _tensors(block)]
        ids = {id(t) for t in needed}
        self._send_home([key for key in self._home if key in self._moving and key not in ids])
        self._bring(needed)

    def while_running(self) -> AbstractContextManager[None]:
        """Inside, blocks come to the device as they run, and leave it for the next one."""
        running: list[nn.Module] = []

        def other(module: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            def brought(*args: Any, **kwargs: Any) -> Any:
                running.append(module)
                self.only(running)
                try:
                    return forward(*args, **kwargs)
                finally:
                    running.pop()

            return brought

        return other_forwards(self._blocks, other) if self.moves else nullcontext()

    def _bring(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if id(tensor) not in self._home:
                self._home[id(tensor)] = tensor, tensor.data
                tensor.data = self._moved(tensor.data)

    def _moved(self, data: Tensor) -> Tensor:
        return data.to(self._device)

    def _send_home(self, keys: list[int]) -> None:
        for key in keys:
            tensor, data = self._home.pop(key)
            if not isinstance(tensor, nn.Parameter):
                data.copy_(tensor.data)  # a buffer may have been written to
            tensor.data = data


def _tensors(module: nn.Module, recurse: bool = True) -> Iterator[Tensor]:
    yield from module.parameters(recurse)
    yield from module.buffers(recurse)
