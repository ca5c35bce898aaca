"""Names of python -m benchmarks: each leads to a module, and what it is given arrives there."""

from __future__ import annotations

import importlib

import pytest

from benchmarks import __main__ as benchmarks

pytest.importorskip("matplotlib")  # of the two that draw


@pytest.mark.parametrize("name", benchmarks.SUITE)
def test_a_benchmark_with_shared_options_runs(name: str) -> None:
    module = importlib.import_module(f"benchmarks.{benchmarks.SUITE[name].module}")
    assert callable(module.run)


@pytest.mark.parametrize("name", benchmarks.OTHERS)
def test_a_benchmark_with_options_of_its_own_has_help(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    with pytest.raises(SystemExit) as ended:
        benchmarks.main([name, "--help"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: python -m benchmarks {name} ")


def test_help_lists_every_name(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        benchmarks.main(["--help"])
    lines = capsys.readouterr().out.splitlines()
    for name, entry in (benchmarks.SUITE | benchmarks.OTHERS).items():
        assert f"  {name:20}{entry.help}" in lines


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing"], "no benchmark nothing: there are ops, packed"),
        (["--quick", "paper"], "the name comes first: python -m benchmarks paper"),
        (["ops", "--bits", "9"], "invalid choice: 9"),
    ],
)
def test_what_cannot_be_run_is_said(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        benchmarks.main(arguments)
    assert ended.value.code == 2
    assert message in capsys.readouterr().err
