"""What stands for blocks that are done."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import quantize_
from adaround_ext.replay.recordings import Blanks, Template

pytestmark = pytest.mark.on_a_device


def played(blanks: Blanks, *outputs: torch.Tensor) -> list[torch.Tensor]:
    template, recorded = Template.of(list(outputs), [], [], needed=False)
    assert recorded == []
    outputs_again: list[torch.Tensor] = template.play((), recorded, blanks)
    return outputs_again


def test_zeros_like_the_outputs(device: torch.device) -> None:
    images = torch.randn(2, 3, 4, 5).to(device).to(memory_format=torch.channels_last)
    indices = torch.ones(3, dtype=torch.int64, device=device)
    blanks = Blanks()
    outputs_again = played(blanks, images, indices)
    for blank, output in zip(outputs_again, (images, indices), strict=True):
        assert blank.shape == output.shape and blank.stride() == output.stride()
        assert blank.dtype == output.dtype and blank.device == output.device
        assert not blank.any()


def test_one_memory_for_all_and_zeros_again_after_a_write(device: torch.device) -> None:
    blanks, output = Blanks(), torch.randn(3, 4).to(device)
    first, second = played(blanks, output, output)
    assert first is not second and first.data_ptr() == second.data_ptr()
    assert first.data_ptr() != output.data_ptr()
    second += 1  # as a model may, between its blocks
    (third,) = played(blanks, output)
    assert third.data_ptr() == first.data_ptr() and not third.any()


def test_only_what_the_last_run_used_is_kept() -> None:
    blanks = Blanks()
    sizes = [torch.randn(n) for n in (3, 4)]
    played(blanks, *sizes)
    blanks.next_run()
    assert len(blanks._tensors) == 2
    played(blanks, sizes[0])
    blanks.next_run()
    assert [output.shape for output in blanks._tensors] == [(3,)]


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.first(x).relu())


def test_how_often_a_block_runs() -> None:
    """One run of the full-precision stream is for all of its layers, and is recorded."""
    model = nn.Sequential(*(_Block() for _ in range(3)))
    runs = 0

    def count(*_: object) -> None:
        nonlocal runs
        runs += 1

    model[1].first.register_forward_hook(count)
    batches = [torch.randn(4, 8) for _ in range(5)]
    quantize_(model, batches[:1], preset="fast", blocks=[_Block], progress=False)
    one, runs = runs, 0
    quantize_(model, batches, preset="fast", blocks=[_Block], progress=False)
    # The first pass, which sees everything; the one in full precision; the quantized stream up to
    # the second layer, and through the finished block.
    assert runs - one == 4 * (1 + 1 + 1 + 1)
