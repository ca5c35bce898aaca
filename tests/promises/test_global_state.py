"""What the caller set is as it was after every public call, and does not reach the results."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode

from adaround_ext import optimize_layer, quantize_
from tests.support.cli_fixtures import FAST, Run
from tests.support.global_state import unchanged
from tests.support.public_calls import (
    EXPORTS,
    LAYERS,
    MODELS,
    SLOW_EXPORTS,
    Call,
    computed,
    images,
    linear,
    net,
    rows,
)
from tests.support.public_calls import FAST as FAST_QUANTIZE

pytestmark = pytest.mark.usefixtures("one_thread")
CALLS = LAYERS | MODELS | EXPORTS


@contextmanager
def set_to(setter: Callable[[Any], object], value: Any, back: Any) -> Iterator[None]:
    setter(value)
    try:
        yield
    finally:
        setter(back)


@contextmanager
def new_precision_settings() -> Iterator[None]:
    """With these torch's older functions raise when they are asked."""
    torch.backends.fp32_precision = "tf32"
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        yield
    finally:
        torch.backends.fp32_precision = "none"
        torch.backends.cuda.matmul.fp32_precision = "none"


@contextmanager
def flags() -> Iterator[None]:
    """All that is on or off, the other way round; warnings are errors."""
    with (
        warnings.catch_warnings(),
        torch.no_grad(),
        torch.autograd.set_detect_anomaly(True, False),
        torch.backends.cudnn.flags(enabled=False, benchmark=True, deterministic=True),
        set_to(torch.use_deterministic_algorithms, True, False),
        set_to(torch.backends.mha.set_fastpath_enabled, False, True),
        set_to(torch.set_autocast_cache_enabled, False, True),
    ):
        warnings.simplefilter("error")
        yield


@contextmanager
def reduced_precision() -> Iterator[None]:
    with (
        set_to(torch.set_float32_matmul_precision, "medium", "highest"),
        torch.autocast("cpu", dtype=torch.bfloat16),
    ):
        yield


@contextmanager
def float64_elsewhere() -> Iterator[None]:
    """A default device as a GPU would be for a model on the CPU: one forgotten, and it fails."""
    with (
        set_to(torch.set_default_dtype, torch.float64, torch.float32),
        set_to(torch.set_default_device, "meta", None),
    ):
        yield


@contextmanager
def bfloat16_elsewhere() -> Iterator[None]:
    with set_to(torch.set_default_dtype, torch.bfloat16, torch.float32), torch.device("meta"):
        yield


SETTINGS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "flags": flags,
    "float64 elsewhere": float64_elsewhere,
    "bfloat16 elsewhere": bfloat16_elsewhere,
    "reduced precision": reduced_precision,
    "new precision settings": new_precision_settings,
}
# These mean the forward of a model, too: its results are others then.
OF_FORWARDS = {"reduced precision", "new precision settings"}


@cache
def usual(name: str) -> list[Tensor]:
    """What a call computes where nothing is set."""
    with TemporaryDirectory() as folder:
        call = CALLS[name](Path(folder))
        with unchanged(call.model, written=call.written):
            return computed(call.run())


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_settings(name: str, setting: str, tmp_path: Path) -> None:
    expected = usual(name)
    call = CALLS[name](tmp_path)
    with SETTINGS[setting](), unchanged(call.model, written=call.written):
        result = call.run()
    if name in LAYERS or setting not in OF_FORWARDS:
        got = computed(result)
        assert len(got) == len(expected) > 0
        for index, (a, b) in enumerate(zip(got, expected, strict=True)):
            assert a.dtype == b.dtype and torch.equal(a, b), index


@pytest.mark.parametrize("names", [("onnx", "aimet"), ("torchao",)])
def test_exports_that_trace(names: tuple[str, ...], tmp_path: Path) -> None:
    for package in ("onnx", "onnxscript") if "onnx" in names else names:
        pytest.importorskip(package)
    # The first one imports packages, which add filters of warnings.
    expected = computed(SLOW_EXPORTS[names[0]](tmp_path / "first").run())
    for name in names:
        call = SLOW_EXPORTS[name](tmp_path)
        with bfloat16_elsewhere(), unchanged(call.model):
            result = call.run()
        if name == "onnx":  # torchao's files hold names that are drawn
            for a, b in zip(computed(result), expected, strict=True):
                assert torch.equal(a, b)


class Fault(BaseException):
    """As an interruption from the keyboard: no handler of errors catches it."""


