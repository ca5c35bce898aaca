"""The command line, in process but for one run."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from adaround_ext import ModelReport, load_quantized, ops, quantize_
from adaround_ext.cli import commands as cli_commands
from adaround_ext.cli.models import load_model
from adaround_ext.cli.sources import text_windows
from adaround_ext.result import QuantizedWeight
from tests.support.cli_fixtures import FAST, WORDS, Run

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
    monkeypatch.setattr("adaround_ext.model.solve_units.solve", None)  # nothing is left to solve
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


def test_inspect_leaves_out_what_quantize_leaves_out(run: Run, folder: Path) -> None:
    """Also a layer that does more than its class, which only a run can tell."""
    (folder / "doing_more.py").write_text(
        "from torch import nn\n"
        "class Doubled(nn.Linear):\n"
        "    def forward(self, x):\n"
        "        return 2 * super().forward(x)\n"
        "def net():\n"
        "    return nn.Sequential(nn.Linear(3, 4), Doubled(4, 2))\n"
    )
    data = ["--data", "nets_of_the_cli:rows"]
    shown = json.loads(run("inspect", "doing_more:net", *data, "--json")[1])
    assert run("quantize", "doing_more:net", *data, "--output", "out", *FAST)[0] == 0
    report = json.loads((folder / "out" / "report.json").read_text())
    assert shown["skipped"] == report["skipped"]
    assert list(shown["skipped"]) == ["1"]


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
