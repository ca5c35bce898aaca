"""GptqFactor: the factor that ops.gptq takes, and plain GPTQ through optimize_layer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from adaround_ext import AdaRoundConfig, optimize_layer, reference
from adaround_ext.grid import QuantGrid, make_grid, nearest_codes
from adaround_ext.layers.inputs import batches
from adaround_ext.layers.matrix import matrix_layer
from adaround_ext.linalg.cholesky import Cholesky
from adaround_ext.rounding.gptq import GptqFactor
from adaround_ext.rounding.gram_objective import GramObjective
from adaround_ext.statistics.moments import GramStatistics
from tests.support.problems import LAYERS, make_layer

pytestmark = [pytest.mark.on_a_device, pytest.mark.usefixtures("one_thread")]
PLAIN: dict[str, Any] = {
    "starts": ("gptq",), "scale": "mse", "bias": "keep", "damping": 0.01, "refine": False,
    "search_steps": 0, "rounds": 0,
}  # fmt: skip


def correlated(device: torch.device, groups: int = 3, cols: int = 24) -> Tensor:
    x = torch.randn(groups, cols, 4 * cols) * torch.linspace(0.2, 3, cols)[:, None]
    x += torch.randn(groups, 1, 4 * cols)
    return (x @ x.mT / x.shape[2]).to(device)


def test_factor_reproduces_the_matrix(device: torch.device) -> None:
    """H = F D F^T in the order of processing, F unit upper triangular, D diagonal."""
    gram = correlated(device)
    factor = GptqFactor.make(gram)
    assert factor.feedback.shape == gram.shape
    assert (factor.feedback.dtype, factor.order.dtype) == (torch.float32, torch.int64)
    for h, feedback, order in zip(gram.double(), factor.feedback, factor.order, strict=True):
        assert sorted(order.tolist()) == list(range(len(h)))
        h = h[order][:, order]
        assert bool((h.diagonal().diff() <= 0).all())  # larger diagonals come first
        f = feedback.double()
        torch.testing.assert_close(f.triu(), f, rtol=0, atol=0)
        assert f.diagonal().tolist() == [1.0] * len(h)
        inverse = torch.linalg.inv(f)
        d = inverse @ h @ inverse.T
        torch.testing.assert_close(d, torch.diag(d.diagonal()), rtol=0, atol=1e-4)
        torch.testing.assert_close(f @ torch.diag(d.diagonal()) @ f.T, h, rtol=1e-5, atol=1e-5)


def test_equal_diagonals_keep_their_order(device: torch.device) -> None:
    factor = GptqFactor.make(torch.eye(5, device=device)[None])
    assert factor.order.tolist() == [[0, 1, 2, 3, 4]]
    assert torch.equal(factor.feedback[0], torch.eye(5, device=device))


def degenerate(name: str, device: torch.device) -> Tensor:
    gram = correlated(device, groups=1)
    cols = gram.shape[1]
    ones = torch.ones(1, cols, cols, device=device)
    outlier = torch.ones(cols, device=device)
    outlier[5] = 1e12
    return {
        "zero": torch.zeros_like(gram),
        "rank-one": ones,
        "rank-three": gram[:, :, :3] @ gram[:, :3, :],
        "dead": gram * (torch.arange(cols, device=device) != 4) * (ones.triu(20) == 0),
        "huge": gram * 1e37,
        "tiny": gram * 1e-37,
        "outlier": gram * outlier * outlier[:, None],
        "indefinite": gram - 1e-4 * gram.diagonal(dim1=1, dim2=2).mean() * ones,
        "one-column": gram[:, :1, :1],
        "one-dead-column": torch.zeros(1, 1, 1, device=device),
    }[name]


CASES = ["zero", "rank-one", "rank-three", "dead", "huge", "tiny", "outlier", "indefinite"]


@pytest.mark.parametrize("name", [*CASES, "one-column", "one-dead-column"])
def test_degenerate_matrices_have_finite_factors(device: torch.device, name: str) -> None:
    gram = degenerate(name, device)
    factor = GptqFactor.make(gram)
    assert bool(factor.feedback.isfinite().all())
    weight = torch.randn(7, gram.shape[1]).to(device)
    grid = make_grid(weight, AdaRoundConfig(bits=3))
    codes = factor.codes(weight, grid)
    assert int(codes.min()) >= grid.qmin
    assert int(codes.max()) <= grid.qmax
    if name in ("zero", "one-column", "one-dead-column"):  # nothing to make up for
        assert torch.equal(codes, nearest_codes(weight, grid))


def test_only_the_matrices_that_need_it_are_shifted(device: torch.device) -> None:
    good = correlated(device).double()
    both = torch.cat([good, torch.ones_like(good[:1])])
    got = Cholesky.of(both).lower
    assert torch.equal(got[:-1], Cholesky.of(good).lower)
    torch.testing.assert_close(got[:-1] @ got[:-1].mT, good)
    shifted = got[-1] @ got[-1].T
    torch.testing.assert_close(shifted, both[-1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_matrix_that_is_not_finite_is_refused(value: float) -> None:
    """No shift would help: it must not try for ever."""
    gram = torch.eye(3).expand(2, 3, 3).clone()
    gram[1, 2, 2] = value
    with pytest.raises(ValueError, match=r"^gram must be finite"):
        GptqFactor.make(gram)


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("symmetric", [True, False], ids=["symmetric", "asymmetric"])
def test_plain_gptq_gives_the_textbook_codes(
    device: torch.device, name: str, bits: int, symmetric: bool
) -> None:
    """The recursion of the paper with the same matrix, whose diagonal decides the order."""
    layer, x = make_layer(name, device)
    settings = {**PLAIN, "bits": bits, "symmetric": symmetric}
    result = optimize_layer(layer, x, **settings)
    view = matrix_layer(layer)
    weight = view.weight_matrix()
    statistics = GramStatistics([view], positions=None, seed=0)
    with torch.no_grad():
        statistics.collect(batches([view], "the layer", x, None))
    gram = GramObjective(weight, statistics, damping=0.01).gram.double()  # damped already
    grid: QuantGrid = make_grid(weight, AdaRoundConfig(**settings))
    codes = reference.gptq(
        weight.double(), gram, 0.0, grid.scale.double(), grid.zero_point, grid.qmin, grid.qmax
    )
    kept = (result.codes == codes).all(1)
    worse = (result.codes == nearest_codes(weight, grid)).all(1)  # rows in which GPTQ lost
    assert int((~(kept | worse)).sum()) == 0
    assert int(worse.sum()) <= result.report.fallback_rows + int((kept & worse).sum())
    assert result.bias is None
    assert torch.equal(result.scale, grid.scale)
    assert set(result.report.losses) >= {"gptq", "nearest", "final"}
