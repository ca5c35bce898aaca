"""quantize_ gives a layer the same codes whatever the threads, the company and the names."""

from __future__ import annotations

import copy
import hashlib
import os
import subprocess
import sys
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, quantize_
from tests.model.test_checkpoint import interrupted
from tests.model.test_quantize import codes
from tests.support import models
from tests.support.helpers import threads

FAST: dict[str, Any] = {"preset": "fast", "bits": 3, "progress": False}
ANNEALED: dict[str, Any] = {"steps": 20, "search_steps": 20, "scale_candidates": 4, "bits": 3,
                            "progress": False}  # fmt: skip
both_modes = pytest.mark.parametrize("mode", ["sequential", "parallel"])


def net() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Linear(24, 129), nn.ReLU(), nn.Linear(129, 65), nn.ReLU(), nn.Linear(65, 9)
    )


def vectors() -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    mixed = torch.randn(24, 24, generator=generator)
    return [torch.randn(64, 24, generator=generator) @ mixed + 0.5 for _ in range(3)]


def transformer() -> models.Transformer:
    torch.manual_seed(1)
    return models.Transformer()


def token_batches() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"ids": torch.randint(0, 20, (4, 6), generator=generator)} for _ in range(2)]


NETS: dict[str, tuple[Callable[[], nn.Module], Callable[[], list[Any]]]] = {
    "layers": (net, vectors),
    "transformer": (transformer, token_batches),
}
every_net = pytest.mark.parametrize("name", NETS)


def digest(model: nn.Module) -> str:
    """Of all weights and codes."""
    found = hashlib.sha256()
    for name, tensor in (*model.state_dict().items(), *codes(model).items()):
        found.update(name.encode() + tensor.contiguous().numpy().tobytes())
    return found.hexdigest()


def quantized(name: str, **settings: Any) -> nn.Module:
    make, data = NETS[name]
    model = make()
    quantize_(model, data(), **{**FAST, **settings})
    return model


def assert_same(one: nn.Module, other: nn.Module) -> None:
    ours, theirs = ({**m.state_dict(), **codes(m)} for m in (one, other))
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@both_modes
@every_net
@pytest.mark.parametrize("settings", [FAST, ANNEALED], ids=["fast", "annealed"])
def test_one_thread_and_two(name: str, mode: str, settings: dict[str, Any]) -> None:
    results = []
    make, data = NETS[name]
    forwards = []
    for count in (1, 2):
        with threads(count):
            with torch.no_grad():
                forwards.append([models.run(make().eval(), batch) for batch in data()])
            results.append(quantized(name, mode=mode, **settings))
    pairs = zip(*(torch.utils._pytree.tree_leaves(found) for found in forwards), strict=True)
    if not all(torch.equal(a, b) for a, b in pairs):
        pytest.skip("torch's own forward depends on the number of threads here")
    assert_same(*results)


