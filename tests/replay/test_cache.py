"""Where activations wait: the budget, files, rounding, and that nothing is shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from adaround_ext.model.sample_store import GrowingTensor
from adaround_ext.replay.cache import ActivationCache


def tree() -> dict[str, object]:
    return {
        "a": torch.randn(3, 4),
        "b": (torch.arange(5), "text", None),
        "c": [torch.randn(2, 3, 4, 4).contiguous(memory_format=torch.channels_last)],
        "d": torch.randn(4, 6)[:, ::2],
        "e": torch.randn(1, 4).expand(3, 4),
        "f": torch.zeros(0, 2),
        "g": torch.tensor(1.5, dtype=torch.float64),
        "h": torch.randn(3).bfloat16(),
        "i": torch.tensor([True, False]),
        "j": torch.randn(3, dtype=torch.complex64),
    }


def assert_same(one: object, two: object) -> None:
    first, spec = torch.utils._pytree.tree_flatten(one)
    second, other = torch.utils._pytree.tree_flatten(two)
    assert spec == other
    for a, b in zip(first, second, strict=True):
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b)
        else:
            assert a is b


@pytest.mark.parametrize("budget", [0, 200, 1 << 20])
def test_round_trip(budget: int, tmp_path: Path) -> None:
    given = tree()
    with ActivationCache(budget, tmp_path) as cache:
        cache.put("key", given)
        got = cache.get("key")
        assert_same(given, got)
        assert got["c"][0].is_contiguous(memory_format=torch.channels_last)
        got["a"].zero_()  # a copy
        got["c"][0].zero_()
        assert_same(given, cache.get("key"))
        assert cache.peak["memory"] <= budget
        assert bool(list(tmp_path.rglob("*.bin"))) == (budget < 1000)
        with pytest.raises(KeyError):
            cache.get("other")
    assert list(tmp_path.iterdir()) == []


def test_dropping_gives_the_budget_back(tmp_path: Path) -> None:
    with ActivationCache(400, tmp_path) as cache:
        for index in range(10):
            cache.put(index, torch.randn(50))  # 200 bytes
            if index >= 2:
                cache.drop(index - 2)
        assert cache.peak["memory"] == 400 and cache.peak["file"] == 200
        assert len(list(tmp_path.rglob("*.bin"))) <= 1
        cache.put(9, torch.zeros(2))  # instead of what was there
        assert torch.equal(cache.get(9), torch.zeros(2))
        assert 7 not in cache and 9 in cache


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_is_the_same_where_nothing_is_stored(dtype: torch.dtype) -> None:
    x = {"x": torch.randn(64), "n": torch.arange(3), "d": torch.randn(3).double()}
    with ActivationCache(1 << 20, dtype=dtype) as cache:
        cache.put(0, x)
        got = cache.get(0)
        assert torch.equal(got["x"], x["x"].to(dtype).float())
        assert_same(got, cache.rounded(x))
        assert cache.peak["memory"] == 128 + 24 + 24


def test_an_error_inside_leaves_no_files(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="away"), ActivationCache(0, tmp_path) as cache:
        cache.put(0, torch.randn(5))
        raise OSError("away")
    assert list(tmp_path.iterdir()) == []


def test_what_would_only_fail_when_memory_runs_short(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"cache_dir must be a folder that exists, got '.*away'"):
        ActivationCache(0, tmp_path / "away")
    with pytest.raises(TypeError, match="cache_dir must be a path or None, got 3"):
        ActivationCache(0, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="cache_dtype must be bfloat16, float16 or None, got "):
        ActivationCache(0, tmp_path, dtype=torch.int8)


@pytest.mark.parametrize("in_file", [True, False])
def test_growing_tensor(in_file: bool, tmp_path: Path) -> None:
    batches = [torch.randn(n, 3, 2).transpose(1, 2) for n in (2, 0, 5)]
    grown = GrowingTensor(str(tmp_path) if in_file else None)
    for batch in batches:
        grown.append(batch)
    assert torch.equal(grown.tensor(), torch.cat(batches))
    assert list(tmp_path.iterdir()) == []
    other = GrowingTensor(None)
    other.append(torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"one sample shape .* got \[3\] and \[4\]"):
        other.append(torch.zeros(2, 4))
