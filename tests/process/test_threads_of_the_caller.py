"""Threads of a process that quantize at once: each has its results, the process what it had."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import skip_init

from adaround_ext import optimize_layer, quantize_, sensitivity
from adaround_ext.linalg.precision import full_precision, tf32_products
from adaround_ext.process.turns import one_caller
from tests.process.test_row_threads import process_threads
from tests.support.global_state import differences, process_state, unchanged
from tests.support.helpers import threads
from tests.support.public_calls import FAST, FEW, computed, images, net, rows


def of_a_layer() -> list[Tensor]:
    layer = skip_init(nn.Linear, 48, 40)
    with torch.no_grad():
        layer.weight.copy_(torch.linspace(-1, 1, 40 * 48).sin().mul(40).sin().view(40, 48))
        layer.bias.zero_()
    return computed(optimize_layer(layer, rows(cols=48), **FEW))


def of_a_model() -> list[Tensor]:
    model = noisy()
    quantize_(model, images(), **FAST)
    return computed(model)


def of_sensitivity() -> list[Tensor]:
    return computed(sensitivity(noisy(), images(), (2, 4), progress=False).network)


class _Noise(nn.Module):
    """Draws in every run: what another thread draws or seeds meanwhile would reach the codes."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.rand_like(x)


def noisy() -> nn.Module:
    """With weights that are not drawn, since all threads draw from one generator."""
    first, last = skip_init(nn.Conv2d, 2, 6, 3), skip_init(nn.Linear, 24, 8)
    model = nn.Sequential(first, _Noise(), nn.Flatten(), last, nn.ReLU())
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.copy_(torch.arange(parameter.numel()).add(index).sin().view_as(parameter))
    return model


class _Fault(RuntimeError):
    pass


_ANY = nn.Linear(12, 5)


def of_broken_data() -> list[Tensor]:
    def batches() -> Iterator[Tensor]:
        yield rows()[0]
        time.sleep(0.001)
        raise _Fault

    with pytest.raises(_Fault):
        optimize_layer(_ANY, batches(), **FEW)
    return []


CALLS: dict[str, Callable[[], list[Tensor]]] = {
    "layer": of_a_layer,
    "model": of_a_model,
    "sensitivity": of_sensitivity,
    "error": of_broken_data,
}


@contextmanager
def other_settings() -> Iterator[None]:
    """Not torch's own, and such that forwards differ where they are not in force."""
    cudnn = torch.backends.cudnn
    torch.set_float32_matmul_precision("medium")
    try:
        with cudnn.flags(enabled=True, benchmark=True, deterministic=False, allow_tf32=True):
            yield
    finally:
        torch.set_float32_matmul_precision("highest")


def at_once(calls: list[str], times: int = 1) -> list[list[list[Tensor]]]:
    """What each call computes, several times over, all of them on threads of their own."""
    found: list[list[list[Tensor]]] = [[] for _ in calls]
    errors: list[BaseException] = []
    start = threading.Barrier(len(calls))

    def work(index: int, name: str) -> None:
        try:
            start.wait()
            for _ in range(times):
                found[index].append(CALLS[name]())
        except BaseException as error:
            errors.append(error)

    started = [threading.Thread(target=work, args=item) for item in enumerate(calls)]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join()
    if errors:
        raise errors[0]
    return found


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    "calls",
    [["layer", "layer"], ["layer", "model", "layer"], ["model", "model", "sensitivity"],
     ["error", "layer", "model"]],
    ids=" ".join,
)  # fmt: skip
def test_all_at_once(calls: list[str], count: int) -> None:
    with threads(count), other_settings():
        expected = {name: CALLS[name]() for name in dict.fromkeys(calls)}
        # Weights are drawn before they are set, so states of random numbers are looked at below.
        before, of_threads = process_state(), process_threads()
        results = at_once(calls, times=6)
        changes = [c for c in differences(before, process_state()) if "random state" not in c]
        assert not changes and process_threads() == of_threads
    for name, found in zip(calls, results, strict=True):
        for computed_now in found:
            for a, b in zip(computed_now, expected[name], strict=True):
                assert torch.equal(a, b), name


def test_random_numbers_of_the_caller() -> None:
    """Models are made before, so that nothing draws but the calls."""
    models = [net() for _ in range(3)]
    started = [
        threading.Thread(target=quantize_, args=(model, images()), kwargs=FAST) for model in models
    ]
    with unchanged():
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    first, *others = (computed(model) for model in models)
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_precisions_in_turn() -> None:
    """No thread sees what another set: neither in a region for TF32 nor around it."""
    seen = set()

    def work(wanted: bool) -> None:
        for _ in range(50):
            with full_precision(torch.device("cpu")):
                with tf32_products(torch.device("cuda"), wanted):
                    time.sleep(1e-4)
                    seen.add((wanted, torch.get_float32_matmul_precision()))
                seen.add((None, torch.get_float32_matmul_precision()))

    with unchanged():
        started = [threading.Thread(target=work, args=(index % 2 == 0,)) for index in range(4)]
        for thread in started:
            thread.start()
        for thread in started:
            thread.join()
    assert seen == {(True, "high"), (False, "highest"), (None, "highest")}


def test_precision_that_was_there() -> None:
    """A region for TF32 in another one leaves the outer one's."""
    cuda = torch.device("cuda")
    with full_precision(torch.device("cpu")):
        with tf32_products(cuda):
            with tf32_products(cuda):
                pass
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "highest"


def test_calls_in_a_call(caplog: pytest.LogCaptureFixture) -> None:
    """Data may come from another result; another thread waits, and says so."""

    def data() -> Iterator[Any]:
        yield rows()[0]
        of_a_layer()
        yield rows()[1]

    caplog.set_level("INFO", "adaround_ext")
    layer = nn.Linear(12, 5)
    result = optimize_layer(layer, data(), **FEW)
    assert torch.equal(result.codes, optimize_layer(layer, rows(), **FEW).codes)
    assert "waiting" not in caplog.text
    with one_caller():
        other = threading.Thread(target=of_a_layer)
        other.start()
        other.join(0.2)
        assert other.is_alive()
    other.join()
    assert "waiting for another thread of this process" in caplog.text
