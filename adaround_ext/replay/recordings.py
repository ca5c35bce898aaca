"""Recordings: what blocks returned, so that it can be returned again."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext.replay.cache import ActivationCache
from adaround_ext.tensors import version

Stream = Literal["full", "quantized"]
_Key = tuple[Stream, int, int]


@dataclass(frozen=True)
class _Given:
    """An output that is one of the call's own arguments; ``written`` if it was changed."""

    place: int
    written: bool


@dataclass(frozen=True, eq=False)
class _Output:
    """A tensor: recorded, or no longer, where nothing reads it any more.

    Those that look alike are one object, so that blanks are found without comparing: every block
    asks in every run.
    """

    recorded: bool
    shape: torch.Size
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @staticmethod
    def of(tensor: Tensor, recorded: bool) -> _Output:
        dense = torch.empty_like(tensor, device="meta")
        return _output(recorded, tensor.shape, dense.stride(), tensor.dtype, tensor.device)

    def dropped(self) -> _Output:
        """Where it is recorded no longer."""
        return _output(False, self.shape, self.stride, self.dtype, self.device)


_output = lru_cache(maxsize=1 << 14)(_Output)


class Blanks:
    """Zeros in place of what nothing reads: one tensor for all outputs that look alike.

    To make them anew for every call would take longer than small blocks do.
    """

    def __init__(self) -> None:
        self._tensors: dict[_Output, tuple[Tensor, int]] = {}
        self._used: set[_Output] = set()

    def next_run(self) -> None:
        """Keeps what the last run of the model used: with each batch its shape may be another."""
        self._tensors = {output: self._tensors[output] for output in self._used}
        self._used.clear()

    def like(self, output: _Output) -> Tensor:
        """A tensor of its own in the memory of all that look alike."""
        blank, writes = self._tensors.get(output, (None, 0))
        if blank is None:
            blank = torch.empty_strided(
                output.shape, output.stride, dtype=output.dtype, device=output.device
            ).zero_()
        elif version(blank) != writes:  # by the model, between its blocks
            blank.zero_()
        self._tensors[output] = blank, version(blank)
        self._used.add(output)
        return blank.detach()


@dataclass(frozen=True)
class Template:
    """The outputs of one call, without the tensors that are recorded elsewhere."""

    leaves: list[Any]
    spec: Any
    alone: bool  # its one leaf is the output itself

    @staticmethod
    def of(
        output: Any, given: Sequence[Tensor], versions: Sequence[int], needed: bool
    ) -> tuple[Template, list[Tensor]]:
        """The template of an output, and the tensors to record for it.

        given, versions: the tensors among the arguments, and how often each had been written to
        before the call. needed: whether anything reads the outputs later; else nothing is recorded.
        """
        leaves, spec = pytree.tree_flatten(output)
        template: list[Any] = []
        recorded: list[Tensor] = []
        for leaf in leaves:
            place = next((i for i, t in enumerate(given) if t is leaf), None)
            if place is not None:
                written = needed and version(leaf) != versions[place]
                template.append(_Given(place, written))
                recorded += [leaf] if written else []
            elif isinstance(leaf, Tensor):
                template.append(_Output.of(leaf, recorded=needed))
                recorded += [leaf] if needed else []
            else:
                template.append(leaf)
        return Template(template, spec, len(leaves) == 1 and leaves[0] is output), recorded

    def play(self, arguments: object, recorded: Sequence[Tensor], blanks: Blanks) -> Any:
        """The outputs again, for a call with these arguments; ``blanks`` for what nothing reads."""
        passes_on = any(isinstance(item, _Given) for item in self.leaves)
        given, tensors = given_tensors(arguments) if passes_on else [], iter(recorded)
        leaves: list[Any] = []
        for item in self.leaves:
            if isinstance(item, _Output):
                leaves.append(next(tensors) if item.recorded else blanks.like(item))
            elif isinstance(item, _Given):
                tensor = given[item.place]
                leaves.append(tensor.copy_(next(tensors)) if item.written else tensor)
            else:
                leaves.append(item)
        return leaves[0] if self.alone else pytree.tree_unflatten(leaves, self.spec)

    def without_recordings(self) -> Template:
        """The template where nothing is recorded any more."""
        return Template([_dropped(item) for item in self.leaves], self.spec, self.alone)


class Recordings:
    """What block calls returned, by stream, batch and number of the call.

    needed: the calls whose outputs are read later; of others only the form is kept.
    """

    def __init__(self, cache: ActivationCache, shared_prefix: int) -> None:
        """shared_prefix: how many leading calls give the same in all streams."""
        self._cache, self._shared_prefix = cache, shared_prefix
        self._templates: dict[_Key, Template] = {}
        self._blanks = Blanks()
        self.needed: frozenset[int] = frozenset()

    def _key(self, stream: Stream, batch: int, index: int) -> _Key:
        return ("full" if index < self._shared_prefix else stream), batch, index

    def has(self, stream: Stream, batch: int, index: int) -> bool:
        """Whether there is something to play."""
        return self._key(stream, batch, index) in self._templates

    def next_run(self) -> None:
        """The model begins anew."""
        self._blanks.next_run()

    def record(
        self,
        stream: Stream,
        batch: int,
        index: int,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        """What ``forward`` returns, as it will be when it is played."""
        key = self._key(stream, batch, index)
        given = given_tensors((args, kwargs))
        versions = [version(t) for t in given]
        output = forward(*args, **kwargs)
        self._templates[key], recorded = Template.of(output, given, versions, index in self.needed)
        if recorded:
            self._cache.put(key, recorded)
        return self._cache.rounded(output)

    def play(self, stream: Stream, batch: int, index: int, arguments: object) -> Any:
        """What was returned before, for a call with these arguments."""
        key = self._key(stream, batch, index)
        recorded = self._cache.get(key) if key in self._cache else []
        return self._templates[key].play(arguments, recorded, self._blanks)

    def forget(self) -> None:
        """Drops what nothing needs any more, but for its form."""
        for key, template in self._templates.items():
            if key[2] not in self.needed and key in self._cache:
                self._cache.drop(key)
                self._templates[key] = template.without_recordings()

    def clear(self) -> None:
        """Drops everything."""
        for key in self._templates:
            self._cache.drop(key)
        self._templates.clear()


@contextmanager
def other_forwards(
    modules: Iterable[nn.Module],
    other: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]],
) -> Iterator[None]:
    """Each module has ``other(module, forward)`` in place of its forward; restored at the end."""
    before = {module: module.__dict__.get("forward") for module in modules}
    try:
        for module in before:
            # Past a __setattr__ that the model's class may have.
            module.__dict__["forward"] = other(module, module.forward)
        yield
    finally:
        for module, forward in before.items():
            module.__dict__.pop("forward", None)
            if forward is not None:
                module.__dict__["forward"] = forward


def given_tensors(arguments: object) -> list[Tensor]:
    """The tensors among a call's arguments, in a fixed order."""
    return [leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor)]


def _dropped(item: object) -> object:
    if isinstance(item, _Output):
        return item.dropped()
    return dataclasses.replace(item, written=False) if isinstance(item, _Given) else item
