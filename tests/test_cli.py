"""The command line, in process but for one run."""

from __future__ import annotations

import argparse
import copy
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adaround_ext import (
    ModelReport,
    cli_commands,
    cli_options,
    cli_output,
    load_quantized,
    ops,
    quantize_,
)
from adaround_ext.cli_sources import load_model, text_windows
from adaround_ext.result import QuantizedWeight
from tests.cli_fixtures import FAST, WORDS, Run

pytestmark = pytest.mark.usefixtures("one_thread")


def report_file(folder: Path, name: str, **changes: object) -> tuple[Path, ModelReport]:
    """A report of a small model, written to a file."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    settings: dict[str, Any] = {"preset": "fast", "progress": False, **changes}
    report = quantize_(model, [torch.randn(32, 6)], **settings)
    report.save(folder / name)
    return folder / name, report


def test_hugging_face_directory_end_to_end(run: Run, bert: Path, text: Path, folder: Path) -> None:
    from transformers import AutoModel, AutoTokenizer

    output, page = folder / "new" / "out", folder / "page.html"
    windows = ["--data", text, "--nsamples", 6, "--seqlen", 12, "--batch-size", 4]
    changes = ["--skip", "pooler", "--override", "*.intermediate=bits:8"]
    files = ["--output", output, "--html", page]
    status, out, err = run("quantize", bert, *windows, *changes, *files, *FAST, "--json")
    assert (status, err) == (0, "")

    model = AutoModel.from_pretrained(bert).eval()
    tokenizer = AutoTokenizer.from_pretrained(bert)
    ids = text_windows(tokenizer, text.read_text(), 6, 12)
    expected = quantize_(
        model,
        [{"input_ids": ids[:4]}, {"input_ids": ids[4:]}],
        preset="fast",
        overrides={"pooler": "skip", "*.intermediate": {"bits": 8}},
        progress=False,
    )
    reloaded = AutoModel.from_pretrained(output).eval()
    assert type(reloaded) is type(model)
    with torch.no_grad():
        want, got = model(ids), reloaded(ids)
    assert torch.equal(got.last_hidden_state, want.last_hidden_state)
    assert torch.equal(got.pooler_output, want.pooler_output)
    assert AutoTokenizer.from_pretrained(output)("a cat")["input_ids"] == [2, 5, 6, 3]

    report = ModelReport.load(output / "report.json")
    assert json.loads(out) == json.loads(report.to_json())
    assert [e.report.losses for e in report.layers] == [e.report.losses for e in expected.layers]
    assert {e.name.split(".")[-2]: e.config["bits"] for e in report.layers}["intermediate"] == 8
    assert report.skipped["pooler.dense"] == "overrides say skip"
    assert (output / "report.html").read_text() == page.read_text() == report.to_html()
    assert sorted(path.name for path in output.parent.iterdir()) == ["out"]


def test_codes_are_those_of_the_weights(run: Run, folder: Path) -> None:
    grid = ["--bits", 3, "--group-size", 4, "--asymmetric", "--override", "0=group_size:-1"]
    data = ["--data", "nets_of_the_cli:images", "--seed", 5]
    status, out, err = run(
        "quantize", "nets_of_the_cli:net", *data, *grid, "--output", "out", *FAST
    )
    assert (status, out, err) == (0, "", "the module is imported\n")
    # Batch norms are there as they were, so the file fits the model.
    import nets_of_the_cli as nets

    weights = load_file("out/model.safetensors")
    loaded = nets.net()
    loaded.load_state_dict(weights)
    load_quantized("out", loaded)
    for layer, groups in (("0", 1), ("4", 4)):
        weight = loaded.get_submodule(layer).quantized_weight
        assert isinstance(weight, QuantizedWeight)
        assert (weight.codes.dtype, weight.bits, int(weight.codes.max()) <= 7) == (
            torch.uint8,
            3,
            True,
        )
        assert weight.scale.shape == weight.zero_point.shape == (len(weight.codes), groups)
        values = ops.dequantize(weight.codes, weight.scale, weight.zero_point)
        assert torch.equal(values.view_as(weights[f"{layer}.weight"]), weights[f"{layer}.weight"])

    torch.manual_seed(5)
    model = nets.net()
    before = copy.deepcopy(model)
    overrides = {"0": {"granularity": "per_channel", "group_size": None}}
    settings: dict[str, Any] = {"granularity": "per_group", "group_size": 4, "symmetric": False}
    settings |= {"bits": 3, "seed": 5, "preset": "fast", "progress": False}
    quantize_(model, nets.images(), overrides=overrides, batch_norm="keep", **settings)
    before.load_state_dict(weights)
    for name, value in model.state_dict().items():
        assert torch.equal(before.state_dict()[name], value), name


def test_summary_and_progress(run: Run, folder: Path) -> None:
    command = ["quantize", "nets_of_the_cli:Backwards", "--data", "nets_of_the_cli:rows"]
    status, out, err = run(*command, "--output", "out", "--preset", "fast")
    assert status == 0
    assert out.startswith("Backwards: 2 layers at ")
    files = "adaround.json, adaround.safetensors, model.safetensors, report.html, report.json"
    assert files in out
    assert "100%" in err


def test_checkpoint_is_used_again(run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = ["quantize", "nets_of_the_cli:net", "--data", "nets_of_the_cli:images", *FAST]
    command += ["--checkpoint-dir", "kept"]
    with monkeypatch.context() as patch:
        patch.setattr(cli_commands, "save", _disk_full)
        status, _, err = run(*command, "--output", "out")
    assert (status, "OSError: disk full" in err) == (1, True)
    assert not (folder / "out").exists()
    kept = sorted(path.name for path in (folder / "kept").iterdir())
    assert kept == ["checkpoint.json", "layer_00000.safetensors", "layer_00001.safetensors"]
    monkeypatch.setattr("adaround_ext.shared_work.solve_all", None)  # nothing is left to solve
    assert run(*command, "--output", "out")[0] == 0
    assert (folder / "out" / "report.json").exists()


def _disk_full(*_: object) -> None:
    raise OSError("disk full")


def test_windows_are_spread_over_the_text(bert: Path) -> None:
    tokenizer = load_model(str(bert)).tokenizer()
    words = [WORDS[i % 16] for i in range(43)]
    ids = text_windows(tokenizer, " ".join(words), 3, 7)  # eight windows of five words
    assert ids.dtype == torch.int64
    assert ids[:, 0].tolist() == [2] * 3
    assert ids[:, -1].tolist() == [3] * 3
    assert ids[:, 1:-1].tolist() == [
        [4 + i % 16 for i in range(5 * window, 5 * window + 5)] for window in (0, 2, 5)
    ]
    with pytest.raises(ValueError, match=r"--seqlen must be at least 3 .*, got 2"):
        text_windows(tokenizer, "a cat", 1, 2)


@pytest.mark.parametrize("name", ["BertModel", "BertForMaskedLM", "BertLMHeadModel"])
def test_architecture_decides_the_class(bert: Path, tmp_path: Path, name: str) -> None:
    import transformers

    config = transformers.AutoConfig.from_pretrained(bert, is_decoder=name == "BertLMHeadModel")
    getattr(transformers, name)(config).save_pretrained(tmp_path)
    source = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert type(source.model).__name__ == name
    assert next(source.model.parameters()).dtype == torch.bfloat16
    assert source.tokenizer() is None
    forced = load_model(str(tmp_path), auto_class="AutoModelForTokenClassification")
    assert type(forced.model).__name__ == "BertForTokenClassification"
    if name == "BertLMHeadModel":
        assert config.use_cache
        with source.without_cache():
            assert not source.model.config.use_cache  # type: ignore[union-attr]
        assert source.model.config.use_cache  # type: ignore[union-attr]


def test_inspect_model(run: Run, folder: Path) -> None:
    model = "nets_of_the_cli:Backwards"
    status, out, _ = run("inspect", model, "--json", "--override", "first=bits:8")
    document = json.loads(out)
    assert (status, document["order"], document["parameters"]) == (0, "definition", 32)
    layers = {item["name"]: item for item in document["layers"]}
    assert list(layers) == ["last", "first", "idle"]
    assert layers["first"]["shape"] == [4, 3]
    assert layers["first"]["share"] == 12 / 32
    assert (layers["first"]["bits"], layers["last"]["bits"]) == (8, 4)
    assert document["quantized_parameters"] == 24

    data = ["--data", "nets_of_the_cli:rows"]
    document = json.loads(run("inspect", model, *data, "--json", "--skip", "first")[1])
    assert [item["name"] for item in document["layers"]] == ["last"]
    assert document["skipped"] == {
        "first": "overrides say skip",
        "idle": "it was not called: nothing is known of its inputs",
    }
    status, out, _ = run("inspect", model, *data)
    assert status == 0
    assert out.index("first") < out.index("last") < out.index("idle: it was not called")
    assert "2 layers to quantize, 20 of 32 parameters (62.5 %), in the order of execution" in out


def test_inspect_directory_with_text(run: Run, bert: Path, text: Path) -> None:
    documents = [
        json.loads(run("inspect", bert, *data, "--json")[1])
        for data in ([], ["--data", text, "--seqlen", 12])
    ]
    names = [[layer["name"] for layer in document["layers"]] for document in documents]
    assert [document["order"] for document in documents] == ["definition", "execution"]
    assert sorted(names[0]) == sorted(names[1])
    assert "embeddings.word_embeddings" in documents[1]["skipped"]


def test_inspect_report(run: Run, folder: Path) -> None:
    path, report = report_file(folder, "report.json")
    status, out, err = run("inspect", path)
    assert (status, err) == (0, "")
    assert str(report) in out
    document = json.loads(run("inspect", path, "--json")[1])
    assert document["relative_error"] == report.relative_error
    assert [item["name"] for item in document["worst"]] == [e.name for e in report.worst()]


def test_compare(run: Run, folder: Path) -> None:
    a, first = report_file(folder, "a.json", bits=3)
    b, second = report_file(folder, "b.json", overrides={"2": "skip"})
    status, out, _ = run("compare", a, b, "--json")
    document = json.loads(out)
    (layer,) = document["layers"]
    errors = [report.layers[0].report.relative["final"] for report in (first, second)]
    assert status == 0
    assert (document["only_a"], document["only_b"], layer["name"]) == (["2"], [], "0")
    assert (layer["a"]["bits"], layer["b"]["bits"]) == (3, 4)
    assert (layer["a"]["error"], layer["b"]["error"]) == tuple(errors)
    assert layer["ratio"] == errors[1] / errors[0] < 1
    assert document["ratio"] == pytest.approx(layer["ratio"])
    assert document["a"]["relative_error"] == first.relative_error
    assert document["b"]["seconds"] == second.seconds["total"]
    status, out, _ = run("compare", b, a)
    assert status == 0
    assert "only in B: 2" in out
    assert f"{errors[0] / errors[1]:.3f}" in out


def test_compare_without_error_has_no_ratio(run: Run, folder: Path) -> None:
    path, report = report_file(folder, "report.json")
    values = report.to_dict()
    for layer in values["layers"]:
        layer["report"]["losses"]["final"] = 0.0
    ModelReport.from_dict(values).save(folder / "zero.json")
    document = json.loads(run("compare", path, folder / "zero.json", "--json")[1])
    assert [item["ratio"] for item in document["layers"]] == [None, None]
    assert document["ratio"] is None


def test_json_has_no_infinity(run: Run, folder: Path) -> None:
    path, report = report_file(folder, "report.json")
    values = report.to_dict()
    values["layers"][0]["report"]["losses"]["nearest"] = float("inf")
    ModelReport.from_dict(values).save(path)
    document = json.loads(run("inspect", path, "--json")[1], parse_constant=pytest.fail)
    assert [item["nearest"] for item in document["worst"]].count(None) == 1


def test_env_as_a_module() -> None:
    command = [sys.executable, "-m", "adaround_ext", "env", "--json"]
    found = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    document = json.loads(found.stdout)
    assert document["torch"] == torch.__version__
    assert document["instruction_set"] in document["build"]["instruction_sets"]
    assert len(document["cuda_devices"]) == torch.cuda.device_count()


def test_env_as_text(run: Run) -> None:
    status, out, _ = run("env")
    rows = dict(line.split(maxsplit=1) for line in out.splitlines() if not line.startswith("build"))
    assert status == 0
    assert (rows["torch"], rows["threads"]) == (torch.__version__, "1")


@pytest.mark.parametrize(
    ("model", "data", "message"),
    [
        ("missing", "nets_of_the_cli:rows", "local Hugging Face directory .* got 'missing'"),
        (".", "nets_of_the_cli:rows", "MODEL must hold a config.json"),
        ("no_such_module:net", "nets_of_the_cli:rows", "that exists, got no_such_module"),
        ("nets_of_the_cli:none", "nets_of_the_cli:rows", "what nets_of_the_cli has, got none"),
        ("nets_of_the_cli:number", "nets_of_the_cli:rows", "must return a torch module, got int"),
        ("nets_of_the_cli:NETS.x", "nets_of_the_cli:rows", "has, got NETS.x"),
        ("nets_of_the_cli:__name__", "nets_of_the_cli:rows", "must be callable, got str"),
        ("nets_of_the_cli:broken", "nets_of_the_cli:rows", "RuntimeError: no weights to be found"),
        (
            "nets_of_the_cli:flat",
            "nets_of_the_cli:rows",
            "model must have a layer to quantize, got none",
        ),
        ("nets_of_the_cli:net", "missing.txt", "text file or module:loader, got 'missing.txt'"),
        ("nets_of_the_cli:net", "nets_of_the_cli.py", "must be module:loader for a model from"),
        ("nets_of_the_cli:net", "nets_of_the_cli:number", "an iterable of batches, got int"),
        ("nets_of_the_cli:net", "nets_of_the_cli:list", "has, got list"),
        ("nets_of_the_cli:net", "builtins:list", "calibration must hold at least one batch"),
    ],
)
def test_failures_are_one_line(run: Run, folder: Path, model: str, data: str, message: str) -> None:
    status, out, err = run("quantize", model, "--data", data, "--output", "out", *FAST, "--json")
    lines = [line for line in err.splitlines() if line != "the module is imported"]
    assert (status, out, len(lines)) == (1, "", 1)
    assert lines[0].startswith("adaround-ext quantize: error: ")
    assert re.search(message, lines[0])
    assert sorted(path.name for path in folder.iterdir()) == ["nets_of_the_cli.py"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--seqlen", 12, "--nsamples", 21], "must hold 21 windows of 12 tokens, got 20 (200"),
        (["--seqlen", 21], "--seqlen must be at most the model's 20 positions, got 21"),
        (["--auto-class", "AutoNone"], "--auto-class must be one of AutoModel, "),
        (["--seqlen", 12, "--nsamples", 2, "--skip", "encodr"], "overrides must match modules"),
        (["--seqlen", 12, "--nsamples", 2, "--group-size", 5], "group_size must divide the 16"),
    ],
)
def test_failures_with_text(
    run: Run, bert: Path, text: Path, folder: Path, flags: list[object], message: str
) -> None:
    status, out, err = run("quantize", bert, "--data", text, "--output", "out", *FAST, *flags)
    assert (status, out) == (1, "")
    assert message in err.splitlines()[-1]
    assert not (folder / "out").exists()


def test_directories_that_cannot_be_read(run: Run, bert: Path, text: Path, folder: Path) -> None:
    import transformers

    (folder / "latin.txt").write_bytes(b"caf\xe9 ")
    _, _, err = run("inspect", bert, "--data", "latin.txt", "--seqlen", 12)
    assert "DATA must be UTF-8 text, got latin.txt" in err
    config = transformers.AutoConfig.from_pretrained(bert)
    transformers.BertModel(config).save_pretrained(folder / "bare")
    _, _, err = run("inspect", "bare", "--data", text, "--seqlen", 12)
    assert "MODEL must hold a tokenizer for text, got bare" in err
    path = folder / "bare" / "config.json"
    path.write_text(path.read_text().replace('"BertModel"', '"BertForSinging"'))
    _, _, err = run("inspect", "bare")
    assert "--auto-class must be given for the architecture BertForSinging" in err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--override", "first"], "must be PATTERN=KEY:VALUE[,KEY:VALUE] or PATTERN=skip"),
        (["--override", "first=bits"], "must have KEY:VALUE after =, got 'bits'"),
        (["--override", "first=bits:9"], "--override: first: bits must be from 2 to 8, got 9"),
        (["--override", "first=bit:4"], "--override: first: 'bit' is no setting"),
        (["--override", "first=bias:create"], "must have refit or keep for bias"),
        (["--skip", ""], "must be a pattern of layer names"),
        (["--bits", "9"], "bits must be from 2 to 8, got 9"),
        (["--group-size", "0"], "must be a whole number of at least 1, got '0'"),
        (["--group-size", "8", "--per-tensor"], "not allowed with argument"),
        (["--memory-budget", "much"], "must be a size such as 512M or 2G, got 'much'"),
        (["--preset", "slow"], "invalid choice: 'slow'"),
        (["--outpt", "x"], "unrecognized arguments: --outpt"),
    ],
)
def test_bad_usage(run: Run, folder: Path, flags: list[str], message: str) -> None:
    command = ["quantize", "nets_of_the_cli:net", "--data", "nets_of_the_cli:images"]
    status, out, err = run(*command, "--output", "out", *flags)
    assert (status, out) == (2, "")
    assert message in err
    assert not (folder / "out").exists()


def test_output_is_not_replaced_unasked(run: Run, folder: Path) -> None:
    command = ["quantize", "nets_of_the_cli:Backwards", "--data", "nets_of_the_cli:rows", *FAST]
    out = folder / "out"
    out.mkdir()
    assert run(*command, "--output", out)[0] == 0  # it was empty
    (out / "own.txt").write_text("mine")
    status, _, err = run(*command, "--output", out)
    assert (status, "--output must be empty or new without --overwrite" in err) == (1, True)
    assert (out / "own.txt").exists()
    # A run that fails leaves the old one; one that does not replaces it.
    assert run(*command, "--output", out, "--overwrite", "--skip", "none")[0] == 1
    assert (out / "own.txt").exists()
    assert run(*command, "--output", out, "--overwrite", "--bits", 8)[0] == 0
    assert not (out / "own.txt").exists()
    assert ModelReport.load(out / "report.json").layers[0].config["bits"] == 8
    # What no run wrote is never deleted, nor what is read.
    (out / "report.json").unlink()
    _, _, err = run(*command, "--output", out, "--overwrite")
    assert "must be a directory of an earlier run, with a report.json" in err
    assert "got the file" in run(*command, "--output", out / "report.html", "--overwrite")[2]
    (out / "report.json").touch()
    (out / "data.txt").write_text("a cat")
    kept = ["--output", out, "--overwrite", "--checkpoint-dir", out / "kept"]
    assert "--output must not hold what is read or kept" in run(*command, *kept)[2]
    status, _, err = run(*command, "--output", "other", "--html", "nowhere/page.html")
    assert (status, "--html must be in a directory that exists" in err) == (1, True)
    assert sorted(path.name for path in folder.iterdir()) == ["nets_of_the_cli.py", "out"]


def test_replacing_that_fails_keeps_the_old_output(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "report.json").write_text("old")
    replace, calls = cli_output.os.replace, []

    def fails_once(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(cli_output.os, "replace", fails_once)
    with (
        pytest.raises(OSError, match="disk full"),
        cli_output.staged(output, True, []) as folder,
    ):
        (folder / "report.json").write_text("new")
    assert (output / "report.json").read_text() == "old"
    assert list(tmp_path.iterdir()) == [output]


def test_bad_reports(run: Run, folder: Path) -> None:
    (folder / "bad.json").write_text("{")
    for command in (["inspect", "bad.json"], ["compare", "bad.json", "bad.json"]):
        status, out, err = run(*command)
        assert (status, out, err.count("\n")) == (1, "", 1)
        assert "bad.json must be a file written by ModelReport.save" in err
    status, _, err = run("compare", "none.json", "none.json")
    assert (status, "none.json" in err) == (1, True)


def test_traceback_only_with_debug(run: Run, folder: Path) -> None:
    assert "Traceback" not in run("inspect", "nets_of_the_cli:broken")[2]
    status, _, err = run("inspect", "nets_of_the_cli:broken", "--debug")
    assert (status, "Traceback" in err, 'raise RuntimeError("no weights' in err) == (1, True, True)


def test_interrupt(run: Run, folder: Path) -> None:
    command = ["quantize", "nets_of_the_cli:net", "--data", "nets_of_the_cli:interrupted"]
    status, out, err = run(*command, "--output", "out")
    assert (status, out) == (130, "")
    assert err.endswith("adaround-ext quantize: interrupted\n")
    assert sorted(path.name for path in folder.iterdir()) == ["nets_of_the_cli.py"]


@pytest.mark.parametrize("command", ["quantize", "inspect", "compare", "env"])
def test_help_has_an_example(run: Run, command: str) -> None:
    status, out, _ = run(command, "--help")
    assert (status, f"\n  adaround-ext {command} " in out) == (0, True)


def test_values_of_overrides() -> None:
    pattern, settings = cli_options.override(
        "a.*=group-size:64,scale_dtype:float16,starts:nearest+gptq,beta:20+2.5,refine:False,steps:none"
    )
    assert (pattern, settings) == (
        "a.*",
        {
            "group_size": 64,
            "granularity": "per_group",
            "scale_dtype": torch.float16,
            "starts": ("nearest", "gptq"),
            "beta": (20, 2.5),
            "refine": False,
            "steps": None,
        },
    )
    per_tensor = {"granularity": "per_tensor", "group_size": None}
    assert cli_options.override("b=granularity:per_tensor")[1] == per_tensor
    assert cli_options.override("b=skip") == ("b", "skip")
    sizes = [cli_options.size(text) for text in ("512M", "1.5 GiB", "2kb", "7")]
    assert sizes == [1 << 29, 3 << 29, 2048, 7]
    with pytest.raises(argparse.ArgumentTypeError):
        cli_options.size("-1")
