"""Where the command line finds models, and what it looks at before it loads one."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adaround_ext.cli import models as cli_models
from adaround_ext.cli.parser import make_parser
from adaround_ext.replay.cache import MEMORY_BUDGET
from tests.support.cli_fixtures import FAST, Run, save_model

transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.usefixtures("one_thread")
OFFLINE = (
    "We couldn't connect to 'https://huggingface.co' to load the files\nCheck your connection."
)


def ask(monkeypatch: pytest.MonkeyPatch, name: str, folder: Path | None) -> list[str]:
    """A Hub that has ``folder`` under this name, or does not answer; what it was asked for."""
    asked: list[str] = []

    def wrap(kind: Any) -> None:
        load = kind.from_pretrained

        def from_pretrained(given: Any, *args: Any, **settings: Any) -> Any:
            if given == name:
                asked.append(kind.__name__)
                if folder is None:
                    raise OSError(OFFLINE)
                given = folder
            return load(given, *args, **settings)

        monkeypatch.setattr(kind, "from_pretrained", from_pretrained)

    for kind in ("AutoConfig", "AutoModel", "AutoModelForCausalLM", "AutoTokenizer"):
        wrap(getattr(transformers, kind))
    return asked


def test_a_name_that_the_hub_answers_to(
    run: Run, bert: Path, text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask(monkeypatch, "some-org/bert.v1", bert)
    monkeypatch.setattr(transformers.utils, "cached_file", lambda *_: None)
    windows = ["--data", text, "--nsamples", 4, "--seqlen", 12]
    status, _, err = run("quantize", "some-org/bert.v1", *windows, "--output", "out", *FAST)
    assert (status, err) == (0, "")
    assert set(asked) == {"AutoConfig", "AutoModel", "AutoTokenizer"}
    assert {"model.safetensors", "tokenizer.json"} <= {p.name for p in Path("out").iterdir()}
    assert run("inspect", "some-org/bert.v1", "--json")[0] == 0
    # A directory of that name comes first.
    shutil.copytree(bert, folder / "some-org" / "bert.v1")
    asked.clear()
    assert (run("inspect", "some-org/bert.v1", "--json")[0], asked) == (0, [])


@pytest.mark.parametrize("command", ["quantize", "sensitivity", "inspect"])
def test_a_hub_that_does_not_answer(
    command: str, run: Run, text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask(monkeypatch, "org/name", None)
    rest = ["--output", "out"] if command == "quantize" else []
    status, out, err = run(command, "org/name", "--data", text, *rest)
    assert (status, out, err.count("\n"), asked) == (1, "", 1, ["AutoConfig"])
    assert "got 'org/name': download it where there is a network, by hf download org/name " in err
    assert "--local-dir DIR, and give DIR (We couldn't connect to 'https" in err
    assert not Path("out").exists()


def test_weights_that_do_not_come(
    run: Run, bert: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask(monkeypatch, "org/name", bert)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", ask_nobody)
    status, _, err = run("inspect", "org/name")
    assert (status, "hf download org/name" in err) == (1, True)


def ask_nobody(*_: object, **__: object) -> None:
    raise OSError("the connection was lost")


@pytest.mark.parametrize("name", ["bert", "./a/b", "a/b/c", "/no/model", "~/model"])
def test_paths_are_no_names_on_the_hub(
    name: str, run: Run, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transformers.AutoConfig, "from_pretrained", None)
    status, _, err = run("inspect", name)
    assert (status, "MODEL must be a local Hugging Face directory or" in err) == (1, True)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--data", "missing.txt"], "DATA must be a text file or module:loader, got 'missing.txt'"),
        (["--data", "missing:loader"], "DATA must name a module that exists, got missing"),
        (["--data", "nets_of_the_cli:no"], "DATA must name what nets_of_the_cli has, got no"),
        (["--seqlen", 21], "--seqlen must be at most the model's 20 positions, got 21"),
        (["--seqlen", 12, "--nsamples", 99], "DATA must hold 99 windows of 12 tokens"),
        (["--device", "nowhere"], "device must be one of this machine, got 'nowhere'"),
        (["--auto-class", "AutoNone"], "--auto-class must be one of "),
        (["--html", "nowhere/page.html"], "--html must be in a directory that exists"),
        (["--cache-dir", "nowhere"], "--cache-dir must be a directory, got nowhere"),
        (["--checkpoint-dir", "nets_of_the_cli.py"], "--checkpoint-dir must be a directory, got"),
        (["--layer-bits", "none.json"], "--layer-bits must be a file of sensitivity, got none"),
        (["--output", "nets_of_the_cli.py"], "--output must be a directory, got the file"),
    ],
)
def test_looked_at_before_the_model_is_loaded(
    flags: list[object], message: str, run: Run, bert: Path, text: Path, folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(cli_models.NamedModel, "load", ask_nobody)
    status, out, err = run("quantize", bert, "--data", text, "--output", "out", *FAST, *flags)
    assert (status, out) == (1, "")
    assert message in err
    assert not Path("out").exists()


@pytest.mark.parametrize("command", ["inspect", "verify", "export", "sensitivity"])
def test_data_is_looked_at_first_by_all(
    command: str, run: Run, bert: Path, text: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = ["--data", text, "--nsamples", 4, "--seqlen", 12]
    assert run("quantize", bert, *windows, "--output", "out", *FAST)[0] == 0
    assert run("export", "out", "--format", "safetensors")[0] == 0
    monkeypatch.setattr(cli_models.NamedModel, "load", ask_nobody)
    given = {"export": ["out", "--format", "onnx"], "verify": ["out"]}.get(command, [bert])
    status, _, err = run(command, *given, "--data", "missing.txt")
    assert (status, "DATA must be a text file" in err, "connection" in err) == (1, True, False)


@pytest.mark.parametrize(
    ("name", "sizes", "most"),
    [
        ("RobertaModel", {"pad_token_id": 1}, 18),
        ("XLMRobertaModel", {"pad_token_id": 0}, 19),
        ("CamembertModel", {"pad_token_id": 2}, 17),
        ("MPNetModel", {}, 18),
        ("Data2VecTextModel", {"pad_token_id": 1}, 18),
        ("BertModel", {"pad_token_id": 1}, 20),
    ],
)
def test_positions_that_padding_takes(
    name: str, sizes: dict[str, Any], most: int, run: Run, text: Path, folder: Path
) -> None:
    model = save_model(folder / "model", name, max_position_embeddings=20, **sizes)
    command = ["quantize", model, "--data", text, "--nsamples", 4, "--output", "out", *FAST]
    for more in range(1, 21 - most + 1):
        status, _, err = run(*command, "--seqlen", most + more)
        assert status == 1
        assert f"--seqlen must be at most the model's {most} positions" in err
        assert err.endswith(f"got {most + more}\n")
    status, _, err = run(*command, "--seqlen", most)
    assert (status, err) == (0, "")


def test_one_default_of_the_memory_budget() -> None:
    args = make_parser().parse_args(["quantize", "m", "--data", "d", "--output", "o"])
    assert args.memory_budget == MEMORY_BUDGET
    import inspect

    from adaround_ext import quantize_

    assert inspect.signature(quantize_).parameters["memory_budget"].default == MEMORY_BUDGET


def test_group_sizes_in_the_words_of_the_command_line(run: Run, folder: Path) -> None:
    command = ["quantize", "nets_of_the_cli:net", "--data", "nets_of_the_cli:images", *FAST]
    _, _, err = run(*command, "--output", "out", "--group-size", 3)
    hint = "give it another by --group-size, or --override '4=group_size:-1'"
    assert f"group_size must divide the 16 columns of 4, got 3: {hint}" in err
    assert "granularity" not in err
    command += ["--override", "4=group_size:-1"]
    assert run(*command, "--output", "out", "--group-size", 3)[0] == 0


def test_options_that_hints_name(run: Run, folder: Path) -> None:
    command = ["quantize", "nets_of_the_cli:net", "--data", "nets_of_the_cli:images", *FAST]
    grid = ["--scale-dtype", "bfloat16", "--cache-dir", folder, "--memory-budget", 0]
    assert run(*command, "--output", "out", *grid)[0] == 0
    layers = json.loads(Path("out/report.json").read_text())["layers"]
    assert {layer["config"]["scale_dtype"] for layer in layers} == {"bfloat16"}
