"""How much of a model was not quantized, and why."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from adaround_ext.checks import some
from adaround_ext.report.text import as_count, as_percent

FEW = "most parameters were not quantized"
_REASONS = 3  # that are told


def is_few(quantized: int, parameters: int) -> bool:
    """Whether figures about the quantized weights say little about the model."""
    return 2 * quantized < parameters


def few_quantized(
    model: nn.Module, weights: Iterable[nn.Parameter], skipped: Mapping[str, str]
) -> list[str]:
    """A note where ``weights``, which were quantized, are less than half of a model's parameters.

    It has the reasons that leave most, of ``skipped`` or what kind of module it is, each with its
    largest module. Parameters that several modules hold count for the first.
    """
    done = {id(weight): weight.numel() for weight in weights}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(done.values())
    if not is_few(quantized, parameters):
        return []
    left: dict[str, Counter[str]] = defaultdict(Counter)
    seen = set(done)
    for name, module in model.named_modules():
        held = list(module.parameters(recurse=False))
        if any(id(parameter) in done for parameter in held):
            continue  # a bias is no layer that was left
        own = [parameter for parameter in held if id(parameter) not in seen]
        seen.update(map(id, own))
        count = sum(parameter.numel() for parameter in own)
        if count:
            reason = skipped.get(name, f"{type(module).__name__} is not quantized")
            left[reason][name or "the model"] += count
    largest = sorted(left.items(), key=lambda item: -item[1].total())[:_REASONS]
    told = "; ".join(
        f"{as_count(counts.total())} in {some([name for name, _ in counts.most_common()], 1)}: "
        f"{reason}"
        for reason, counts in largest
    )
    share = as_percent(quantized / parameters)
    return [
        f"{FEW}: {as_count(quantized)} of {as_count(parameters)} were ({share}); of the others "
        f"{told}"
    ]


def told_first(notes: Iterable[str], quantized: int, parameters: int) -> str | None:
    """What a summary says before anything else, None where most parameters were quantized."""
    if not is_few(quantized, parameters):
        return None
    return next((note for note in notes if note.startswith(FEW)), f"{FEW}, see report.skipped")
