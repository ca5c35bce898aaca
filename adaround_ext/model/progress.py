"""Progress bar of quantize_: what was done last, and what is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from tqdm.auto import tqdm

from adaround_ext.report.layer import LayerReport

_BAR = 20  # columns of a terminal that are its least
_TELLS = 0.1  # share of the work from which on the time it took says what is left
_FORMAT = "{percentage:3.0f}% |{bar}| {elapsed}{left}{text}"


class FittingBar(tqdm):  # type: ignore[type-arg]
    """Counts layers and what they cost: passes of the model take as long for each, solving not."""

    def __init__(self, costs: Sequence[float], shown: bool) -> None:
        """costs: of each layer, about proportional to the time that solving it takes."""
        self._waiting = len(costs)
        self._each = 0.5 / max(1, len(costs))
        self._by_cost = 0.5 / (sum(costs) or 1.0)
        self._text = ""
        self._before = 0.0  # the share that was there already
        self._started = time.monotonic()
        super().__init__(total=1.0, disable=not shown, bar_format=_FORMAT, dynamic_ncols=True)

    def begin(self, names: Sequence[str]) -> None:
        """Says which layers are worked on."""
        more = f" and {len(names) - 1} more" if names[1:] else ""
        self._say(names[0] + more)

    def finish(self, name: str, cost: float, report: LayerReport, restored: bool) -> None:
        """Counts a layer; of one from a checkpoint nothing can be told about time."""
        self._waiting -= 1
        share = self._each + self._by_cost * cost if self._waiting else 1 - self.n
        if restored:
            self._before += share
        relative = report.relative
        self.update(share)
        self._say(f"{name}: {relative['nearest']:.3g} -> {relative['final']:.3g}")

    def seconds_left(self) -> float | None:
        """At the pace so far; None while too little is done to tell."""
        done = self.n - self._before
        if done <= 0 or done < _TELLS * (1 - self._before):
            return None
        return max(0.0, 1 - self.n) / done * (time.monotonic() - self._started)

    @property
    def format_dict(self) -> dict[str, Any]:
        """With the time left, and as much of the text as there is room for."""
        values = dict(super().format_dict)
        left = self.seconds_left()
        remaining = "" if left is None else f", {tqdm.format_interval(left)} left"
        values |= {"left": remaining, "text": ""}
        if self._text:
            elapsed = tqdm.format_interval(values["elapsed"])
            taken = len("100% || ") + _BAR + len(elapsed + remaining) + 2
            room = (values["ncols"] or 100) - taken
            values["text"] = f"  {_end(self._text, room)}" if room > 8 else ""
        return values

    def _say(self, text: str) -> None:
        self._text = text
        self.refresh()


def _end(text: str, room: int) -> str:
    """The end of a long text, where names differ."""
    return text if len(text) <= room else "\N{HORIZONTAL ELLIPSIS}" + text[1 - room :]
