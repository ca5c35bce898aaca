"""Block reuse: activations that later passes through a block need, kept while there is room.

The full-precision stream gives the same in every pass, so one run through a block is enough for all
of its units. In the quantized stream a layer that is done gives the same from then on, if no layer
that is not done ran before it. That holds for layers of one block that nothing else uses.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

from torch import Tensor, nn

from adaround_ext.replay.cache import ActivationCache
from adaround_ext.replay.recordings import other_forwards
from adaround_ext.tracing.blocks import BlockCall
from adaround_ext.tracing.plain_layers import is_plain
from adaround_ext.tracing.trace import ModuleCall

_Key = tuple[Literal["target", "output"], int, nn.Module, int]  # and batch, layer, number of call


@dataclass(frozen=True, eq=False)
class StreamTargets:
    """What a unit takes from the full-precision stream: inputs and outputs of these layers.

    calls: all of the unit's layers, in order.
    """

    inputs: frozenset[nn.Module]
    outputs: frozenset[nn.Module]
    calls: tuple[ModuleCall, ...]

    @cached_property
    def members(self) -> frozenset[nn.Module]:
        """The unit's layers."""
        return frozenset(call.module for call in self.calls)


class BlockReuse:
    """Of one block at a time, for each batch: its units' targets, and outputs of done layers.

    It changes how much runs, and nothing else: what is not kept is computed again.
    """

    def __init__(
        self, cache: ActivationCache, units: Sequence[StreamTargets], calls: Sequence[BlockCall]
    ) -> None:
        """units: all that are fitted to two streams, in execution order. calls: of all blocks."""
        self._cache, self.units = cache, units
        uses = Counter(layer for call in calls for layer in call.layers)
        # Those that one call of a block has, and that do nothing but return their output.
        self._simple = {
            layer
            for call in calls
            for layer in (call.layers if call.replaceable else ())
            if uses[layer] == 1 and is_plain(layer) and "forward" not in layer.__dict__
        }
        self._keys: dict[int, set[_Key]] = defaultdict(set)  # by batch
        self._block: BlockCall | None = None
        self._done: frozenset[nn.Module] = frozenset()  # of the block, those whose outputs are kept
        self._unfinished: frozenset[nn.Module] = frozenset()  # of the block
        self.has_room = False  # no target of the block's units had to be left out so far
        self.open: list[StreamTargets] = []  # the block's units that are not done

    def enter(self, block: BlockCall | None, waiting: set[nn.Module]) -> None:
        """``block`` runs in part from now on, None for none; ``waiting``: layers that are not done.

        What is kept of the block before may be played until :meth:`leave`.
        """
        if block is not self._block:
            self._block, self.has_room = block, not self._cache.rounds
        inside: list[StreamTargets] = []
        if block is not None:
            span = block.call
            inside = [unit for unit in self.units if all(span.spans(c.begin) for c in unit.calls)]
        members = frozenset().union(*(unit.members for unit in inside))
        self.open = [unit for unit in inside if unit.members & waiting]
        self._done = (members & self._simple) - waiting
        self._unfinished = frozenset() if block is None else block.layers & waiting

    def leave(self) -> None:
        """Forgets what is not of the block entered last."""
        inside = frozenset() if self._block is None else self._block.layers
        for keys in self._keys.values():
            for key in [key for key in keys if key[2] not in inside]:
                self._drop(key)

    def clear(self) -> None:
        """Forgets everything, for good."""
        self.units = []
        self.enter(None, set())
        self.leave()

    def keep(self, batch: int, layer: nn.Module, call: int, value: Tensor) -> None:
        """A target that a unit will take, of a call of ``layer``."""
        self.has_room &= self._put(("target", batch, layer, call), value)

    def take(
        self, batch: int, layers: frozenset[nn.Module], counts: Mapping[nn.Module, int]
    ) -> dict[nn.Module, list[Tensor]] | None:
        """The targets of these layers, for the last time; None where some of them are missing."""
        calls = [(layer, call) for layer in layers for call in range(counts.get(layer, 0))]
        keys: list[_Key] = [("target", batch, layer, call) for layer, call in calls]
        if not all(key in self._cache for key in keys):
            return None
        tensors: dict[nn.Module, list[Tensor]] = {layer: [] for layer in layers}
        for key in keys:
            tensors[key[2]].append(self._cache.get(key))
            self._drop(key)
        return tensors

    def playing(self, batch: int) -> AbstractContextManager[None]:
        """Inside, done layers of the quantized stream return what they did, or keep what they
        return; no more so in this run from where a layer is called that is not done."""
        playable = {layer for kind, _, layer, _ in self._keys[batch] if kind == "output"}
        same = True  # nothing has run that will change

        def other(layer: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
            calls = 0

            def played(*args: Any, **kwargs: Any) -> Any:
                nonlocal calls
                key: _Key = ("output", batch, layer, calls)
                calls += 1
                if same and key in self._cache:
                    return self._cache.get(key)
                output = forward(*args, **kwargs)
                if same and layer in self._done:
                    self._put(key, output)
                return output

            def changing(*args: Any, **kwargs: Any) -> Any:
                nonlocal same
                same = False
                return forward(*args, **kwargs)

            return changing if layer in self._unfinished else played

        return other_forwards(playable | self._done | self._unfinished, other)

    def _put(self, key: _Key, value: Tensor) -> bool:
        has_room = not self._cache.rounds and self._cache.put_if_room(key, value)
        if has_room:
            self._keys[key[1]].add(key)
        return has_room

    def _drop(self, key: _Key) -> None:
        self._keys[key[1]].remove(key)
        self._cache.drop(key)
