"""``adaround-ext export`` and ``verify``, of what ``quantize`` wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from adaround_ext import load_quantized
from adaround_ext.cli.parser import make_parser
from adaround_ext.export.manifest import read_manifest
from tests.support.cli_fixtures import FAST, Run

pytestmark = pytest.mark.usefixtures("one_thread")

NET = ["nets_of_the_cli:net", "--data", "nets_of_the_cli:images"]
MODEL = ["--model", "nets_of_the_cli:net"]
IMAGES = ["--data", "nets_of_the_cli:images"]


def test_hugging_face_model_through_every_format(
    run: Run, bert: Path, text: Path, folder: Path
) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime", "compressed_tensors", "torchao", "gguf"):
        pytest.importorskip(package)
    windows = ["--data", text, "--nsamples", 6, "--seqlen", 12]
    grid = ["--group-size", 8, "--skip", "pooler"]
    assert run("quantize", bert, *windows, *grid, "--output", "out", *FAST)[0] == 0
    status, out, err = run("export", "out", "--format", "all", "--seqlen", 12, "--json")
    document = json.loads(out)
    assert status == 0, err
    written = {"safetensors", "onnx", "compressed-tensors", "torchao", "aimet"}
    assert written <= set(document["written"]) | set(document["refused"])
    assert {"safetensors", "onnx", "compressed-tensors", "torchao"} <= set(document["written"])
    assert "gguf" in document["refused"]  # 16 columns are no block of 32
    for kind, path in document["written"].items():
        assert read_manifest(path).kind == kind
    status, out, err = run("verify", "out", *windows, "--json")
    document = json.loads(out)
    assert (status, document["ok"]) == (0, True), err
    assert {run["kind"] for run in document["runs"]} >= {"safetensors", "onnx", "torchao"}
    assert all(len(run["outputs"]) == 2 for run in document["runs"])


def test_factory_and_other_places(run: Run, folder: Path) -> None:
    assert run("quantize", *NET, "--output", "out", *FAST)[0] == 0
    assert "--model must name the module:factory" in run("export", "out", "--format", "gguf")[2]
    status, out, _ = run("export", "out", *MODEL, "--format", "safetensors", "-o", "there")
    assert (status, out) == (0, "safetensors: written to there\n")
    status, out, _ = run("verify", "out", "there", *MODEL, *IMAGES)
    assert status == 0
    assert "Sequential: exported and simulated model on 2 batches, equal" in out

    import nets_of_the_cli as nets

    loaded = load_quantized("there", nets.net()).eval()
    assert loaded(nets.images()[0]).isfinite().all()


def test_verify_fails_where_models_differ(run: Run, folder: Path) -> None:
    for seed in ("1", "2"):
        output = ["--output", f"out{seed}"]
        torch.manual_seed(int(seed))
        assert run("quantize", *NET, *output, "--seed", seed, *FAST)[0] == 0
        export = ["export", f"out{seed}", *MODEL, "--format", "safetensors", "--quiet"]
        assert run(*export, "-o", f"there{seed}")[:2] == (0, "")
    status, out, _ = run("verify", "out1", "there2", *MODEL, *IMAGES)
    assert status == 1
    assert "NOT EQUAL" in out
    assert run("verify", "out1", "there1", *MODEL, *IMAGES)[0] == 0


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["export", "nowhere", "--format", "gguf"], "RUN must be a directory that quantize wrote"),
        (["export", "out", *MODEL, "--format", "onnx"], "--data must be given for onnx"),
        (
            ["export", "out", *MODEL, "--format", "gguf", "onnx", "-o", "x"],
            "--output must be left out for several formats, got x",
        ),
        (
            ["export", "out", *MODEL, "--format", "onnx", "--data", "nets_of_the_cli:nothing"],
            "--data must hold at least one batch, got none in nets_of_the_cli:nothing",
        ),
        (["verify", "out", *MODEL, *IMAGES], "RUN must hold exports, got none in out"),
        (["export", "out", *MODEL, "--format", "safetensors", "-o", "out"], "folder must be new"),
    ],
)
def test_bad_usage(run: Run, folder: Path, command: list[str], message: str) -> None:
    assert run("quantize", *NET, "--output", "out", *FAST)[0] == 0
    status, out, err = run(*command)
    assert (status, out) == (1, "")
    assert message in err


def test_exports_that_are_there_are_left_as_they_are(run: Run, folder: Path) -> None:
    assert run("quantize", *NET, "--output", "out", *FAST)[0] == 0
    both = ["export", "out", *MODEL, "--format", "safetensors", "gguf"]
    status, out, _ = run(*both)
    assert (status, "safetensors: written to out/safetensors" in out) == (1, True)
    before = (folder / "out/safetensors/adaround.json").stat().st_mtime_ns
    status, out, _ = run(*both)
    assert status == 1  # gguf holds no convolutions
    assert "safetensors: already in out/safetensors, left as it is: remove it to write it" in out
    assert "gguf: refused: GGUF cannot hold this model" in out
    document = json.loads(run(*both, "--json")[1])
    assert document["there"] == {"safetensors": "out/safetensors"}
    assert (document["written"], [*document["refused"]]) == ({}, ["gguf"])
    assert (folder / "out/safetensors/adaround.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("factory", "message"),
    [
        ("flat", "--model nets_of_the_cli:flat must make the model that was quantized, got one "
         "with no place for 0.bias, 0.weight, 1.bias and 6 more"),
        ("other", "size mismatch for 4."),
        ("longer", "got one without 5.bias, 5.weight"),
    ],
)  # fmt: skip
def test_another_model_than_was_quantized(
    run: Run, folder: Path, factory: str, message: str
) -> None:
    path = folder / "nets_of_the_cli.py"
    path.write_text(
        path.read_text()
        + """
