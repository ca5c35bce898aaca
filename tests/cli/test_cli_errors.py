"""The command line where something is wrong: one line, nothing lost."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path

import pytest
import torch

from adaround_ext import ModelReport
from adaround_ext.cli import options as cli_options
from adaround_ext.cli import output as cli_output
from tests.support.cli_fixtures import FAST, Run

pytestmark = pytest.mark.usefixtures("one_thread")


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
    replace, calls = os.replace, []

    def fails_once(source: Path, target: Path) -> None:
        calls.append(target)
        if len(calls) == 2:
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fails_once)
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
