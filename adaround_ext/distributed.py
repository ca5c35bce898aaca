"""Several processes on one model: who does what, and what they tell each other.

Calibration batches are shared out, statistics summed once a layer, rows or whole layers solved
here and there, and codes gathered; nothing is said during an optimisation.
"""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Literal, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils import _pytree as pytree

Reduction = Literal["ordered", "fast"]
REDUCTIONS = ("ordered", "fast")
T = TypeVar("T")
_PIECE = 1 << 23  # float64 values in flight at a time: 64 MiB
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
            made = make()
        except Exception as caught:
            return self._agree(what, caught, None)
        return self._agree(what, None, made)

    def from_first(self, what: str, make: Callable[[], T]) -> T:
        """What the first rank makes, at all ranks."""
        return self.exchange(what, lambda: make() if self.first else None)[0]  # type: ignore[return-value]

    def _agree(self, what: str, error: Exception | None, made: Any) -> list[Any]:
        text = None if error is None else f"{type(error).__name__}: {error}"
        told = self.gather((text, made), what)
        if error is not None:
            raise error
        for rank, (other, _) in enumerate(told):
            if other is not None:
                raise RuntimeError(f"rank {rank} stopped during {what}: {other}")
        return [own for _, own in told]

    def same(self, what: str, value: object) -> None:
        """ValueError unless all ranks have this value."""
        found = self.gather(value, what)
        for rank, other in enumerate(found):
            if other != found[0]:
                raise ValueError(f"{what} must be the same on all ranks, got another on {rank}")

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
        data: list[Tensor] = []

        def shape(tensor: Tensor) -> _Shape:
            flat = tensor.detach().contiguous().view(-1)
            data.append(flat.view(torch.uint8).to(self.device))
            return _Shape(tuple(tensor.shape), tensor.dtype)

        # Tensors as bytes of their own: pickled they would take many times longer.
        plain = pickle.dumps(pytree.tree_map_only(Tensor, shape, value))
        head = torch.frombuffer(bytearray(plain), dtype=torch.uint8).to(self.device)
        own = torch.cat([head, *data])
        sizes = self._all(what, torch.tensor([len(head), len(own)], device=self.device))
        ends = [tuple(map(int, size)) for size in sizes]
        longest = max(end for _, end in ends)
        padded = torch.cat([own, own.new_zeros(longest - len(own))])
        found = [flat.cpu() for flat in self._all(what, padded)]
        return [_unpacked(flat, *end) for flat, end in zip(found, ends, strict=True)]

    def matrix_sum(self, *shape: int) -> MatrixSum:
        """A sum over the segments of all ranks, of float32 or float64 matrices."""
        return MatrixSum(self, shape)

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
        found = [torch.empty_like(values) for _ in range(self.size)]
        self._call(what, dist.all_gather, found, values)
        return found

    def _call(self, what: str, function: Callable[..., object], *arguments: object) -> None:
        try:
            function(*arguments, group=self._group)
        except RuntimeError as error:
            raise RuntimeError(_LOST.format(what=what)) from error


class MatrixSum:
    """A float64 sum of matrices, added in the order of ranks and, in each, as they came."""

    def __init__(self, ranks: Ranks, shape: tuple[int, ...]) -> None:
        self._ranks, self._shape = ranks, shape
        self._values: list[Tensor] = []

    def add(self, value: Tensor | None) -> None:
        """``value`` is the sum's from now on; None counts for nothing."""
        if value is None:
            return
        apart = self._ranks.size > 1 and self._ranks.ordered
        if apart or not self._values:
            self._values.append(value if apart else value.double())
        else:
            self._values[0] += value

    def total(self, device: torch.device, counts: list[int]) -> Tensor:
        """The sum of ``counts[rank]`` matrices of each rank; zeros where there is none."""
        ranks = self._ranks
        if ranks.size == 1:
            return self._values.pop().view(self._shape) if self._values else self._zeros(device)
        total = self._zeros(device)
        flat = total.view(-1)
        size = max(1, min(_PIECE // max(1, sum(counts)), len(flat)))
        step = -(-size // ranks.size) * ranks.size  # a part for each rank
        for begin in range(0, len(flat), step) if any(counts) else ():
            pieces = [value.view(-1)[begin : begin + step] for value in self._values]
            found = (self._ordered if ranks.ordered else self._reduced)(pieces, counts, step)
            flat[begin : begin + step] = found[: len(flat) - begin]
        self._values.clear()
        return total

    def _ordered(self, pieces: list[Tensor], counts: list[int], step: int) -> Tensor:
        """Each rank adds up a part of the piece and sends it to all."""
        size = step // self._ranks.size
        block = self._block(pieces, len(pieces), step)
        parts = block.view(len(pieces), self._ranks.size, size).transpose(0, 1)
        first, *others = self._ranks.all_to_all(parts, counts, size)
        for other in others:
            first += other
        return self._ranks.concatenate(first.contiguous())

    def _reduced(self, pieces: list[Tensor], counts: list[int], step: int) -> Tensor:
        block = self._block(pieces, 1, step)[0]
        self._ranks.add_up(block)
        return block

    def _block(self, pieces: list[Tensor], rows: int, step: int) -> Tensor:
        block = torch.zeros(rows, step, dtype=torch.float64, device=self._ranks.device)
        for row, piece in zip(block, pieces, strict=False):
            row[: len(piece)] = piece
        return block

    def _zeros(self, device: torch.device) -> Tensor:
        return torch.zeros(self._shape, dtype=torch.float64, device=device)


@dataclass(frozen=True)
class _Shape:
    """Stands for a tensor in what is pickled."""

    shape: tuple[int, ...]
    dtype: torch.dtype


def _unpacked(data: Tensor, head: int, end: int) -> Any:
    """The tree that :meth:`Ranks.gather` sent as bytes: ``head`` of them pickled, then tensors."""
    begin = head

    def tensor(stands: _Shape) -> Tensor:
        nonlocal begin
        stop = begin + torch.Size(stands.shape).numel() * stands.dtype.itemsize
        # A copy: bytes of another dtype may begin at any address here.
        found = data[begin:stop].clone().view(stands.dtype).view(stands.shape)
        begin = stop
        return found

    plain = pickle.loads(data[:head].numpy().tobytes())
    return pytree.tree_map_only(_Shape, tensor, plain)
