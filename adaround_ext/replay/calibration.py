"""Calibration batches: drawn once, stored, and given to the model as it takes them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from adaround_ext.distributed import Ranks
from adaround_ext.replay.cache import ActivationCache
from adaround_ext.replay.samples import cut
from adaround_ext.tensors import add_tensor, tensors
from adaround_ext.tracing.arguments import Arguments
from adaround_ext.tracing.evaluation import gpus, seed_all
from adaround_ext.tracing.padding import BY_FUNCTION, PaddingMask

ForwardFn = Callable[[nn.Module, Any], object]
# Statistics are summed segment by segment: few, since ranks keep a matrix for each of theirs, and
# more than most machines have GPUs. They begin at multiples of so many samples.
_SEGMENTS, _SEGMENT_SAMPLES = 16, 8


class Calibration:
    """All batches of a calibration set, for a model.

    source: an iterable of batches: tensors, tuples, lists or mappings, which the model is given as
    :class:`Arguments` says, or with ``forward_fn(model, batch)`` anything. A lone tensor or mapping
    is cut into batches of 32. It is iterated once, so generators and shuffling loaders are
    fine; what the caller does not hold in a list anyway is kept in ``cache``.
    padding_mask: the name of the model's argument [batch, tokens] that is 0 at padding, or a
    function from a batch to such a mask or None, or None. fingerprint: whether there is to be a
    :meth:`digest`, which takes longer than a small network on a GPU.
    Raises TypeError and ValueError naming ``calibration``: no iterable, no data, NaN or infinity,
    batches that do not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        source: Iterable[Any],
        forward_fn: ForwardFn | None,
        padding_mask: PaddingMask,
        cache: ActivationCache,
        device: torch.device | None,
        fingerprint: bool = False,
    ) -> None:
        if forward_fn is not None and not callable(forward_fn):
            raise TypeError(f"forward_fn must be a function of model and batch, got {forward_fn!r}")
        self._model = model
        self._forward_fn = forward_fn
        self._padding_mask = padding_mask
        self._cache = cache
        self.device = device
        self._gpus = gpus(t.device for t in model.parameters())
        self._reader = Arguments(model, "calibration", device)
        self._signature = self._reader.signature
        self._source: list[Any] | None = None  # what the caller holds
        # By batch and name; asked for on every pass.
        self._masks: dict[tuple[int, str], Tensor | None] = {}
        self.notes = self._reader.notes
        self._sizes: list[int] = []  # samples of each batch
        self._hash = hashlib.blake2b(digest_size=16) if fingerprint else None
        self.batches = self._draw(source)
        self.local_batches = range(self.batches)  # what this process runs
        self.segments = self._cut()

    def _draw(self, source: Iterable[Any]) -> int:
        if isinstance(source, (Tensor, Mapping)):
            source = cut(source)
        if isinstance(source, (str, bytes)) or not isinstance(source, Iterable):
            rule = "calibration must be an iterable of batches, or one tensor or mapping of samples"
            raise TypeError(f"{rule}, got {type(source).__name__}")
        if isinstance(source, (list, tuple)):
            self._source = list(source)
        count = 0
        for item in source:
            self._check(count, item)
            self._store(count, item)
            count += 1
        if count == 0:
            raise ValueError("calibration must hold at least one batch, got none")
        return count

    def _store(self, index: int, item: Any) -> None:
        """Stores what the caller does not hold; on a GPU also that, since every pass reads it."""
        size = sum(tensor.nbytes for tensor in tensors(_plain(item)))
        exact = self._source is None or not self._cache.rounds
        if self.device in self._gpus and exact and size <= self._cache.room_on_device:
            item = pytree.tree_map_only(Tensor, lambda t: t.to(self.device), _plain(item))
        elif self._source is not None:
            return
        # A loader may fill the same array again.
        item = pytree.tree_map_only(np.ndarray, np.copy, _plain(item))
        self._cache.put(("batch", index), item)

    def _check(self, index: int, item: Any) -> None:
        leaves = list(tensors(_plain(item)))
        for tensor in leaves:
            if tensor.is_meta:
                raise ValueError(f"calibration must hold data, got a meta tensor in batch {index}")
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor.sum())):
                bad = tensor.numel() - int(torch.isfinite(tensor).sum())
                if bad:
                    raise ValueError(
                        f"calibration must be finite, got {bad} NaN or infinite values in batch "
                        f"{index}"
                    )
        if self._hash is not None:
            self._add_to_digest(self._hash, item, leaves)
        self._sizes.append(next((len(tensor) for tensor in leaves if tensor.dim() > 0), 0))
        if self._forward_fn is None:
            self._check_arguments(index, item)

    @staticmethod
    def _add_to_digest(digest: Any, item: Any, dense: list[Tensor]) -> None:
        for leaf in pytree.tree_leaves(_plain(item)):
            if isinstance(leaf, (np.ndarray, str, bytes, int, float)):
                content = leaf.tobytes() if isinstance(leaf, np.ndarray) else repr(leaf).encode()
                digest.update(content + b";")
        for tensor in dense:
            add_tensor(digest, tensor)

    def _check_arguments(self, index: int, item: Any) -> None:
        """That the model takes such a batch."""
        if not isinstance(item, (Tensor, Mapping, tuple, list)):
            raise TypeError(
                "calibration must hold tensors, tuples or mappings unless forward_fn is given, got "
                f"{type(item).__name__} in batch {index}"
            )
        rule = "calibration must hold what the model takes, or forward_fn must be given"
        self._reader.check(_plain(item), index, rule)

    def _arguments(self, item: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return self._reader.of(item)

    def _item(self, index: int) -> Any:
        # Copies of what the caller holds: a model may write to its inputs.
        copy = ("batch", index) not in self._cache
        if copy:
            assert self._source is not None
            item = self._source[index]
        else:
            item = self._cache.get(("batch", index))
        return pytree.tree_map_only(Tensor, lambda t: t.to(self.device, copy=copy), _plain(item))

    def run(self, index: int, seed: int | None = None) -> object:
        """The model on one batch; ``seed``: of what it draws."""
        item = self._item(index)
        if seed is not None:
            seed_all(seed, gpus([self.device, *self._gpus]))
        if self._forward_fn is not None:
            return self._forward_fn(self._model, item)
        args, kwargs = self._arguments(item)
        return self._model(*args, **kwargs)

    @property
    def samples(self) -> int:
        """Of all batches; 0 where they hold no tensors."""
        return sum(self._sizes)

    def _cut(self) -> list[int]:
        """Which segment of the data each batch belongs to, whoever runs it."""
        sizes = self._sizes if self.samples else [1] * self.batches
        length = _SEGMENT_SAMPLES * -(-sum(sizes) // (_SEGMENTS * _SEGMENT_SAMPLES))
        return [begin // length for begin in accumulate(sizes[:-1], initial=0)]

    def share(self, ranks: Ranks) -> None:
        """Gives whole segments to each rank."""
        sizes = [0] * (self.segments[-1] + 1)
        for segment, size in zip(self.segments, self._sizes, strict=True):
            sizes[segment] += max(size, 1)
        share = ranks.share(sizes)[ranks.rank]
        batches = [batch for batch, segment in enumerate(self.segments) if segment in share]
        self.local_batches = range(batches[0], batches[-1] + 1) if batches else range(0)

    def release(self) -> None:
        """Forgets what other ranks run, and will not be traced."""
        for batch in range(self.batches):
            if batch not in self.local_batches:
                self._cache.drop(("batch", batch))

    def mask(self, index: int, name: str | None) -> Tensor | None:
        """bool [batch, tokens], True where there is no padding; None where there is none at all.

        name: of the model's argument, as :meth:`PaddingMasks.name_of` has it.
        """
        if name is None or self._padding_mask is None:
            return None
        if (index, name) not in self._masks:
            self._masks[index, name] = self._find_mask(name, self._item(index))
        return self._masks[index, name]

    def _find_mask(self, name: str, item: Any) -> Tensor | None:
        if callable(self._padding_mask):
            mask = self._padding_mask(item) if name == BY_FUNCTION else None
        elif isinstance(item, Mapping):
            mask = item.get(name)
        elif self._forward_fn is None and self._signature is not None:
            args, kwargs = self._arguments(item)
            mask = self._signature.bind(*args, **kwargs).arguments.get(name)
        else:
            mask = None
        if not isinstance(mask, Tensor) or mask.dim() != 2:
            return None
        tokens = mask != 0
        return None if bool(tokens.all()) else tokens  # else every pass would pick all positions

    def digest(self) -> str:
        """A fingerprint of all batches' tensors."""
        assert self._hash is not None
        return self._hash.hexdigest()


def _plain(item: Any) -> Any:
    """Mappings that torch does not know, as a tokenizer's output, as dicts."""
    return dict(item) if isinstance(item, Mapping) and not isinstance(item, dict) else item


def unpadded(x: Tensor, mask: Tensor | None) -> Tensor:
    """The positions of x [batch, tokens, features], or the same flattened, that are no padding."""
    if mask is None:
        return x
    if x.dim() == 3 and x.shape[:2] == mask.shape:
        return x[mask.to(x.device)]
    if x.dim() == 2 and mask.numel() > len(mask) and len(x) == mask.numel():
        return x[mask.to(x.device).reshape(-1)]
    return x


def single_device(model: nn.Module) -> torch.device | None:
    """Where batches go: the one device of all parameters, or None."""
    devices = {p.device for p in model.parameters() if not p.is_meta}
    return devices.pop() if len(devices) == 1 else None
