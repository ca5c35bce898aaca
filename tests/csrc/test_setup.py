"""What setup.py decides: needed packages, whether CUDA is built, for which architectures."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.documents import ROOT, blocks, read

SETUP = ROOT / "setup.py"
if not SETUP.exists():
    pytest.skip("the source tree is not here", allow_module_level=True)
setup: dict[str, Any] = runpy.run_path(str(SETUP))
NEEDED = {"torch": "2.10", "pybind11": "2.13", "ninja": "", "setuptools": "77"}
TOOLKIT = setup["Toolkit"]("/cuda", "13.0", frozenset({(7, 5), (8, 7), (9, 0), (12, 0), (12, 1)}))
EVERY = "7.5;8.0;8.6;8.9;9.0;10.0;12.0+PTX"


def check(monkeypatch: pytest.MonkeyPatch, **versions: str | None) -> str:
    """What the check of packages says where these are installed, "" where it lets pass."""
    there = {"torch": "2.13.0+cpu", "pybind11": "3.1.0", "ninja": "1.13", "setuptools": "84.2.1"}
    function = setup["check_packages"]
    monkeypatch.setitem(function.__globals__, "version_of", (there | versions).get)
    try:
        function()
    except SystemExit as said:
        return str(said)
    return ""


def test_what_is_needed_is_what_pyproject_says() -> None:
    needed = re.search(r"^requires = \[(.*)\]$", read("pyproject.toml"), re.M)
    assert needed is not None
    listed = dict(re.findall(r'"(\w+)(?:>=)?([\d.]*)"', needed[1]))
    assert NEEDED.items() <= listed.items()
    assert setup["BUILD_REQUIREMENTS"] == NEEDED
    runtime = re.search(r'"torch>=([\d.]+)"', read("pyproject.toml").partition("[project]")[2])
    assert runtime is not None and runtime[1] == NEEDED["torch"]


@pytest.mark.parametrize("name", ["README.md", "README.zh.md"])
def test_the_readme_installs_what_is_needed(name: str) -> None:
    lines = [line for block in blocks(name, "sh") for line in block.text.splitlines()]
    (command,) = (line for line in lines if "pip install" in line and "ninja" in line)
    assert set(NEEDED) <= set(re.findall(r"\w+", command))
    assert any("--no-build-isolation" in line for line in lines[lines.index(command) + 1 :])


@pytest.mark.parametrize("name", NEEDED)
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = check(monkeypatch, **{name: None})
    quoted = f'"{name}>={NEEDED[name]}"' if NEEDED[name] else name
    assert f": pip install {quoted}, or leave out --no-build-isolation" in said
    assert [other for other in NEEDED if re.search(rf"\b{other}\b", said)] == [name]


@pytest.mark.parametrize(
    ("name", "version"),
    [("torch", "2.9.1+cu128"), ("pybind11", "2.12.0"), ("setuptools", "66.1.1")],
)
def test_an_old_package_is_named(name: str, version: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = check(monkeypatch, **{name: version})
    assert f'{name} >= {NEEDED[name]} ({version} is installed): pip install "{name}>=' in said


@pytest.mark.parametrize(
    "versions", [{}, {"torch": "2.10.0a0+git12ab"}, {"setuptools": "77.0.0"}, {"pybind11": ""}]
)
def test_what_is_new_enough_is_taken(
    versions: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert check(monkeypatch, **versions) == ""


def test_all_that_is_missing_is_one_command(monkeypatch: pytest.MonkeyPatch) -> None:
    said = check(monkeypatch, pybind11=None, ninja=None, setuptools="65.5.0")
    assert 'pip install "pybind11>=2.13" ninja "setuptools>=77", or' in said


@pytest.mark.parametrize("name", ["pybind11", "torch"])
def test_a_build_without_it_stops_with_the_command(name: str) -> None:
    """The whole of setup.py, as pip runs it, where a package cannot be imported."""
    code = f"""
