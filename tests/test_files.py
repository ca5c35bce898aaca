"""Files: who may read them, and where ~ is."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from adaround_ext import (
    LayerResult,
    ModelReport,
    Sensitivity,
    export_model,
    load_quantized,
    map_weights_,
    optimize_layer,
    quantize_,
    save_quantized,
    sensitivity,
    verify,
)
from adaround_ext.files import folder_beside, take_place
from tests.support.cli_fixtures import FAST, Run

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS: dict[str, Any] = {"preset": "fast", "progress": False}
NET = ["nets_of_the_cli:net", "--data", "nets_of_the_cli:images"]


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 6), nn.ReLU(), nn.Linear(6, 4)).eval()


def rows() -> torch.Tensor:
    return torch.randn(24, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture(params=[0o022, 0o027, 0o002, 0o077])
def mask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def write_all(folder: str, run: Run) -> None:
    """A file of every kind that the package writes, below a folder that is given as text."""
    result = optimize_layer(nn.Linear(8, 4), rows(), preset="fast")
    result.save(f"{folder}/layer.safetensors")
    quantized = model()
    report = quantize_(quantized, rows(), checkpoint_dir=f"{folder}/checkpoint", **SETTINGS)
    report.save(f"{folder}/report.json")
    report.to_html(f"{folder}/report.html")
    sensitivity(model(), rows(), (2, 4), progress=False).save(f"{folder}/sensitivity.json")
    save_quantized(quantized, f"{folder}/own")
    pytest.importorskip("onnxscript")
    export_model(quantized, f"{folder}/onnx", "onnx", batch=rows()[:2])
    export_model(quantized, f"{folder}/torchao", "torchao", batch=rows()[:2])
    assert run("quantize", *NET, "--output", f"{folder}/out", *FAST)[0] == 0
    net = ["--model", NET[0]]
    assert run("export", f"{folder}/out", "--format", "safetensors", *net)[0] == 0


def test_files_have_the_rights_that_the_umask_leaves(mask: int, folder: Path, run: Run) -> None:
    inside = folder / "inside"
    inside.mkdir()
    write_all(str(inside), run)
    files = [path for path in inside.rglob("*") if path.is_file()]
    assert {path.suffix for path in files} >= {".json", ".html", ".safetensors", ".onnx", ".pt"}
    rights = {path.name: path.stat().st_mode & 0o777 for path in files}
    assert set(rights.values()) == {0o666 & ~mask}, rights
    assert not list(inside.rglob("*.part"))


def test_a_hugging_face_directory_has_them_too(
    mask: int, run: Run, bert: Path, text: Path, folder: Path
) -> None:
    windows = ["--data", text, "--nsamples", 4, "--seqlen", 12]
    assert run("quantize", bert, *windows, "--output", "out", *FAST)[0] == 0
    rights = {path.name: path.stat().st_mode & 0o777 for path in Path("out").iterdir()}
    assert set(rights.values()) == {0o666 & ~mask}, rights


def test_a_file_that_fails_leaves_the_old_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = optimize_layer(nn.Linear(8, 4), rows(), preset="fast")
    result.save("layer.safetensors")
    before = Path("layer.safetensors").read_bytes()

    def fails(tensors: object, path: Path, metadata: object) -> None:
        Path(path).write_text("half of it")
        raise OSError("disk full")

    monkeypatch.setattr("adaround_ext.result.safetensors.torch.save_file", fails)
    with pytest.raises(OSError, match="disk full"):
        result.save("layer.safetensors")
    assert Path("layer.safetensors").read_bytes() == before
    assert not list(folder.glob("*.part"))


def write_folder(path: Path, overwrite: bool) -> None:
    with folder_beside(path) as written:
        (written / "new").write_text("new")
        take_place(written, path, overwrite)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_takes_its_place(overwrite: bool, tmp_path: Path) -> None:
    path = tmp_path / "above" / "out"
    write_folder(path, overwrite)
    assert [item.name for item in path.iterdir()] == ["new"]
    (path / "new").unlink()
    inode = path.stat().st_ino
    write_folder(path, overwrite)  # into the folder that is there, which is empty
    assert path.stat().st_ino == inode
    (path / "new").rename(path / "old")
    if overwrite:
        write_folder(path, overwrite)
    else:
        with pytest.raises(OSError, match="not empty"):
            write_folder(path, overwrite)
    assert [item.name for item in path.iterdir()] == ["new" if overwrite else "old"]
    assert list(path.parent.iterdir()) == [path]


def test_a_folder_that_fails_goes(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), folder_beside(tmp_path / "out") as written:
        (written / "half").touch()
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())


def test_home_in_every_path(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    write_all("~", run)
    names = {"layer.safetensors", "checkpoint", "report.json", "report.html", "sensitivity.json"}
    assert {path.name for path in home.iterdir()} == names | {"own", "onnx", "torchao", "out"}
    assert not (folder / "~").exists()

    LayerResult.load("~/layer.safetensors")
    ModelReport.load("~/report.json")
    Sensitivity.load("~/sensitivity.json")
    loaded = load_quantized("~/own", model())
    assert verify(loaded, ["~/own", "~/onnx"], [rows()[:3]]).ok
    (home / "waiting").mkdir()
    budgets: dict[str, Any] = {"memory_budget": 0, "cache_dir": "~/waiting"}
    report = quantize_(model(), rows(), offload_dir="~/waiting", **budgets, **SETTINGS)
    assert report.memory["cache_file"] > 0
    quantize_(model(), rows(), activation_aware=True, **budgets, **SETTINGS)  # inputs in a file
    assert not list((home / "waiting").iterdir())
    map_weights_(model(), "~/out")


def test_home_on_the_command_line(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    home = folder / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    paths = ["--output=~/out", "--html=~/page.html", "--checkpoint-dir=~/kept", "--cache-dir=~"]
    assert run("quantize", *NET, *paths, *FAST)[0] == 0
    assert {path.name for path in home.iterdir()} == {"out", "page.html", "kept"}
    net = ["--model", NET[0]]
    formats = ["--format", "safetensors"]
    assert run("export", "~/out", *net, *formats, "--output=~/there")[0] == 0
    assert run("verify", "~/out", "~/there", *net, *NET[1:])[0] == 0
    assert run("inspect", "~/out/report.json")[0] == 0
    assert run("compare", "~/out", "~/out/report.json")[0] == 0
    assert run("sensitivity", *NET, "--bits", "2,4", "--output=~/s.json")[0] == 0
    bits = ["--layer-bits=~/s.json", "--average-bits", 3]
    assert run("quantize", *NET, "--output=~/mixed", *bits, *FAST)[0] == 0
    assert not (folder / "~").exists()
