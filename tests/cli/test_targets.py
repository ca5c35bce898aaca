"""``quantize --for``: whatever the model's dtype, it ends where it is to end."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from adaround_ext.export.goal.targets import EXPORT_TARGETS
from tests.support.cli_fixtures import FAST, Run, save_model

pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
WINDOWS = ["--nsamples", 6, "--seqlen", 12]


@pytest.mark.parametrize("name", EXPORT_TARGETS)
def test_a_bfloat16_model_ends_there(
    name: str, run: Run, llama: Path, text: Path, folder: Path
) -> None:
    windows = ["--data", text, *WINDOWS]
    command = ["quantize", llama, *windows, "--for", name, "--output", "out"]
    status, out, err = run(*command, "--preset", "fast")
    assert (status, out.splitlines()[-1]) == (0, f"next: adaround-ext export out --for {name}"), err
    status, out, err = run("export", "out", "--for", name)
    kind = EXPORT_TARGETS[name].format
    assert (status, out) == (0, f"{kind}: written to out/{kind}\n"), err
    status, out, err = run("verify", "out", *windows, "--json")
    assert (status, json.loads(out)["ok"]) == (0, True), err


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_files_keep_their_dtype(dtype: torch.dtype, run: Run, text: Path, folder: Path) -> None:
    model = save_model(folder / "bert", "BertModel", dtype)
    windows = ["--data", text, *WINDOWS]
    for flags, wanted in (([], dtype), (["--dtype", "float32"], torch.float32)):
        command = ["quantize", model, *windows, *flags, "--output", "out", "--overwrite"]
        assert run(*command, *FAST)[0] == 0
        assert {t.dtype for t in load_file("out/model.safetensors").values()} == {wanted}
        assert json.loads(Path("out/config.json").read_text())["dtype"] == str(wanted)[6:]


VISION = """
import torch

def pictures():
    generator = torch.Generator().manual_seed(5)
    return [{"pixel_values": torch.randn(2, 3, 8, 8, generator=generator)} for _ in range(2)]
"""


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("vllm", torch.bfloat16), ("onnxruntime", torch.float16), (None, torch.bfloat16)],
)
def test_loaders_need_not_know_the_dtype(
    name: str | None, dtype: torch.dtype, run: Run, folder: Path
) -> None:
    sizes = {"image_size": 8, "patch_size": 4, "hidden_size": 32, "intermediate_size": 64}
    save_model(folder / "vit", "ViTModel", dtype, **sizes)
    (folder / "vision_of_the_cli.py").write_text(VISION)
    data = ["--data", "vision_of_the_cli:pictures"]
    target = ["--skip", "*.projection"] if name is None else ["--for", name]
    status, _, err = run("quantize", "vit", *data, *target, "--output", "out", *FAST)
    assert status == 0, err
    status, _, err = run("export", "out", "--for", name or "transformers", *data, "--quiet")
    assert status == 0, err
    status, out, err = run("verify", "out", *data, "--json")
    assert (status, json.loads(out)["ok"]) == (0, True), err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--for", "llama.cpp"], "invalid choice: 'llama.cpp'"),
        (["--for", "gguf", "--asymmetric"], "--asymmetric must be left out for gguf"),
        (["--for", "gguf", "--scale-dtype", "bfloat16"], "must be torch.float16 for gguf"),
        (["--for", "gguf", "--group-size", 16], "group_size must be a multiple of 32 for gguf"),
        (
            ["--for", "vllm", "--asymmetric", "--bits", 5],
            "left out for vllm unless bits are one of 4, 8",
        ),
        (["--for", "vllm", "--activation-bits", 8], "--activation-bits must be left out for vllm"),
        (["--for", "openvino", "--activation-bits", 9], "--activation-bits must be at most 8 bits"),
        (["--activation-symmetric"], "--activation-bits must be given with options of activations"),
        (["--activation-bits", 17], "bits must be from 2 to 16, got 17"),
    ],
)
def test_what_cannot_end_there_is_wrong_usage(
    run: Run, folder: Path, flags: list[object], message: str
) -> None:
    """Before anything is read: there is no such model, and no such data."""
    status, out, err = run("quantize", "none", "--data", "none", "--output", "out", *flags)
    assert (status, out) == (2, "")
    assert message in err


def test_layers_are_refused_before_anything_is_optimised(
    run: Run, llama: Path, text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaround_ext.model.quantize.Fitter.run", None)
    command = ["quantize", llama, "--data", text, *WINDOWS, "--output", "out", *FAST]
    flags = ["--for", "vllm", "--scale-dtype", "float16"]
    status, _, err = run(*command, *flags)
    assert (status, "--for 'vllm' cannot hold this model" in err) == (1, True)
    assert "exact in torch.bfloat16, the loader's: quantize with --scale-dtype bfloat16" in err
    status, _, err = run("inspect", llama, *flags)
    assert (status, "--scale-dtype bfloat16" in err) == (1, True)


def test_inspect_shows_what_a_target_chooses(run: Run, llama: Path) -> None:
    for name in ("gguf", "openvino", "vllm"):
        document = json.loads(run("inspect", llama, "--for", name, "--json")[1])
        assert {layer["group_size"] for layer in document["layers"]} == {32}
        assert ("lm_head" in document["skipped"]) == (name == "vllm")


@pytest.mark.parametrize(
    ("kind", "grid", "hint"),
    [
        ("compressed-tensors", ["--scale-dtype", "float32"], "--scale-dtype bfloat16"),
        ("gguf", ["--group-size", 32, "--scale-dtype", "float32"], "--scale-dtype float16"),
        ("gguf", ["--group-size", 16, "--scale-dtype", "float16"], "--group-size 32"),
        ("gguf", ["--group-size", 32, "--asymmetric"], "without --asymmetric"),
        ("onnx --target tensorrt", ["--dtype", "float32", "--bits", 8], "--narrow-range"),
        ("onnx", [], "quantize with --dtype float32"),
        ("onnx --target qnn", ["--dtype", "float32", "--group-size", 16], "--group-size -1"),
    ],
)
def test_hints_name_options_that_there_are(
    kind: str, grid: list[object], hint: str, run: Run, llama: Path, text: Path, folder: Path
) -> None:
    command = ["quantize", llama, "--data", text, *WINDOWS, "--output", "out", *FAST]
    assert run(*command, *grid, "--skip", "lm_head")[0] == 0
    status, _, err = run("export", "out", "--format", *kind.split())
    assert (status, hint in err) == (1, True), err
    option = next(word for word in hint.split() if word.startswith("--"))
    assert option in run("quantize", "--help")[1]


def test_target_and_runtime(run: Run, llama: Path, text: Path, folder: Path) -> None:
    command = ["quantize", llama, "--data", text, *WINDOWS, "--output", "out", *FAST]
    assert run(*command, "--for", "openvino")[0] == 0
    _, _, err = run("export", "out", "--for", "openvino", "--target", "qnn")
    assert "--target must be left out with --for, got qnn" in err
    assert "one of the arguments --format --for is required" in run("export", "out")[2]
    assert run("export", "out", "--for", "openvino", "--quiet")[0] == 0
    details = json.loads(Path("out/onnx/adaround.json").read_text())["details"]
    assert details["target"] == "openvino"
    # A folder that is there is said before a model is loaded.
    Path("out/config.json").unlink()
    assert "folder must be new or empty" in run("export", "out", "--for", "openvino")[2]
