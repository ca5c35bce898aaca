"""One case of an op: called, and judged."""

from __future__ import annotations

import torch
from torch import Tensor

from adaround_ext.ops.library import use_instruction_set
from tests.fuzz import op_contract, op_oracle
from tests.fuzz.bits import bits
from tests.fuzz.op_arguments import WRITTEN, Arguments, OpCase, arguments, function, names
from tests.fuzz.op_cases import op_cases
from tests.fuzz.verdict import Wrong, check_error, is_out_of_memory, require

Case = OpCase
cases = op_cases


def run(case: OpCase) -> str:
    """How the case ended: "refused", "right", "shapes" or "no memory"; Wrong where it must not."""
    given = arguments(case)
    broken, settled = _contract(case.op, given)
    copies = _copies(given)
    huge = op_contract.is_huge(given)
    use_instruction_set(case.instruction_set)
    try:
        returned = function(case.op)(*given.values())
    except Exception as error:
        check_error(error, {*names(case.op), case.op, case.op.strip("_")})
        _require_same(given, copies, list(copies))
        if is_out_of_memory(error):
            require(huge, f"no memory for little: {error}")
            return "no memory"
        require(bool(broken) or not settled, f"refused, though valid: {error}")
        return "refused"
    finally:
        use_instruction_set("auto")
    results = [returned] if isinstance(returned, Tensor) else list(returned or ())
    meta = "meta" in op_contract.devices(given)
    # Fake kernels leave to the real ones what is not about shapes and devices.
    only_meta = op_contract.devices(given) == {"meta"}
    require(not broken or only_meta, f"taken, though it breaks the rule: {broken}")
    if broken or not settled:
        return "shapes" if meta else "right"
    op_oracle.check_outputs(case.op, given, results)
    if meta:
        return "shapes"
    written = WRITTEN.get(case.op, ())
    _require_same(given, copies, [name for name in copies if name not in written])
    op_oracle.check_values(case, given | copies, given, results)
    return "right"


def _contract(op: str, given: Arguments) -> tuple[str, bool]:
    """(the rule that is broken or "", whether the contract decides)."""
    try:
        op_contract.check(op, given)
    except op_contract.Invalid as rule:
        return str(rule), True
    except op_contract.Unsettled:
        return "", False
    return "", True


def _copies(given: Arguments) -> dict[str, Tensor]:
    """Of all tensors that have memory of their own, where that is little."""
    return {
        name: t.detach().clone(memory_format=torch.contiguous_format)
        for name, t in given.items()
        if isinstance(t, Tensor)
        and t.layout == torch.strided
        and t.device.type == "cpu"
        and t.numel() * t.element_size() < 2**26
    }


def _require_same(given: Arguments, copies: dict[str, Tensor], checked: list[str]) -> None:
    for name in checked:
        if not torch.equal(bits(given[name]), bits(copies[name])):
            raise Wrong(f"{name} was changed")
