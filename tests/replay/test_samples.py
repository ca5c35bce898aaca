"""All samples in one tensor or mapping."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from adaround_ext import quantize_
from adaround_ext.replay.samples import cut

pytestmark = pytest.mark.usefixtures("one_thread")
X = torch.randn(70, 4)


@pytest.mark.parametrize(
    "other",
    [
        torch.tensor(2.0), 2.0, 3, True, None, "mean", np.float32(2), torch.ones(1, 4), [1, 2],
        (3, 4), {"scale": 2.0}, np.ones((1, 4)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("first", [True, False])
def test_what_is_no_sample_goes_into_every_batch(other: Any, first: bool) -> None:
    samples = {"other": other, "x": X} if first else {"x": X, "other": other}
    batches = list(cut(samples))
    assert [len(batch["x"]) for batch in batches] == [32, 32, 6]
    assert torch.equal(torch.cat([batch["x"] for batch in batches]), X)
    assert all(batch["other"] is other for batch in batches)


def test_all_that_has_samples_is_cut() -> None:
    samples = {"x": X, "ids": np.arange(70), "texts": list(map(str, range(70)))}
    batches = list(cut(samples))
    assert [len(batch[name]) for batch in batches for name in samples] == [32] * 6 + [6] * 3
    assert batches[1]["ids"][0] == 32 and batches[2]["texts"][-1] == "69"


@pytest.mark.parametrize(
    "samples",
    [
        {"x": X, "other": torch.ones(3)},
        {"x": X, "state": (torch.ones(70),)},
        {"x": X, "adjacency": torch.eye(70).to_sparse()},
        {"temperature": torch.tensor(1.0)},
        {"x": torch.ones(1, 4), "other": torch.tensor(1.0), "flag": None},
    ],
)
def test_what_cannot_be_told_is_one_batch(samples: dict[str, Any]) -> None:
    (batch,) = cut(samples)
    assert batch.keys() == samples.keys()
    assert all(batch[name] is value or len(value) == 1 for name, value in samples.items())


class Tempered(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, temperature: Tensor, x: Tensor, flag: bool | None = None) -> Tensor:
        assert flag is None or flag is True
        return self.layer(x) / temperature


@pytest.mark.parametrize("flag", [None, True])
def test_a_temperature_for_all(flag: bool | None) -> None:
    samples = {"temperature": torch.tensor(2.0), "x": X, "flag": flag}
    report = quantize_(Tempered(), samples, preset="fast", progress=False)
    assert (report.batches, report.samples) == (3, 70)
    listed = quantize_(Tempered(), [samples], preset="fast", progress=False)
    assert (listed.batches, listed.samples) == (1, 70)
