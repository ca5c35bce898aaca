"""The fuzzer itself: its harness catches every bad end, and its judges see what is wrong.

The cases that CI runs are a step of .ci/run, where their seed is in the log: ``make fuzz``.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import LayerResult
from tests.fuzz import driver_run, harness, op_run
from tests.fuzz.driver_cases import DriverCase
from tests.fuzz.op_arguments import OPS, WRITTEN, OpCase
from tests.fuzz.verdict import Wrong

pytestmark = pytest.mark.usefixtures("one_thread")
PLANTED = "tests.fuzz.planted"


def planted(*ends: str) -> list[dict[str, Any]]:
    return [{"end": end, "number": number} for number, end in enumerate(ends)]


def test_every_bad_end_is_caught_and_the_rest_still_runs() -> None:
    ends = ["right", "wrong", "crash", "error", "hang", "native hang", "exit", "right"]
    outcome = harness.replay(PLANTED, planted(*ends), case_seconds=1.0)
    found = {failure.index: failure for failure in outcome.failures}
    assert {i: f.kind for i, f in found.items()} == {
        1: "wrong", 2: "crash", 3: "wrong", 4: "hang", 5: "hang", 6: "crash",
    }  # fmt: skip
    assert "garbage came back" in found[1].reason
    assert "killed by SIGABRT" in found[2].reason
    assert "KeyError" in found[3].reason
    assert "no end in 1.0 s" in found[4].reason
    assert "exit 3" in found[6].reason
    assert outcome.counts == {"right": 1, "ended": 1, "wrong": 2, "crash": 2, "hang": 2}


def test_a_seed_draws_the_same_cases_and_a_failure_says_how_to_run_it_again() -> None:
    first, second = (harness.run_batch(PLANTED, 5, 60, case_seconds=1.0) for _ in range(2))
    assert [(f.index, f.case) for f in first.failures] == [
        (f.index, f.case) for f in second.failures
    ]
    assert sum(first.counts.values()) == 60
    failure = first.failures[0]
    assert f"case {failure.index} of seed 5" in str(failure)
    assert f"--target {PLANTED} --replay '{failure.case}'" in str(failure)


def op_case(op: str, **changes: Any) -> OpCase:
    sizes = {"rows": 4, "cols": 12, "n_groups": 2, "gram_groups": 2, "scale_rows": "each"}
    kinds = {"bits": 4, "symmetric": True, "dtype": "float32", "grad_dtype": "float32"}
    return OpCase(**{"op": op, "instruction_set": "auto", "seed": 3, **sizes, **kinds, **changes})


def off_by_little(t: Tensor) -> None:
    """One number, by one or by a thousandth."""
    t.view(-1)[t.numel() // 2] += 1e-3 if t.is_floating_point() else 1


def replaced(monkeypatch: pytest.MonkeyPatch, change: Callable[[Any, list[Any]], Any]) -> None:
    """Every op is the real one, and then ``change(result, arguments)``."""
    real = op_run.function

    def function(op: str) -> Callable[..., Any]:
        return lambda *arguments: change(real(op)(*arguments), list(arguments))

    monkeypatch.setattr(op_run, "function", function)


@pytest.mark.parametrize("op", OPS)
def test_a_result_that_is_off_by_little(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert op_run.run(op_case(op)) == "right"

    def change(result: Any, arguments: list[Any]) -> Any:
        off_by_little(arguments[0] if op in WRITTEN else result[0] if tupled(result) else result)
        return result

    replaced(monkeypatch, change)
    with pytest.raises(Wrong):
        op_run.run(op_case(op))


def tupled(result: Any) -> bool:
    return isinstance(result, tuple)


@pytest.mark.parametrize("op", OPS)
def test_an_argument_that_is_only_read_changes(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def change(result: Any, arguments: list[Any]) -> Any:
        read = {"rounding_step_": 5, "refine_": 2, "tabu_search_": 2}.get(op, 0)
        off_by_little(arguments[read])
        return result

    replaced(monkeypatch, change)
    with pytest.raises(Wrong, match="was changed"):
        op_run.run(op_case(op))


def raising(error: Exception) -> Callable[[Any, list[Any]], Any]:
    def change(result: Any, arguments: list[Any]) -> Any:
        raise error

    return change


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (ValueError("scale is good, and yet refused"), "refused, though valid"),
        (ValueError(""), "names no argument"),
        (ValueError("wrong"), "names no argument"),
        (KeyError("scale"), "is no kind for bad input"),
        (RuntimeError("scale: INTERNAL ASSERT FAILED"), "shows the inside"),
        (MemoryError(), "no memory for little"),
    ],
)
def test_wrong_errors(error: Exception, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, raising(error))
    with pytest.raises(Wrong, match=message):
        op_run.run(op_case("dequantize"))


def test_an_error_after_a_write(monkeypatch: pytest.MonkeyPatch) -> None:
    replaced(monkeypatch, raising(ValueError("max_sweeps ran out")))
    with pytest.raises(Wrong, match="codes was changed"):
        op_run.run(op_case("refine_"))


def test_what_is_taken_though_invalid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op_run, "function", lambda op: lambda *arguments: arguments[0].clone())
    with pytest.raises(Wrong, match="taken, though it breaks the rule: scale has dtype"):
        op_run.run(op_case("hard_quantize", changes=[("scale", "float16")]))


def driver_case(**changes: Any) -> DriverCase:
    kinds = {"dtype": "float32", "data": "tensor", "values": "normal", "targets": "none"}
    flags = {"train": True, "grad": True, "seed": 1, "settings": {}}
    return DriverCase(**{"call": "optimize_layer", "model": "linear", **kinds, **flags, **changes})


def with_report(result: LayerResult, **losses: float) -> LayerResult:
    report = dataclasses.replace(result.report, losses=result.report.losses | losses)
    return dataclasses.replace(result, report=report)


def writes_weight(result: LayerResult, layer: nn.Linear) -> LayerResult:
    result.apply_(layer)
    return result


def draws(result: LayerResult, layer: nn.Linear) -> LayerResult:
    torch.randn(1)
    return result


def tampered(name: str, delta: float) -> Callable[[LayerResult, nn.Linear], LayerResult]:
    def change(result: LayerResult, layer: nn.Linear) -> LayerResult:
        getattr(result, name)[1, 0] += delta
        return result

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (tampered("weight_q", 1e-3), "weight_q is not its codes"),
        (tampered("codes", 100), "beyond"),
        (tampered("zero_point", 100), "zero points lie beyond"),
        (tampered("scale", -10.0), "scales are not positive"),
        (lambda result, layer: with_report(result, final=1e9), "worse than nearest"),
        (lambda result, layer: with_report(result, final=float("nan")), "lost"),
        (lambda result, layer: with_report(result, final=-1.0), "negative"),
        (writes_weight, "tensors of module 0 changed"),
        (lambda result, layer: layer.eval() and result, "training flags of module 0 changed"),
        (draws, "torch's random state changed"),
    ],
)
def test_wrong_results_of_the_driver(
    change: Callable[[LayerResult, nn.Linear], LayerResult],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert driver_run.run(driver_case()) == "right"
    real = driver_run.optimize_layer

    def optimize_layer(layer: nn.Linear, *arguments: Any, **settings: Any) -> LayerResult:
        return change(real(layer, *arguments, **settings), layer)

    monkeypatch.setattr(driver_run, "optimize_layer", optimize_layer)
    with pytest.raises(Wrong, match=message):
        driver_run.run(driver_case())


def test_a_model_that_is_left_changed_after_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    case = driver_case(call="quantize_", model="mlp", data="numbers")
    assert driver_run.run(case) == "refused"
    real = driver_run.quantize_

    def quantize_(model: nn.Module, *arguments: Any, **settings: Any) -> Any:
        model.left = True
        return real(model, *arguments, **settings)

    monkeypatch.setattr(driver_run, "quantize_", quantize_)
    with pytest.raises(Wrong, match="attributes of module 0 changed"):
        driver_run.run(case)


def test_cases_that_once_went_wrong() -> None:
    """In a child, whose memory is limited: 2^32 elements are refused for want of it."""
    huge = [("weight", "huge"), ("v", "huge")]
    many = [(name, "many-empty-rows") for name in ("weight", "order")]
    cases = [
        op_case("hard_quantize", changes=huge, n_groups=1, scale_rows="one"),
        op_case("gptq", changes=[*many, ("feedback", "many-empty-groups")], scale_rows="one"),
        op_case("refine_", changes=[("gram", "meta")]),
        op_case("tabu_search_", changes=[("scale", "none")]),
    ]
    # No rows for more positions than anyone could walk through.
    nothing: dict[str, Any] = {"rows": 0, "cols": 0, "n_groups": 1, "gram_groups": 1, "seed": 2}
    cases.append(op_case("packed_linear", **nothing, changes=[("x", "many-empty-rows")]))
    outcome = harness.replay("ops", [dataclasses.asdict(case) for case in cases])
    assert not outcome.failures
    assert outcome.counts == {"no memory": 1, "right": 2, "refused": 2}
