"""Census: what runs, how often and on what, in one run of a model over all calibration batches."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from adaround_ext.layers.matrix import SUPPORTED
from adaround_ext.replay.checksums import EXACT, REPEATED, ROUNDED, InputChecksums
from adaround_ext.tensors import tensors
from adaround_ext.tracing.trace import Trace, unwatched


class NewCalls(Exception):
    """Batches in which layers run that the traces do not have, or more often: to be traced too."""

    def __init__(self, batches: list[int]) -> None:
        super().__init__(batches)
        self.batches = batches


class Census:
    """Of the Linear and convolution layers, in the full-precision model with nothing replaced.

    counts: calls by batch and layer, of every batch that has run. unrepeatable: layers whose inputs
    were others when the same batch ran again with the same seeds.
    """

    def __init__(self, model: nn.Module, trace: Trace | None, rounded: bool) -> None:
        """trace: of the calls that are known, None where new ones do not matter. rounded: whether
        recordings are."""
        self.checksums = InputChecksums(ROUNDED if rounded else EXACT)
        self.counts: dict[int, Counter[nn.Module]] = {}
        self.unrepeatable: set[nn.Module] = set()
        self.layers = layers_of(model)
        self._trace = trace

    def begin(self, batch: int) -> None:
        """The batch runs, perhaps once more."""
        self.counts[batch] = Counter()

    def note(self, batch: int, layer: nn.Module, call: int, x: Tensor | None) -> None:
        """A call of a layer, in order."""
        self.counts[batch][layer] += 1
        if x is not None:
            self.checksums.note(batch, layer, call, x)

    def new_calls(self) -> dict[int, dict[str, int]]:
        """By batch and name, how often layers ran that ran more often than in the traces."""
        if self._trace is None:
            return {}
        new: dict[int, dict[str, int]] = defaultdict(dict)
        for batch, counts in self.counts.items():
            for layer, count in counts.items():
                if count > len(self._trace.calls_of(layer)):
                    new[batch][self.layers[layer]] = count
        return dict(new)


def layers_of(model: nn.Module) -> dict[nn.Module, str]:
    """All Linear and convolution layers, with their names."""
    return {m: name for name, m in model.named_modules() if isinstance(m, SUPPORTED)}


def batches_to_trace(new: Mapping[int, Mapping[str, int]]) -> list[int]:
    """Few batches in which all new calls come, those with most of them first."""
    missing: Counter[str] = Counter()  # by layer, the most calls in a batch
    for counts in new.values():
        missing |= Counter(counts)

    def covered(batch: int) -> int:
        return sum(new[batch].get(name, 0) >= count for name, count in missing.items())

    chosen = []
    while missing:
        batch = max(new, key=lambda number: (covered(number), -number))
        chosen.append(batch)
        missing = Counter({n: k for n, k in missing.items() if new[batch].get(n, 0) < k})
    return chosen


@contextmanager
def input_checksums(model: nn.Module, batch: int) -> Iterator[InputChecksums]:
    """Checksums of the one run of a batch inside; a trace sees nothing of how they are made."""
    checksums = InputChecksums(REPEATED)
    counts: Counter[nn.Module] = Counter()

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next(tensors((args, kwargs)), None)
        if x is not None:
            with unwatched():
                checksums.note(batch, module, counts[module], x)
        counts[module] += 1

    with ExitStack() as hooks:
        for layer in layers_of(model):
            hooks.enter_context(layer.register_forward_pre_hook(before, with_kwargs=True))
        yield checksums
