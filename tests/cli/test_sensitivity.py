"""The command line's sensitivities, bits of single layers, and activations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from adaround_ext import ModelReport, Sensitivity, sensitivity
from adaround_ext.cli.models import load_model
from adaround_ext.cli.sources import text_windows
from tests.support.cli_fixtures import FAST, Run

pytestmark = pytest.mark.usefixtures("one_thread")
NET = ["nets_of_the_cli:net", "--data", "nets_of_the_cli:images"]
WINDOWS = ["--nsamples", 4, "--seqlen", 12]


def bits_of(folder: str) -> dict[str, int]:
    return {e.name: e.config["bits"] for e in ModelReport.load(f"{folder}/report.json").layers}


def test_sensitivity_is_that_of_python(run: Run, bert: Path, text: Path, folder: Path) -> None:
    command = ["sensitivity", bert, "--data", text, *WINDOWS, "--bits", "2,4", "--quiet"]
    grid = ["--average-bits", 3, "--group-size", 8, "--skip", "pooler"]
    status, out, err = run(*command, *grid, "--output", "bits.json", "--json")
    assert (status, err) == (0, "")
    source = load_model(str(bert))
    ids = text_windows(source.tokenizer(), text.read_text(), 4, 12)
    settings: dict[str, Any] = {"granularity": "per_group", "group_size": 8, "progress": False}
    expected = sensitivity(
        source.model,
        [{"input_ids": ids}],
        (2, 4),
        average_bits=3.0,
        overrides={"pooler": "skip"},
        batch_norm="keep",
        **settings,
    )
    assert json.loads(out) == json.loads(json.dumps(expected.to_dict()))
    assert Sensitivity.load("bits.json") == expected

    windows = ["--data", text, *WINDOWS, *FAST]
    assert run("quantize", bert, *windows, "--output", "out", "--layer-bits", "bits.json")[0] == 0
    assert bits_of("out").items() >= expected.suggest().items()
    assert bits_of("out")["pooler.dense"] == 4  # it was not measured


def test_the_table_and_other_budgets(run: Run, folder: Path) -> None:
    status, out, _ = run("sensitivity", *NET, "--bits", "2, 3,8", "--output", "bits.json")
    assert status == 0
    assert "error of the outputs with one layer quantized, worst layers first" in out
    assert out.splitlines()[-1] == "written to bits.json, for quantize --layer-bits"
    command = ["quantize", *NET, "--overwrite", "--output", "out", *FAST]
    status, _, err = run(*command, "--layer-bits", "bits.json")
    assert (status, "--average-bits must be given, here or to sensitivity" in err) == (1, True)
    command += ["--layer-bits", "bits.json"]
    for budget, wanted in ((2, {2}), (8, {8})):
        assert run(*command, "--average-bits", budget)[0] == 0
        assert set(bits_of("out").values()) == wanted
    # What is asked of a layer by hand comes after.
    assert run(*command, "--average-bits", 8, "--override", "4=bits:3")[0] == 0
    assert bits_of("out") == {"0": 8, "4": 3}


def test_layers_that_the_target_leaves_are_left(
    run: Run, llama: Path, text: Path, folder: Path
) -> None:
    data = ["--data", text, *WINDOWS]
    measure = ["sensitivity", llama, *data, "--bits", "3,4", "--average-bits", 3.5, "--quiet"]
    assert run(*measure, "--output", "bits.json")[0] == 0
    for target in ("vllm", "transformers", "onnxruntime"):
        flags = ["--layer-bits", "bits.json", "--for", target, "--overwrite", *FAST]
        assert run("quantize", llama, *data, "--output", "out", *flags)[0] == 0
        assert ("lm_head" in bits_of("out")) == (target == "onnxruntime")
        assert set(bits_of("out").values()) == {3, 4}


@pytest.mark.parametrize(
    ("flags", "status", "message"),
    [
        (["--bits", "2,two"], 2, "--bits: must be a whole number of at least 1, got 'two'"),
        (["--bits", "1,4"], 1, "bits must be from 2 to 8, got 1"),
        (["--average-bits", 9], 1, "--average-bits must be a number from 2 to 8, got 9.0"),
        (["--output", "nowhere/bits.json"], 1, "--output must be in a directory that exists"),
        (["--override", "0=bits:3"], 1, "must not set bits: they are what is measured"),
    ],
)
def test_bad_sensitivities(
    run: Run, folder: Path, flags: list[object], status: int, message: str
) -> None:
    came, out, err = run("sensitivity", *NET, *flags)
    assert (came, out) == (status, "")
    assert message in err


def test_files_that_sensitivity_did_not_write(run: Run, folder: Path) -> None:
    Path("bits.json").write_text('{"layers": []}')
    command = ["quantize", *NET, "--output", "out", "--layer-bits", "bits.json", *FAST]
    status, _, err = run(*command)
    assert (status, "bits.json must be a file written by Sensitivity.save" in err) == (1, True)
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["directory", "factory"])
def test_activations_come_back(kind: str, run: Run, bert: Path, text: Path, folder: Path) -> None:
    data, model = ["--data", text, *WINDOWS], list[object]()
    if kind == "directory":
        command = ["quantize", bert, *data]
    else:
        command, data = ["quantize", *NET], NET[1:]
        model = ["--model", NET[0]]
    flags = ["--activation-bits", 6, "--activation-symmetric", "--activation-ranges", "min_max"]
    status, _, err = run(*command, *flags, "--output", "out", *FAST)
    assert status == 0
    # The files are those of the model's class, which has no quantizers.
    from safetensors.torch import load_file

    assert not [key for key in load_file("out/model.safetensors") if "quantizer" in key]
    details = json.loads(Path("out/adaround.json").read_text())["details"]
    configs = [item["config"] for item in details["quantizers"].values()]
    wanted = {"bits": 6, "symmetric": True, "ranges": "min_max"}
    assert configs and all(config.items() >= wanted.items() for config in configs)
    status, _, err = run("export", "out", *model, "--format", "safetensors", "--quiet")
    assert (status, "UNEXPECTED" in err) == (0, False)
    status, out, _ = run("verify", "out", *model, *data)
    assert (status, "load_quantized: equal" in out) == (0, True)


def test_activations_for_a_target(run: Run, folder: Path) -> None:
    pytest.importorskip("onnxscript")
    command = ["quantize", *NET, "--output", "out", *FAST, "--for", "tensorrt"]
    assert run(*command, "--activation-bits", 8)[0] == 0
    model = ["--model", NET[0]]
    assert run("export", "out", "--for", "tensorrt", *model, *NET[1:])[0] == 0
    details = json.loads(Path("out/onnx/adaround.json").read_text())["details"]
    assert details["activations"] and all(q["symmetric"] for q in details["activations"].values())
    assert torch.tensor([q["bits"] for q in details["activations"].values()]).eq(8).all()