class _FailsAt(TorchDispatchMode):
    """The operator of this number does not run; for 0 they are counted."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number, self.count = number, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.count += 1
        if self.count == self.number:
            raise Fault
        return func(*args, **(kwargs or {}))


def fails_at(share: float, make: Callable[[Path], Call], folder: Path) -> None:
    """The call fails after a share of its operators, and nothing is changed."""
    call = make(folder / "counted")
    with _FailsAt(0) as counter:
        call.run()
    call = make(folder / "failing")
    with unchanged(call.model), pytest.raises(Fault), _FailsAt(1 + int(share * counter.count)):
        call.run()


# Of what load and pack write at the end, the part that is done stays; so up to there.
@pytest.mark.parametrize("share", [0, 0.7])
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("result", "load packed")])
def test_operators_that_fail(name: str, share: float, tmp_path: Path) -> None:
    if name in ("load", "verify"):
        share = 0.93 if name == "verify" else 0.8  # before, safetensors makes ValueErrors of them
    fails_at(share, CALLS[name], tmp_path)


@pytest.mark.parametrize("name", MODELS)
def test_operators_that_fail_late_in_whole_models(name: str, tmp_path: Path) -> None:
    fails_at(0.95, MODELS[name], tmp_path)


# Errors while a batch norm is folded to see whether it can be would be notes in the report.
@pytest.mark.parametrize(("share", "kind"), [(0.3, Fault), (0.6, RuntimeError), (0.9, Fault)])
@pytest.mark.parametrize("name", MODELS)
def test_forwards_that_fail(
    name: str, share: float, kind: type[BaseException], tmp_path: Path
) -> None:
    calls, last = 0, 0

    def hook(module: nn.Module, args: object) -> None:
        nonlocal calls
        calls += 1
        if calls == last:
            raise kind("out of order")

    handle = register_module_forward_pre_hook(hook)
    try:
        MODELS[name](tmp_path / "counted").run()
        calls, last = 0, 1 + int(share * calls)
        call = MODELS[name](tmp_path / "failing")
        with unchanged(call.model), pytest.raises(kind):
            call.run()
    finally:
        handle.remove()


@pytest.mark.parametrize("kind", [Fault, RuntimeError, StopIteration])
def test_data_that_fails(kind: type[BaseException]) -> None:
    class Batches:
        def __init__(self, data: list[Tensor]) -> None:
            self.data = data

        def __iter__(self) -> Iterator[Tensor]:
            yield self.data[0]
            raise kind("no more")

    expected = RuntimeError if kind is StopIteration else kind  # as Python makes of it
    layer, model = linear(), net()
    with unchanged(layer), pytest.raises(expected):
        optimize_layer(layer, Batches(rows()), bits=4)
    with unchanged(model), pytest.raises(expected):
        quantize_(model, Batches(images()), **FAST_QUANTIZE)


def test_precision_that_torch_cannot_name() -> None:
    """Every precision is the caller's own afterwards, also those that were only inherited."""
    layer = linear()
    torch.backends.cuda.matmul.fp32_precision = "none"  # inherited, as it is at the start
    torch.backends.mkldnn.matmul.fp32_precision = "none"
    with torch.backends.mkldnn.flags(enabled=True, fp32_precision="bf16"):
        with unchanged(layer):
            optimize_layer(layer, rows(), bits=4, preset="fast")
        torch.backends.fp32_precision = "tf32"
        try:
            assert torch.backends.cudnn.fp32_precision == "tf32"
            assert torch.backends.cuda.matmul.fp32_precision == "tf32"
            assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        finally:
            torch.backends.fp32_precision = "none"


def test_a_backward_that_waits() -> None:
    """sensitivity folds batch norms and takes them out again: graphs from before are still good."""
    from adaround_ext import sensitivity

    model = net()
    model.zero_grad()
    loss = model(images()[0]).sum()
    sensitivity(model, images(), (4,), progress=False)
    loss.backward()
    assert model[0].weight.grad is not None


def test_command_line(run: Run, folder: Path) -> None:
    import random

    data = ["nets_of_the_cli:net", "--data", "nets_of_the_cli:images"]
    again = ["--model", "nets_of_the_cli:net"]
    commands: list[list[Any]] = [
        ["quantize", *data, "--output", "out", *FAST],
        ["quantize", *data, "--output", "out", *FAST],  # is there already
        ["quantize", *data, "--output", "other", *FAST, "--override", "0=bit:8"],
        ["inspect", *data],
        ["export", "out", *again, "--format", "safetensors"],
        ["verify", "out", *again, *data[1:]],
        ["compare", "out", "out"],
        ["env"],
        ["quantize", "nets_of_the_cli:broken", *data[1:], "--output", "other"],
        ["quantize", "nets_of_the_cli:interrupted", *data[1:], "--output", "other"],
    ]
    random.seed(1)
    np.random.seed(1)
    status = []
    for command in commands:
        with unchanged():
            status.append(run(*command)[0])
    assert status == [0, 1, 2, 0, 0, 0, 0, 0, 1, 130]
