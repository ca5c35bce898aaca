"""The native ops: for each a typed wrapper, its fake kernel and, where it has one, its autograd.

``weight`` is the layer in matrix form [rows, cols], rows being output channels. ``scale`` and
``zero_point`` (int32) have shape [rows or 1, n_groups]: the columns are cut into n_groups equal
runs. ``qmin`` and ``qmax`` lie in [-128, 127] (codes int8) or [0, 255] (codes uint8). ``weight`` is
float32, bfloat16 or float16, on the CPU also float64; ``v``, the moments and ``scale`` are float32,
or float64 beside a float64 weight; arithmetic is float32 (float64). Arguments that are written must
be contiguous and share no memory with others (what lies between the elements of a strided one
counts as its own); those that are read may have any strides.
Every op raises ValueError with a message that names the argument, the rule and what came;
RuntimeError where memory is short, from fake kernels, and from torch 2.15 on, which translates all
C++ exceptions alike.
The source is Nagel et al., "Up or Down?", ICML 2020; formulas: csrc/rounding_math.h.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from adaround_ext.ops import library as native  # noqa: F401  loads the libraries

_ops = torch.ops.adaround_ext


def _code_dtype(qmin: int) -> torch.dtype:
    return torch.int8 if qmin < 0 else torch.uint8


def _check_same_device(**tensors: Tensor | None) -> None:
    """Fake kernels also get real tensors beside one on the meta device, and must not take them."""
    given = [(name, t) for name, t in tensors.items() if t is not None]
    first_name, first = given[0]
    for name, tensor in given[1:]:
        torch._check(
            tensor.device == first.device,
            lambda name=name, tensor=tensor: (
                f"{name} must be on the device of {first_name}, got {tensor.device} and "
                f"{first.device}"
            ),
        )


def _check_same_shape(name: str, tensor: Tensor, model: Tensor, of: str = "weight") -> None:
    torch._check(
        tensor.shape == model.shape,
        lambda: (
            f"{name} must have the shape of {of}, {list(model.shape)}, got {list(tensor.shape)}"
        ),
    )


def soft_quantize(
    weight: Tensor,
    v: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    beta: float,
) -> tuple[Tensor, Tensor]:
    """Soft-quantized weights and the rounding regularizer, differentiable in ``v``.

    w_q = s (clamp(floor(w / s) + z + h(V), n, p) - z), eq. (22);
    reg = sum 1 - |2 h(V) - 1|^beta, eq. (24), beta >= 1.
    Returns weight_q [rows, cols] in weight's dtype and reg [] in v's dtype. ``weight`` and
    ``scale`` get no gradient.
    """
    return _ops.soft_quantize(weight, v, scale, zero_point, qmin, qmax, beta)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::soft_quantize")
def _(
    weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, beta: float
) -> tuple[Tensor, Tensor]:
    _check_same_device(weight=weight, v=v, scale=scale, zero_point=zero_point)
    _check_same_shape("v", v, weight)
    return weight.new_empty(weight.shape), v.new_empty(())


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.qmin, ctx.qmax, ctx.beta = inputs[4:]


def _backward(ctx: Any, grad_weight_q: Tensor, grad_reg: Tensor) -> tuple[Tensor | None, ...]:
    grad_v = _ops._soft_quantize_backward(
        grad_weight_q, grad_reg, *ctx.saved_tensors, ctx.qmin, ctx.qmax, ctx.beta
    )
    return None, grad_v, None, None, None, None, None


torch.library.register_autograd(
    "adaround_ext::soft_quantize", _backward, setup_context=_setup_context
)


@torch.library.register_fake("adaround_ext::_soft_quantize_backward")
def _(
    grad_weight_q: Tensor,
    grad_reg: Tensor,
    weight: Tensor,
    v: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    beta: float,
) -> Tensor:
    _check_same_device(
        weight=weight, v=v, scale=scale, zero_point=zero_point,
        grad_weight_q=grad_weight_q, grad_reg=grad_reg,
    )  # fmt: skip
    _check_same_shape("grad_weight_q", grad_weight_q, weight)
    return v.new_empty(v.shape)


def _no_double_backward(ctx: Any, *grads: Tensor) -> None:
    raise RuntimeError("adaround_ext::soft_quantize can be differentiated once, not twice")


torch.library.register_autograd("adaround_ext::_soft_quantize_backward", _no_double_backward)


def soft_quantize_with_grad(
    weight: Tensor,
    v: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    beta: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """:func:`soft_quantize` with its derivatives in the same pass.

    Returns weight_q [rows, cols], d weight_q / d V = s h'(V) where the clamp is open, reg [] and
    d reg / d V [rows, cols]; h'(V) = (zeta - gamma) sigmoid(V) (1 - sigmoid(V)) inside h's clip.
    """
    return _ops.soft_quantize_with_grad(weight, v, scale, zero_point, qmin, qmax, beta)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::soft_quantize_with_grad")
def _(
    weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int, beta: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    _check_same_device(weight=weight, v=v, scale=scale, zero_point=zero_point)
    _check_same_shape("v", v, weight)
    return (
        weight.new_empty(weight.shape),
        v.new_empty(v.shape),
        v.new_empty(()),
        v.new_empty(v.shape),
    )


def rounding_step_(
    v: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight_q: Tensor,
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    schedule: Tensor,
    step: Tensor,
    as_error: bool,
    normalize: bool,
) -> None:
    """One optimisation step in one pass over memory: chain rule, regularizer, Adam, soft weights.

    From ``grad`` = d loss / d weight_q [rows, cols] it updates ``v``, ``exp_avg``, ``exp_avg_sq``
    and writes the new soft weights into ``weight_q``, or their error w_q - w where ``as_error``.
    ``grad`` and ``weight_q`` share a dtype: float32, bfloat16 or float16 (float64 beside float64).
    ``schedule`` float32 [steps, 5] has a row a step: beta, reg_weight, learning rate and Adam's
    1 - 0.9^t and sqrt(1 - 0.999^t). ``step`` int64 [1] is the row, kept in range, and is advanced
    by one; both live on the device, so that the call can be captured in a CUDA graph. ``normalize``
    divides the loss's gradient by s^2, which makes reg_weight independent of the scale.
    """
    _ops.rounding_step_(
        v, exp_avg, exp_avg_sq, weight_q, grad, weight, scale, zero_point, qmin, qmax, schedule,
        step, as_error, normalize,
    )  # fmt: skip


@torch.library.register_fake("adaround_ext::rounding_step_")
def _(
    v: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    weight_q: Tensor,
    grad: Tensor,
    weight: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
    schedule: Tensor,
    step: Tensor,
    as_error: bool,
    normalize: bool,
) -> None:
    named = {"v": v, "exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    named |= {"weight_q": weight_q, "grad": grad}
    _check_same_device(
        weight=weight, scale=scale, zero_point=zero_point, schedule=schedule, step=step, **named
    )
    for name, tensor in named.items():
        _check_same_shape(name, tensor, weight)


def hard_quantize(
    weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int
) -> Tensor:
    """The hard decision: codes [rows, cols] = clamp(floor(w / s) + z + [V >= 0], n, p).

    int8 for a signed grid (qmin < 0), else uint8.
    """
    return _ops.hard_quantize(weight, v, scale, zero_point, qmin, qmax)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::hard_quantize")
def _(weight: Tensor, v: Tensor, scale: Tensor, zero_point: Tensor, qmin: int, qmax: int) -> Tensor:
    _check_same_device(weight=weight, v=v, scale=scale, zero_point=zero_point)
    _check_same_shape("v", v, weight)
    return weight.new_empty(weight.shape, dtype=_code_dtype(qmin))


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype = torch.float32
) -> Tensor:
    """weight_q = s (codes - z), [rows, cols] in ``dtype``; codes int8 or uint8."""
    return _ops.dequantize(codes, scale, zero_point, dtype)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::dequantize")
def _(codes: Tensor, scale: Tensor, zero_point: Tensor, dtype: torch.dtype) -> Tensor:
    _check_same_device(codes=codes, scale=scale, zero_point=zero_point)
    return codes.new_empty(codes.shape, dtype=dtype)


def refine_(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    max_sweeps: int,
) -> None:
    """Cyclic coordinate descent on tr(E G E^T) over the whole grid, rows independent, in place.

    ``codes`` [rows, cols] and ``residual`` = E G [rows, cols] (minus the constant of the asymmetric
    form) are updated together; ``gram`` [groups, cols, cols] serves rows / groups consecutive rows
    each; residual, gram and scale are float32 (CPU also float64). Best change of code j:
    round(-residual_j / (G_jj s_j)). A row ends when a sweep changes nothing, or after max_sweeps
    (0 to 2^23).
    """
    _ops.refine_(codes, residual, gram, scale, qmin, qmax, max_sweeps)


@torch.library.register_fake("adaround_ext::refine_")
def _(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    max_sweeps: int,
) -> None:
    _check_same_device(codes=codes, residual=residual, gram=gram, scale=scale)
    _check_same_shape("residual", residual, codes, "codes")


def tabu_search_(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    steps: int,
    seed: int,
) -> None:
    """One-flip tabu search on tr(E G E^T) over the whole grid, rows independent, in place.

    Arguments as for :func:`refine_`. Each of ``steps`` (0 to 2^23) makes the single change of a
    code by one that costs least, s (G_jj s - 2 |residual_j|), even where that is uphill; the column
    then rests for cols / 40 (at least 3) to twice as many steps, unless its change leads below the
    best codes so far. The best codes met, and their residual, are written. Every row draws its
    rests from ``seed`` (not negative). Source: Glover, "Tabu search", 1989.
    """
    _ops.tabu_search_(codes, residual, gram, scale, qmin, qmax, steps, seed)


@torch.library.register_fake("adaround_ext::tabu_search_")
def _(
    codes: Tensor,
    residual: Tensor,
    gram: Tensor,
    scale: Tensor,
    qmin: int,
    qmax: int,
    steps: int,
    seed: int,
) -> None:
    _check_same_device(codes=codes, residual=residual, gram=gram, scale=scale)
    _check_same_shape("residual", residual, codes, "codes")


def gptq(
    weight: Tensor,
    feedback: Tensor,
    order: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    """Codes [rows, cols] of GPTQ: columns are rounded in turn, later ones make up for earlier ones.

    Column k of the processing ``order`` (int64 [groups, cols]) gets the code nearest to
    w_k + sum_{i<k} (w_i - w_q,i) feedback[i, k]. ``feedback`` [groups, cols, cols] is read above
    its diagonal; each serves rows / groups consecutive rows. With H = R R^T, R upper triangular in
    processing order, feedback[i, k] = R[i, k] / R[k, k] is GPTQ (Frantar et al. 2023) by theorem 6
    of QuIP (Chee et al. 2023). weight, feedback and scale are float32 (CPU also float64). An order
    that is no permutation is refused on the CPU; on CUDA, which would have to wait for the values,
    entries beyond the columns are skipped, and columns that it leaves out get the code qmin.
    """
    return _ops.gptq(weight, feedback, order, scale, zero_point, qmin, qmax)  # type: ignore[no-any-return]


@torch.library.register_fake("adaround_ext::gptq")
def _(
    weight: Tensor,
    feedback: Tensor,
    order: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    qmin: int,
    qmax: int,
) -> Tensor:
    _check_same_device(
        weight=weight, feedback=feedback, order=order, scale=scale, zero_point=zero_point
    )
    return weight.new_empty(weight.shape, dtype=_code_dtype(qmin))
