"""quantize_ on loaders, batches and states that are not what they seem."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from adaround_ext import ActivationConfig, ModelReport, quantize_
from tests.model.test_odd_models import FAST, Net, vectors

pytestmark = pytest.mark.usefixtures("one_thread")


def fitted(source: Any, **arguments: Any) -> ModelReport:
    torch.manual_seed(5)
    return quantize_(Net(), source, FAST, progress=False, **arguments)


def test_a_loader_that_fills_one_array_again() -> None:
    batches = [torch.randn(16, 8).numpy() for _ in range(3)]

    def refilled() -> Iterator[dict[str, Any]]:
        array = np.empty((16, 8), dtype=np.float32)
        for batch in batches:
            array[:] = batch
            yield {"x": array, "name": "batch", "weight": None}

    def forward(model: nn.Module, batch: dict[str, Any]) -> None:
        model(torch.from_numpy(batch["x"]))

    losses = [
        [entry.report.losses for entry in fitted(source, forward_fn=forward).layers]
        for source in (refilled(), [{"x": batch} for batch in batches])
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"padding_mask": None}, "padding_mask"),
        ({"forward_fn": lambda model, batch: model(torch.tensor(batch))}, "forward_fn"),
        ({"source": [np.ones((4, 8), dtype=np.float32)]}, "calibration"),
    ],
)
def test_resuming_looks_at_all_that_is_given(
    change: dict[str, Any], part: str, tmp_path: Path
) -> None:
    def forward(model: nn.Module, batch: Any) -> Any:
        return model(torch.from_numpy(batch))

    first: dict[str, Any] = {"source": [np.zeros((4, 8), np.float32)], "forward_fn": forward}
    fitted(**first, checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=f"of a run with another {part}"):
        fitted(**{**first, **change}, checkpoint_dir=tmp_path)


def test_what_prepares_a_batch_is_no_part_of_the_model() -> None:
    """Copies and casts of the inputs: a shortcut from the model's input is found all the same."""
    for forward in (None, lambda model, batch: model(batch.double().float())):
        model = Net()
        quantize_(
            model, vectors(16), FAST, activations=ActivationConfig(), forward_fn=forward,
            progress=False,
        )  # fmt: skip
        assert hasattr(model.blocks[0], "input_quantizer")  # not only its first layer


def test_models_without_weights_yet() -> None:
    lazy = nn.Sequential(nn.LazyLinear(8), nn.ReLU(), nn.Linear(8, 4))
    with pytest.raises(ValueError, match=r"model must have been run once, got 0\.weight"):
        quantize_(lazy, vectors(4), progress=False)
    assert isinstance(lazy[0], nn.LazyLinear)
    with torch.inference_mode():
        frozen = Net()
    with pytest.raises(ValueError, match=r"inference_mode, as blocks\.0\.a\.weight was"):
        quantize_(frozen, vectors(4), progress=False)