import importlib.util, runpy, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda own, *rest: None if own == {name!r} else find(own, *rest)
sys.argv = ["setup.py", "--version"]
runpy.run_path("setup.py", run_name="__main__")
"""
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert out.returncode == 1
    assert f'pip install "{name}>={NEEDED[name]}"' in out.stderr
    assert "Traceback" not in out.stderr


def test_ninja_of_an_environment_that_is_not_activated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    executable(tmp_path / "scripts" / "ninja", "exit 0")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / name))
    assert check(monkeypatch) == ""
    assert os.environ["PATH"].split(os.pathsep) == [str(tmp_path), str(tmp_path / "scripts")]


@pytest.mark.parametrize(
    ("asked", "gpus", "archs", "reason"),
    [
        ("", [], EVERY, "no GPU is visible"),
        ("", [(9, 0)], "9.0+PTX", "what is visible here"),
        ("", [(8, 7), (12, 1)], "8.7;12.1+PTX", "what is visible here"),
        ("", [(10, 3)], EVERY, "10.3 cannot be compiled for"),  # too new for this toolkit
        ("", [(7, 0), (9, 0)], EVERY, "7.0 cannot be compiled for"),
        ("all", [(9, 0)], EVERY, "TORCH_CUDA_ARCH_LIST=all"),
        ("All", [], EVERY, "TORCH_CUDA_ARCH_LIST=all"),
        ("8.0;8.6+PTX", [(9, 0)], "8.0;8.6+PTX", "TORCH_CUDA_ARCH_LIST"),
        ("Ampere", [(9, 0)], "Ampere", "TORCH_CUDA_ARCH_LIST"),
    ],
)
def test_architectures(asked: str, gpus: list[tuple[int, int]], archs: str, reason: str) -> None:
    assert setup["choose_archs"](asked, TOOLKIT, gpus) == (archs, reason)


def test_an_old_toolkit_has_fewer_architectures() -> None:
    old = TOOLKIT._replace(version="12.4", archs=frozenset({(7, 5), (9, 0)}))
    assert setup["choose_archs"]("", old, [])[0] == "7.5;8.0;8.6;8.9;9.0+PTX"


def announced(*arguments: Any) -> list[str]:
    return list(setup["announcements"](*arguments))


def test_a_long_build_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = announced(TOOLKIT, EVERY, "no GPU is visible", "13.0")
    assert first == f"building for CPU and CUDA {EVERY} (no GPU is visible)"
    assert second.startswith("7 architectures take about 8 minutes on two cores: TORCH_CUDA_ARCH")
    assert len(announced(TOOLKIT, "9.0+PTX", "what is visible here", "13.0")) == 1


def test_a_build_without_nvcc_under_a_torch_with_cuda_warns(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("USE_CUDA", raising=False)
    first, warning = announced(None, "", "", "12.8")
    assert first == "building for CPU only (no nvcc)"
    for part in ("WARNING", "torch has CUDA 12.8", "no nvcc", "CUDA_HOME", "USE_CUDA=0"):
        assert part in warning
    assert announced(None, "", "", "") == [first]  # a torch without CUDA: nothing is lost
    monkeypatch.setenv("USE_CUDA", "0")
    assert announced(None, "", "", "12.8") == ["building for CPU only (USE_CUDA=0)"]


def test_a_build_that_this_torch_cannot_load_says_so() -> None:
    assert "will not load" in announced(TOOLKIT, "9.0", "TORCH_CUDA_ARCH_LIST", "")[-1]


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_the_toolkit_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USE_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    executable(
        tmp_path / "bin" / "nvcc",
        'case "$1" in --version) echo "Cuda compilation tools, release 12.10, V12.10.1";;\n'
        "--list-gpu-arch) echo compute_75; echo compute_90; echo compute_121;; esac",
    )
    archs = frozenset({(7, 5), (9, 0), (12, 1)})
    assert setup["find_cuda"]() == (str(tmp_path), "12.10", archs)
    monkeypatch.setenv("USE_CUDA", "0")
    assert setup["find_cuda"]() is None


def test_no_toolkit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("USE_CUDA", raising=False)
    monkeypatch.delenv("FORCE_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert setup["find_cuda"]() is None
    monkeypatch.setenv("FORCE_CUDA", "1")
    with pytest.raises(SystemExit, match="FORCE_CUDA is set but nvcc was not found"):
        setup["find_cuda"]()