def other():
    return nn.Sequential(*net()[:4], nn.Linear(16, 4))

def longer():
    return nn.Sequential(*net(), nn.Linear(3, 3))
"""
    )
    assert run("quantize", *NET, "--output", "out", *FAST)[0] == 0
    model = ["--model", f"nets_of_the_cli:{factory}"]
    status, out, err = run("export", "out", *model, "--format", "safetensors")
    assert (status, out) == (1, "")
    assert message in err and err.count("\n") == 1 and len(err) < 300


@pytest.mark.parametrize("value", ["nan", "-1", "inf", "small"])
def test_tolerance(run: Run, folder: Path, value: str) -> None:
    status, _, err = run("verify", "out", *IMAGES, "--tolerance", value)
    assert status == 2
    assert f"--tolerance: must be a finite number of at least 0, got '{value}'" in err


def test_verify_takes_the_data_of_quantize(run: Run, folder: Path, bert: Path, text: Path) -> None:
    """--nsamples is of windows; a loader gives all that it has. Defaults hold as many tokens."""
    assert run("quantize", *NET, "--output", "out", *FAST, "--nsamples", 1)[0] == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    assert report["batches"] == 2
    assert run("export", "out", *MODEL, "--format", "safetensors")[0] == 0
    options = ["--nsamples", 1, "--json"]
    assert json.loads(run("verify", "out", *MODEL, *IMAGES, *options)[1])["batches"] == 2
    windows = ["--data", text, "--nsamples", 6, "--seqlen", 12]
    assert run("quantize", bert, *windows, "--output", "bert", *FAST)[0] == 0
    assert run("export", "bert", "--format", "safetensors")[0] == 0
    document = json.loads(run("verify", "bert", *windows, "--batch-size", 4, "--json")[1])
    assert document["batches"] == 2
    assert [tuple(run["outputs"][0]["shape"]) for run in document["runs"]] == [(4, 12, 16)] * 2
    args = [make_parser().parse_args([*command, "--data", "x"]) for command in (
        ["quantize", "m", "--output", "o"], ["verify", "out"],
    )]  # fmt: skip
    assert args[0].seqlen == args[1].seqlen


def test_changed_files_are_refused(run: Run, folder: Path) -> None:
    assert run("quantize", *NET, "--output", "out", *FAST)[0] == 0
    path = folder / "out" / "adaround.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    status, _, err = run("export", "out", *MODEL, "--format", "safetensors")
    assert (status, "another size than when it was written" in err) == (1, True)
