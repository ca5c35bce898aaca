"""Several processes on one model: who does what, and what they tell each other.

Calibration batches are shared out, statistics summed once a layer, rows or whole layers solved
here and there, and codes gathered; nothing is said during an optimisation.
"""

from __future__ import annotations

import io
import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

Reduction = Literal["ordered", "fast"]
REDUCTIONS = ("ordered", "fast")
T = TypeVar("T")
_PATIENCE = 10.0  # seconds for what takes microseconds, on a machine that is not overloaded
_LOST = (
    "another rank stopped answering during {what}: its own output says why. Layers that were done "
    "are in checkpoint_dir, if that was given: the same call goes on from there"
)


@contextmanager
def launched(device: torch.device) -> Iterator[dist.ProcessGroup | None]:
    """The group of all processes where torchrun started this one among several, else None.

    nccl between CUDA devices, else gloo; the group ends with the context.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        yield None
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


class Ranks:
    """The processes of a torch.distributed group; without a group, this one alone.

    reduction: "ordered" adds the sums of all segments of the data in their order, so that the bits
    do not depend on the number of ranks; "fast" is one all-reduce: less memory and traffic, and
    other last bits for another number of ranks.
    Raises TypeError and ValueError naming ``process_group`` and ``reduction``.
    """

    def __init__(
        self, process_group: dist.ProcessGroup | None = None, reduction: Reduction = "ordered"
    ) -> None:
        if reduction not in REDUCTIONS:
            rule = f"reduction must be one of {', '.join(REDUCTIONS)}"
            raise ValueError(f"{rule}, got {reduction!r}")
        self.ordered = reduction == "ordered"
        self.rank, self.size = 0, 1
        self._group = process_group
        self.device = torch.device("cpu")  # of what is sent
        if process_group is None:
            return
        if not dist.is_available() or not isinstance(process_group, dist.ProcessGroup):
            came = type(process_group).__name__
            raise TypeError(
                f"process_group must be a group of torch.distributed or None, got {came}"
            )
        self.rank, self.size = dist.get_rank(process_group), dist.get_world_size(process_group)
        if self.rank < 0:
            raise ValueError("process_group must have this process in it, got one that has not")
        if "gloo" not in str(dist.get_backend_config(process_group)):
            self.device = torch.device("cuda", torch.cuda.current_device())

    @property
    def summation(self) -> str:
        """In which order sums are added up, by name: equal names, equal bits."""
        return "ordered" if self.ordered or self.size == 1 else f"fast, {self.size} ranks"

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes files and shows progress."""
        return self.rank == 0

    @contextmanager
    def together(self, what: str) -> Iterator[None]:
        """No rank leaves this before all have come to its end; if one of them fails, all do.

        What is inside says nothing to other ranks. Its error is raised where it failed, elsewhere
        RuntimeError with the rank and that error.
        """
        error: Exception | None = None
        try:
            yield
        except Exception as caught:
            error = caught
        self._agree(what, error, None)

    def exchange(self, what: str, make: Callable[[], T]) -> list[T]:
        """What every rank makes, at every rank, tensors on the CPU; errors as in `together`."""
        if self.size == 1:
            return [make()]
        try:
            value = make()
        except Exception as caught:
            return self._agree(what, caught, None)
        return self._agree(what, None, value)

    def from_first(self, what: str, make: Callable[[], T]) -> T:
        """What the first rank makes, at all ranks."""
        return self.exchange(what, lambda: make() if self.first else None)[0]  # type: ignore[return-value]

    def _agree(self, what: str, error: Exception | None, value: Any) -> list[Any]:
        text = None if error is None else f"{type(error).__name__}: {error}"
        outcomes = self.gather((text, value), what)
        if error is not None:
            raise error
        for rank, (other, _) in enumerate(outcomes):
            if other is not None:
                raise RuntimeError(f"rank {rank} stopped during {what}: {other}")
        return [local for _, local in outcomes]

    def same(self, values: Mapping[str, object]) -> None:
        """ValueError, naming what differs, unless all ranks have these values."""
        first, *others = self.gather(values, "the start")
        for rank, other in enumerate(others, 1):
            for name, value in first.items():
                if other[name] != value:
                    raise ValueError(f"{name} must be the same on all ranks, got another on {rank}")

    def share(self, weights: Sequence[float]) -> list[range]:
        """Consecutive items for each rank, about the same sum of ``weights`` for all."""
        total = sum(weights)
        ends = list(accumulate(weights))
        middles = [end - weight / 2 for end, weight in zip(ends, weights, strict=True)]
        owners = [min(int(self.size * m / total), self.size - 1) if total else 0 for m in middles]
        bounds = [sum(owner < rank for owner in owners) for rank in range(self.size + 1)]
        return [range(bounds[rank], bounds[rank + 1]) for rank in range(self.size)]

    def gather(self, value: T, what: str) -> list[T]:
        """Every rank's value, at every rank; tensors in it come back on the CPU."""
        if self.size == 1:
            return [value]
        plain, data = _packed(value)
        local = torch.cat([head.to(self.device) for head in (plain, *data)])
        sizes = self._all(what, torch.tensor([len(plain), len(local)], device=self.device))
        ends = [tuple(map(int, size)) for size in sizes]
        longest = max(end for _, end in ends)
        padded = torch.cat([local, local.new_zeros(longest - len(local))])
        gathered = [flat.cpu() for flat in self._all(what, padded)]
        return [
            _Unpickler(flat[:head], flat[head:end]).load()
            for flat, (head, end) in zip(gathered, ends, strict=True)
        ]

    def all_to_all(self, values: Tensor, counts: Sequence[int], size: int) -> Tensor:
        """values [ranks, own count, size], some for each rank; [all counts, size] for this one."""
        received = values.new_empty(sum(counts) * size)
        split = [counts[self.rank] * size] * self.size
        self._call(
            "statistics", dist.all_to_all_single, received, values.reshape(-1),
            [count * size for count in counts], split,
        )  # fmt: skip
        return received.view(-1, size)

    def concatenate(self, values: Tensor) -> Tensor:
        """The vectors of all ranks, all of one length, behind each other."""
        return torch.cat(self._all("statistics", values))

    def add_up(self, values: Tensor) -> None:
        """The sum of all ranks' values, in place, in an order that the library chooses."""
        self._call("statistics", dist.all_reduce, values)

    def _all(self, what: str, values: Tensor) -> list[Tensor]:
        gathered = [torch.empty_like(values) for _ in range(self.size)]
        self._call(what, dist.all_gather, gathered, values)
        return gathered

    def _call(self, what: str, function: Callable[..., object], *arguments: object) -> None:
        try:
            with _released(arguments) if self.device.type == "cpu" else nullcontext():
                function(*arguments, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(_LOST.format(what=what)) from error


@contextmanager
def _released(arguments: Sequence[object]) -> Iterator[None]:
    """Goes on only when no thread of gloo holds the tensors of a call any more.

    The call returns a moment earlier. The thread needs the interpreter to let go of them, and
    aborts the process if that has begun to end, with the group destroyed or not (pytorch#190489).
    """
    lists = (value if isinstance(value, list) else [value] for value in arguments)
    tensors = [value for values in lists for value in values if isinstance(value, Tensor)]
    before = _holders(tensors)
    try:
        yield
    finally:
        end = time.monotonic() + _PATIENCE
        while _holders(tensors) != before and time.monotonic() < end:
            time.sleep(0)  # lets another thread have the interpreter


def _holders(tensors: Sequence[Tensor]) -> list[int]:
    """How many of torch's own pointers there are to each, Python's being one."""
    return [tensor._use_count() for tensor in tensors]  # type: ignore[attr-defined]


ALONE = Ranks()


class _Pickler(pickle.Pickler):
    """Leaves tensors out, whose bytes pickle would take many times longer for."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.tensors: list[Tensor] = []

    def persistent_id(self, value: object) -> tuple[tuple[int, ...], torch.dtype] | None:
        if not isinstance(value, Tensor):
            return None
        self.tensors.append(value.detach().contiguous().view(-1).view(torch.uint8))
        return tuple(value.shape), value.dtype


class _Unpickler(pickle.Unpickler):
    """Reads ``plain``, with tensors whose bytes lie behind each other in ``data``."""

    def __init__(self, plain: Tensor, data: Tensor) -> None:
        super().__init__(io.BytesIO(plain.numpy().tobytes()))
        self._data = data

    def persistent_load(self, key: tuple[tuple[int, ...], torch.dtype]) -> Tensor:
        shape, dtype = key
        first, self._data = self._data.tensor_split([torch.Size(shape).numel() * dtype.itemsize])
        # A copy: bytes of another dtype may begin at any address here.
        return first.clone().view(dtype).view(shape)


def _packed(value: object) -> tuple[Tensor, list[Tensor]]:
    """What :class:`_Unpickler` reads, as bytes."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(value)
    return torch.frombuffer(bytearray(file.getvalue()), dtype=torch.uint8), pickler.tensors