@pytest.mark.usefixtures("one_thread")
@every_net
def test_the_order_of_layers_and_the_cut_of_passes(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In parallel mode all see the full-precision model, whichever is done first."""
    expected = quantized(name, mode="parallel")
    units = []

    def backwards(found: list[Any], budget: int) -> list[list[Any]]:
        units.extend(found)
        return [[unit] for unit in reversed(found)]

    def in_pairs(found: list[Any], budget: int) -> list[list[Any]]:
        return [found[i : i + 2][::-1] for i in range(0, len(found), 2)]

    for cut in (backwards, in_pairs):
        with monkeypatch.context() as patch:
            patch.setattr("adaround_ext.model.quantize.parallel_passes", cut)
            assert_same(quantized(name, mode="parallel"), expected)
    assert len(units) >= 3
    assert_same(quantized(name, mode="parallel", memory_budget=0), expected)


@pytest.mark.usefixtures("one_thread")
@every_net
def test_layers_that_are_left_out(name: str) -> None:
    """Others have the codes that they have in full company, also those that shared statistics."""
    everything = codes(quantized(name, mode="parallel"))
    names = list(everything)
    for kept in (names[::2], names[1:2], names[-1:]):
        model = quantized(name, mode="parallel", filter_fn=lambda _, n, kept=kept: n in kept)
        found = codes(model)
        assert list(found) == kept
        assert all(torch.equal(found[n], everything[n]) for n in kept)


@pytest.mark.usefixtures("one_thread")
@both_modes
def test_the_order_of_overrides_that_do_not_meet(mode: str) -> None:
    overrides = {"*.key": {"bits": 5}, "<last>": {"bits": 8}, "layers.1.output": {"bits": 2},
                 "*.value": {"symmetric": False}, "layers.2.query": "skip"}  # fmt: skip
    backwards = dict(reversed(overrides.items()))
    one, other = (
        quantized("transformer", mode=mode, overrides=each) for each in (overrides, backwards)
    )
    assert_same(one, other)
    assert one.head.quantized_weight.bits == 8
    assert not hasattr(one.layers[2].query, "quantized_weight")


class _Backwards(nn.Module):
    """Layers of other names, defined in another order, within another module."""

    def __init__(self, model: nn.Sequential) -> None:
        super().__init__()
        named = {f"z{9 - i}": module for i, module in enumerate(model)}
        self.inner = nn.ModuleDict(OrderedDict(reversed(named.items())))
        self.order = list(named)

    def forward(self, x: Tensor) -> Tensor:
        for name in self.order:
            x = self.inner[name](x)
        return x


@pytest.mark.usefixtures("one_thread")
@both_modes
@pytest.mark.parametrize(
    "settings",
    [FAST, ANNEALED, FAST | {"activations": ActivationConfig(), "equalize": True}],
    ids=["fast", "annealed", "activations"],
)
def test_names_and_places_do_not_matter(mode: str, settings: dict[str, Any]) -> None:
    one = net()
    other = _Backwards(copy.deepcopy(one))
    quantize_(one, vectors(), mode=mode, **settings)
    quantize_(other, vectors(), mode=mode, **settings)
    for name, place in zip(other.order, one, strict=True):
        if isinstance(place, nn.Linear):
            found = other.inner[name]
            assert torch.equal(found.weight, place.weight)
            assert torch.equal(found.bias, place.bias)
            assert torch.equal(found.quantized_weight.codes, place.quantized_weight.codes)


@pytest.mark.usefixtures("one_thread")
@both_modes
@pytest.mark.parametrize("after", range(1, 6))
def test_every_point_of_resuming(
    after: int, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A layer at a time: with two that share inputs, one that runs twice, and one at the end."""
    torch.manual_seed(3)
    model = Shared()
    whole, broken = copy.deepcopy(model), copy.deepcopy(model)
    data = [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(1)) for _ in range(3)]
    arguments: dict[str, Any] = {"mode": mode, "forward_fn": lambda model, x: model(x.flatten(1))}
    quantize_(whole, data, **FAST, **arguments)
    monkeypatch.setattr("tests.model.test_checkpoint.batches", lambda: data)
    interrupted(broken, after, monkeypatch, checkpoint_dir=tmp_path, **arguments)
    assert_same(broken, model)
    quantize_(broken, data, checkpoint_dir=tmp_path, **FAST, **arguments)
    assert_same(broken, whole)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = nn.Linear(192, 6), nn.Linear(192, 6)
        self.twice, self.middle, self.last = nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.left(x)) + torch.tanh(self.right(x))
        y = torch.tanh(self.twice(torch.tanh(self.twice(y))))
        return self.last(torch.tanh(self.middle(y)))


_SCRIPT = """
import sys
import torch
torch.set_num_threads(1)
torch.rand(7)  # what happened before plays no part
from tests.model.test_model_determinism import ANNEALED, NETS, digest, quantized
for name in NETS:
    print(digest(quantized(name, **ANNEALED)))
"""


@pytest.mark.usefixtures("one_thread")
def test_another_process() -> None:
    """With other hashes of strings, so another order of sets, and nothing that was run before."""
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "PYTHONHASHSEED": "12345"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT], env=environment, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    assert done.stdout.split() == [digest(quantized(name, **ANNEALED)) for name in NETS]
