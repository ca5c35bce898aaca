"""A workspace: what it knows of a model, and that the model is as it was when it is closed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import AdaRoundConfig, quantize_
from adaround_ext.activations.quantizer import ActivationConfig
from adaround_ext.export.goal.goal import Goal
from adaround_ext.model.workspace import Analysis, WorkspaceOptions, opened
from adaround_ext.replay.census import NewCalls
from tests.model.test_model_errors import Snapshot, images, net

OPTIONS = WorkspaceOptions(AdaRoundConfig(preset="fast"))


def open_(model: nn.Module, data: list[Tensor], options: WorkspaceOptions = OPTIONS) -> Any:
    return opened(model, data, options, Goal(None, model))


def test_a_closed_workspace_leaves_the_model_as_it_was() -> None:
    model = net().train()
    before = Snapshot(model)
    with open_(model, images()) as workspace:
        assert not torch.equal(model[0].weight, before.state["0.weight"])  # the norm is folded
        assert not model.training and not torch.is_grad_enabled()
        analysis = workspace.analyse()
    assert [target.name for target in analysis.plan.targets] == ["0", "4"]
    assert [target.objective for target in analysis.plan.targets] == ["gram", "gram"]
    assert workspace.prepared.notes == ["1 batch norms folded into their layers"]
    before.check()


def test_changes_that_are_kept_stay() -> None:
    model = net().eval()
    (x,) = images(1)
    with open_(model, [x]) as workspace:
        folded = model[0].weight.detach().clone()
        workspace.keep_changes()
    assert torch.equal(model[0].weight, folded)


def test_an_error_inside_takes_the_changes_back() -> None:
    model = net()
    before = Snapshot(model)
    with pytest.raises(KeyError), open_(model, images()):
        raise KeyError
    before.check()


def test_an_attempt_is_made_again_with_the_calls_that_it_misses() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.always, self.rarely = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Any:
            y = self.always(x)
            return self.rarely(y) if len(x) > 4 else y

    known: list[list[str]] = []

    def attempt(analysis: Analysis) -> int:
        known.append([target.name for target in analysis.plan.targets])
        if len(known) == 1:
            raise NewCalls([2])
        return len(analysis.plan.notes)

    with open_(Sometimes(), [torch.randn(n, 4) for n in (3, 4, 5)]) as workspace:
        assert workspace.with_all_calls(attempt) == 1
        assert list(workspace.traces) == [0, 2]
    assert known == [["always"], ["always", "rarely"]]


@pytest.mark.parametrize("off", [True, False])
def test_quantizers_of_activations_while_it_is_traced(off: bool) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)).eval()
    data = [torch.randn(8, 4)]
    quantize_(model, data, preset="fast", activations=ActivationConfig(), progress=False)
    options = WorkspaceOptions(AdaRoundConfig(preset="fast"), quantizers_off=off)
    with open_(model, data, options) as workspace:
        names = {operator.name for operator in workspace.analyse().trace.operators}
    assert any("round" in name or "fake_quantize" in name for name in names) is not off


def test_what_cannot_be_opened_is_named() -> None:
    model = net()
    before = Snapshot(model)
    nowhere = WorkspaceOptions(AdaRoundConfig(), device="nowhere")
    with pytest.raises(ValueError, match="device must be one of this machine, got 'nowhere'"):
        open_(model, images(), nowhere).__enter__()
    with pytest.raises(ValueError, match="calibration must hold at least one batch"):
        open_(model, []).__enter__()
    before.check()
