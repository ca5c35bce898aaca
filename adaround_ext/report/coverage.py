"""Coverage: the note of a model of which little was quantized, and the reasons."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping

from torch import nn

from adaround_ext.checks import some
from adaround_ext.report.text import as_count, as_percent

FEW = "most parameters were not quantized"
_MOST_REASONS = 3  # that a note has


def is_few(quantized: int, parameters: int) -> bool:
    """Whether figures about the quantized weights say little about the model."""
    return 2 * quantized < parameters


def few_quantized(
    model: nn.Module, weights: Iterable[nn.Parameter], skipped: Mapping[str, str]
) -> list[str]:
    """A note where less than half of a model's parameters were quantized, none otherwise.

    It has the reasons that leave most, each with its largest module. Parameters that several
    modules hold count for the first.

    Args:
        model: The whole.
        weights: The parameters that were quantized.
        skipped: Reasons by module name; of other modules their kind is the reason.
    """
    sizes = {id(weight): weight.numel() for weight in weights}
    parameters = sum(parameter.numel() for parameter in model.parameters())
    quantized = sum(sizes.values())
    if not is_few(quantized, parameters):
        return []
    by_reason = _others(model, set(sizes), skipped)
    largest = sorted(by_reason.items(), key=lambda item: -item[1].total())[:_MOST_REASONS]
    others = "; ".join(
        f"{as_count(counts.total())} in {some([name for name, _ in counts.most_common()], 1)}: "
        f"{reason}"
        for reason, counts in largest
    )
    share = as_percent(quantized / parameters)
    return [
        f"{FEW}: {as_count(quantized)} of {as_count(parameters)} were ({share}); of the others "
        f"{others}"
    ]


def _others(
    model: nn.Module, quantized: set[int], skipped: Mapping[str, str]
) -> dict[str, Counter[str]]:
    """How many parameters of which modules were not quantized, by reason."""
    by_reason: dict[str, Counter[str]] = defaultdict(Counter)
    counted = set(quantized)
    for name, module in model.named_modules():
        parameters = {id(p): p.numel() for p in module.parameters(recurse=False)}
        if quantized & parameters.keys():
            continue  # a quantized layer's bias is no layer that was left
        count = sum(size for key, size in parameters.items() if key not in counted)
        counted |= parameters.keys()
        if count:
            reason = skipped.get(name, f"{type(module).__name__} is not quantized")
            by_reason[reason][name or "the model"] += count
    return by_reason


def told_first(notes: Iterable[str], quantized: int, parameters: int) -> str | None:
    """What a summary says before anything else, None where most parameters were quantized."""
    if not is_few(quantized, parameters):
        return None
    return next((note for note in notes if note.startswith(FEW)), f"{FEW}, see report.skipped")
