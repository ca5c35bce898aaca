"""Overrides of layers that are not quantized anyway, of none, and of compiled models."""

from __future__ import annotations

import copy
import re
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import quantize_, sensitivity

pytestmark = pytest.mark.usefixtures("one_thread")
FAST: dict[str, Any] = {"preset": "fast", "progress": False}


class Decoder(nn.Module):
    """With a tied head, a layer that is not called, and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 8)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.ReLU()) for _ in range(2))
        self.norm, self.spare = nn.LayerNorm(8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 16, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


IDS = [torch.randint(0, 16, (4, 6))]


@pytest.mark.parametrize(
    ("key", "reason"),
    [
        ("head", r"\(head: its weight is also that of embed \(Embedding\)\)"),
        ("h*d", r"\(head: its weight is also"),
        ("spare", r"\(spare: it was not called"),
        ("embed", ""),
        ("norm", ""),
        (nn.LayerNorm, ""),
        (nn.Embedding, ""),
    ],
)
def test_to_skip_what_is_skipped_is_a_note(key: Any, reason: str) -> None:
    name = key if isinstance(key, str) else key.__name__
    report = quantize_(Decoder(), IDS, overrides={key: "skip"}, **FAST)
    notes = [note for note in report.notes if "not quantized anyway" in note]
    assert len(notes) == 1 and notes[0].startswith(f"overrides skip {name}, which")
    assert re.search(reason, notes[0])
    assert len(report.layers) == 2
    found = sensitivity(Decoder(), IDS, (4,), overrides={key: "skip"}, progress=False)
    assert notes[0] in found.notes


def test_to_skip_what_filter_fn_leaves_out() -> None:
    def wanted(module: nn.Module, name: str) -> bool:
        return name != "blocks.0.0"

    settings: dict[str, Any] = {"filter_fn": wanted, "overrides": {"blocks.0": "skip"}}
    report = quantize_(Decoder(), IDS, **settings, **FAST)
    assert any("blocks.0.0: filter_fn returned False" in note for note in report.notes)


def test_settings_for_what_is_skipped_stay_an_error() -> None:
    for key in ("head", "spare", "norm", nn.Embedding):
        with pytest.raises(ValueError, match=r"overrides must match layers to quantize, .* none"):
            quantize_(Decoder(), IDS, overrides={key: {"bits": 8}}, **FAST)
    with pytest.raises(ValueError, match=r"'head' matches none \(head: its weight is also"):
        quantize_(Decoder(), IDS, overrides={"head": {"bits": 8}}, **FAST)


@pytest.mark.parametrize(
    ("key", "meant"),
    [("lm_head", "head"), ("block.0", "blocks.0"), ("haed", "head"), ("blocks.0.1.0", "blocks.0.")],
)
@pytest.mark.parametrize("value", ["skip", {"bits": 8}])
def test_names_that_are_nowhere(key: str, meant: str, value: Any) -> None:
    """Refused before anything is run."""

    def never() -> Any:
        raise AssertionError("calibration was drawn")
        yield

    rule = rf"^overrides must match modules of the model, got '{key}': did you mean {meant}"
    with pytest.raises(ValueError, match=rule):
        quantize_(Decoder(), never(), overrides={key: value}, **FAST)
    with pytest.raises(ValueError, match=r"got <class .*LSTM'>$"):
        quantize_(Decoder(), never(), overrides={nn.LSTM: value}, **FAST)
    with pytest.raises(ValueError, match=r"got 'zzz'$"):
        quantize_(Decoder(), never(), overrides={"zzz": value}, **FAST)


def test_a_group_size_is_enough() -> None:
    overrides = {"blocks": {"group_size": 4}, "blocks.1": {"granularity": "per_tensor"}}
    report = quantize_(Decoder(), IDS, overrides=overrides, **FAST)
    found = [(e.config["granularity"], e.config["group_size"]) for e in report.layers]
    assert found == [("per_group", 4), ("per_tensor", None)]


def compiled(part: str) -> nn.Module:
    torch.manual_seed(0)
    model = Decoder()
    if part == "all":
        return torch.compile(model, backend="eager")  # type: ignore[return-value]
    if part == "block":
        model.blocks[0] = torch.compile(model.blocks[0], backend="eager")
    else:
        model.blocks[0][0] = torch.compile(model.blocks[0][0], backend="eager")
    return model


@pytest.mark.parametrize("part", ["all", "block", "layer"])
@pytest.mark.parametrize(
    "keys",
    [
        ("blocks.0.0", "head"),
        ("blocks.0", "he*"),
        ("_orig_mod.blocks.0", "_orig_mod.head"),
        ("blocks.0._orig_mod.0", "head"),
        ("blocks.?.0._orig_mod", "head"),
    ],
)
def test_compiled_models_have_the_names_that_they_were_written_with(
    part: str, keys: tuple[str, str]
) -> None:
    plain = Decoder()
    model = compiled(part)
    plain.load_state_dict({n.replace("_orig_mod.", ""): t for n, t in model.state_dict().items()})
    overrides = {keys[0]: {"bits": 8}, keys[1]: "skip"}
    report = quantize_(model, IDS, overrides=overrides, blocks=["blocks.*"], **FAST)
    wanted = quantize_(
        plain, IDS, overrides={k.replace("_orig_mod.", "").removesuffix("._orig_mod"): v
                               for k, v in overrides.items()}, blocks=["blocks.*"], **FAST
    )  # fmt: skip
    assert [e.name for e in report.layers] == ["blocks.0.0", "blocks.1.0"]
    assert [e.config["bits"] for e in report.layers] == [e.config["bits"] for e in wanted.layers]
    assert report.layers[0].config["bits"] == 8
    assert report.skipped == wanted.skipped
    assert [e.block for e in report.layers] == [e.block for e in wanted.layers]


def test_names_for_filter_fn_in_compiled_models() -> None:
    seen = []
    model = compiled("all")
    before = copy.deepcopy(model.state_dict())

    def wanted(module: nn.Module, name: str) -> bool:
        seen.append(name)
        return name == "blocks.1.0"

    quantize_(model, IDS, filter_fn=wanted, **FAST)
    assert seen == ["blocks.0.0", "blocks.1.0"]
    changed = [n for n, t in model.state_dict().items() if not torch.equal(t, before[n])]
    assert {name.rpartition(".")[0] for name in changed} == {"_orig_mod.blocks.1.0"}
