"""Exports to torchao: tensors of the same bits, in eager mode, torch.export and torch.compile."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, quantize_
from adaround_ext.activations.hooks import quantizers
from adaround_ext.export.manifest import read_manifest
from adaround_ext.export.parity import verify
from adaround_ext.export.quantized_layers import quantized_layers
from adaround_ext.export.runner import output_tensors
from adaround_ext.export.torchao import export_torchao, runners, to_torchao
from adaround_ext.export.torchao.runner import KIND, PROGRAM, WEIGHTS
from tests.support.export_models import convolutional, quantized, tied

torchao = pytest.importorskip("torchao.quantization", reason="needs torchao")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:IntxUnpackedToInt8Tensor does not implement"),
]
GROUPS = {"granularity": "per_group", "group_size": 8}
SETTINGS = [
    pytest.param({"bits": 4}, id="4"),
    pytest.param({"bits": 2, "granularity": "per_tensor"}, id="2-tensor"),
    pytest.param({"bits": 3, **GROUPS, "symmetric": False}, id="3-groups-asymmetric"),
    pytest.param({"bits": 8, "symmetric": False}, id="8-asymmetric"),
    pytest.param({"bits": 8, **GROUPS}, id="8-groups"),
    pytest.param({"bits": 7, "granularity": "per_tensor", "symmetric": False}, id="7-asymmetric"),
]


def linear(dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    layers = nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8, bias=False)
    return nn.Sequential(*layers).to(dtype), torch.randn(40, 16, dtype=dtype)


def pictures() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3, padding="same", padding_mode="reflect"),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, groups=2, bias=False),
        nn.Flatten(),
        nn.Linear(144, 5),
    )
    return model, torch.randn(10, 8, 8, 8)


def held(model: nn.Module) -> dict[str, Any]:
    found = dict(model.named_parameters(remove_duplicate=False))
    kind = torchao.IntxUnpackedToInt8Tensor
    return {name: weight for name, weight in found.items() if isinstance(weight, kind)}


def same_bits(got: object, want: object) -> bool:
    pairs = zip(output_tensors(got), output_tensors(want), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("make", [linear, tied, pictures])
@torch.no_grad()
def test_the_same_bits(
    make: Callable[[], tuple[nn.Module, Tensor]], settings: dict[str, Any]
) -> None:
    model, x = make()
    if make is pictures and "group_size" in settings:
        settings = settings | {"group_size": 9}
    quantized(model, x, **settings)
    before = copy.deepcopy(model)
    new = to_torchao(model)
    assert same_bits(new(x), model(x))
    tensors = held(new)
    for layer in quantized_layers(model):
        low, high = -(1 << (layer.bits - 1)), (1 << (layer.bits - 1)) - 1
        for name in layer.names:
            tensor = tensors.pop(f"{name}.weight")
            assert tensor.target_dtype == getattr(torch, f"int{layer.bits}")
            assert low <= int(tensor.qdata.min()) <= int(tensor.qdata.max()) <= high
            codes, zero_point = tensor.qdata.int(), tensor.zero_point.int()
            if not layer.symmetric:
                codes, zero_point = codes + high + 1, zero_point + high + 1
            assert torch.equal(codes.view(layer.rows, -1), layer.weight.codes.int())
            assert torch.equal(zero_point.flatten(), layer.weight.zero_point.flatten())
    assert not tensors
    for (key, a), (_, b) in zip(
        model.state_dict().items(), before.state_dict().items(), strict=True
    ):
        assert torch.equal(a, b), key
    assert len(quantized_layers(model)) == len(quantized_layers(before))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("settings", SETTINGS[:4])
@torch.no_grad()
def test_half_precision(dtype: torch.dtype, settings: dict[str, Any]) -> None:
    model, x = linear(dtype)
    new = to_torchao(quantized(model, x, **settings))
    assert len(held(new)) == 2
    assert same_bits(new(x), model(x))


def test_a_copy_of_its_own_that_keeps_tied_weights_tied() -> None:
    model, x = quantized(*tied()), tied()[1]
    new = to_torchao(model)
    assert new.first.weight is new.second.weight
    assert new.training == model.training
    assert not hasattr(new.first, "quantized_weight")
    with torch.no_grad():
        want = model(x)
        new.embedding.weight.zero_()
        new.first.weight.scale.zero_()
        assert same_bits(model(x), want)


def test_torch_compile() -> None:
    model, x = pictures()
    quantized(model, x, bits=4)
    torch.compiler.reset()
    with torch.no_grad():
        got, want = torch.compile(to_torchao(model))(x), model(x)
    assert float((got - want).norm() / want.norm()) <= 1e-5


@pytest.mark.parametrize("make", [linear, tied, pictures])
def test_export(make: Callable[[], tuple[nn.Module, Tensor]], tmp_path: Path) -> None:
    model, x = make()
    group_size = 9 if make is pictures else 8
    quantized(model, x, bits=3, granularity="per_group", group_size=group_size, symmetric=False)
    export_torchao(model, tmp_path / "out", args=x)
    assert {path.name for path in tmp_path.joinpath("out").iterdir()} == {
        "adaround.json", WEIGHTS, PROGRAM,
    }  # fmt: skip
    report = verify(model, [tmp_path / "out"], [x, x[:3]])  # another batch size
    assert report.ok
    assert [run.runner for run in report.runs] == ["load_state_dict", "torch.export"]
    assert all(run.exact and run.relative_error == 0 for run in report.runs)
    for layer in quantized_layers(model):
        assert read_manifest(tmp_path / "out", KIND).details["layers"][layer.name] == {
            "bits": 3, "granularity": "per_group", "symmetric": False, "torchao": True,
        }  # fmt: skip


def test_what_a_user_writes(tmp_path: Path) -> None:
    """In a new process, which knows nothing of adaround_ext."""
    model, x = linear()
    quantized(model, x)
    export_torchao(model, tmp_path / "out", args=x)
    with torch.no_grad():
        torch.save((x[:3], model(x[:3])), tmp_path / "batch")
    script = f"""
import torch, torchao.quantization
x, want = torch.load("batch")
model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.GELU(), torch.nn.Linear(24, 8, False))
state = torch.load("out/{WEIGHTS}", weights_only=True)
model.load_state_dict(state, assign=True)
assert torch.equal(model(x), want)
assert torch.equal(torch.export.load("out/{PROGRAM}").module()(x), want)
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=tmp_path)


def test_a_program_of_keyword_arguments(tmp_path: Path) -> None:
    class Keywords(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor, **kwargs: Any) -> Tensor:
            return self.layer(x) * kwargs["y"] + (kwargs["z"] if kwargs["add"] else 0)

    batch = {name: torch.randn(5, 4) for name in ("z", "y", "x")} | {"add": True}
    model = Keywords().eval()
    quantize_(model, [batch], preset="fast", progress=False)
    export_torchao(model, tmp_path / "out", args=batch)
    smaller = {name: batch[name][:2] for name in ("x", "y", "z")} | {"add": True}
    assert verify(model, [tmp_path / "out"], [batch, smaller]).ok


def test_activation_quantizers_run_on(tmp_path: Path) -> None:
    model, x = linear()
    quantized(model, x, activations=ActivationConfig(bits=4))
    new = to_torchao(model)
    assert len(quantizers(new)) == len(quantizers(model)) > 0
    for quantizer in quantizers(new).values():
        quantizer.enabled = False
    with torch.no_grad():
        assert not same_bits(new(x), model(x))
        assert same_bits(to_torchao(model)(x), model(x))
    export_torchao(model, tmp_path / "out", args=x)
    report = verify(model, [tmp_path / "out"], [x])
    assert report.ok and len(report.runs) == 2


def test_what_it_cannot_hold(tmp_path: Path) -> None:
    model, x = convolutional()
    quantized(model, x)
    with pytest.raises(ValueError, match=r"7: its tensors work in Linear and Conv2d, got ConvTr"):
        to_torchao(model)
    with pytest.raises(ValueError, match="ConvTranspose2d"):
        export_torchao(model, tmp_path / "out", args=x)
    assert not list(tmp_path.iterdir())
    new = to_torchao(model, others="float")
    assert sorted(held(new)) == ["0.weight", "10.weight", "3.weight", "5.weight"]
    with torch.no_grad():
        assert same_bits(new.eval()(x), model(x))
    export_torchao(model, tmp_path / "out", args=x, others="float")
    assert verify(model, [tmp_path / "out"], [x[:5]]).ok
    layers = read_manifest(tmp_path / "out", KIND).details["layers"]
    assert [name for name, layer in layers.items() if not layer["torchao"]] == ["7"]


def test_other_layers_are_refused() -> None:
    model, x = nn.Sequential(nn.Conv1d(4, 4, 3)), torch.randn(8, 4, 9)
    with pytest.raises(ValueError, match="Conv1d"):
        to_torchao(quantized(model, x))
    model = nn.Sequential(nn.Linear(8, 4)).double()
    with pytest.raises(ValueError, match=r"0: its tensors are float32, .* got torch.float64"):
        to_torchao(quantized(model, torch.randn(16, 8).double()))
    model = nn.Sequential(nn.Conv2d(4, 4, 3))
    quantized(model, torch.randn(8, 4, 6, 6), granularity="per_group", group_size=4)
    with pytest.raises(ValueError, match=r"blocks of the weight \[4, 4, 3, 3\], got 4 columns"):
        to_torchao(model)


@pytest.mark.parametrize("group_size", [3, 9, 18, 1])
@torch.no_grad()
def test_groups_of_a_convolution(group_size: int) -> None:
    model, x = nn.Sequential(nn.Conv2d(4, 6, 3)), torch.randn(8, 4, 6, 6)
    quantized(model, x, granularity="per_group", group_size=group_size, symmetric=False)
    assert same_bits(to_torchao(model)(x), model(x))


def test_bad_arguments(tmp_path: Path) -> None:
    model, x = linear()
    with pytest.raises(ValueError, match="got none"):
        to_torchao(model)
    quantized(model, x)
    for call in (to_torchao, lambda model, **kw: export_torchao(model, tmp_path / "out", **kw)):
        with pytest.raises(ValueError, match="others must be 'refuse' or 'float', got 'skip'"):
            call(model, others="skip")
    tmp_path.joinpath("file").touch()
    with pytest.raises(ValueError, match="folder must be new or empty"):
        export_torchao(model, tmp_path)


def test_a_program_that_cannot_be_made_leaves_nothing(tmp_path: Path) -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x) if float(x.sum()) > -1e9 else x

    model = quantized(Picky(), torch.randn(9, 4))
    with pytest.raises(Exception, match="data-dependent"):
        export_torchao(model, tmp_path / "out", args=torch.randn(2, 4))
    assert not list(tmp_path.iterdir())
    export_torchao(model, tmp_path / "out")
    assert [runner.name for runner in runners(tmp_path / "out", model)] == ["load_state_dict"]


def test_damage_is_refused(tmp_path: Path) -> None:
    model, x = linear()
    export_torchao(quantized(model, x), tmp_path / "out")
    path = tmp_path / "out" / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match="another size"):
        runners(tmp_path / "out", model)


def test_without_torchao(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = linear()
    quantized(model, x)
    monkeypatch.setitem(sys.modules, "torchao.quantization", None)
    with pytest.raises(ImportError, match=r'pip install "adaround_ext\[torchao\]"'):
        to_torchao(model)
    with pytest.raises(ImportError, match=r'pip install "adaround_ext\[torchao\]"'):
        export_torchao(model, tmp_path / "out")


class TestTransformers:
    """Directories that from_pretrained loads."""

    transformers = pytest.importorskip("transformers", reason="needs transformers")

    @classmethod
    def llama(cls, tied: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
        config = cls.transformers.LlamaConfig(
            vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, intermediate_size=96, tie_word_embeddings=tied, use_cache=False,
        )  # fmt: skip
        return cls.transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval()

    @staticmethod
    def quantize(model: nn.Module, **settings: Any) -> dict[str, Tensor]:
        batch = {"input_ids": torch.randint(1, 50, (4, 8))}
        quantize_(model, [batch], preset="fast", progress=False, **settings)
        return batch

    @pytest.mark.parametrize(
        ("tied", "dtype", "settings"),
        [
            (False, torch.float32, {"bits": 4}),
            (True, torch.bfloat16, {"bits": 8, "symmetric": False}),
            (
                True,
                torch.float32,
                {
                    "bits": 4, "granularity": "per_group", "group_size": 32,
                    "overrides": {"*.q_proj": "skip", "*.mlp.*": {"bits": 3, "symmetric": False}},
                },
            ),
        ],
    )  # fmt: skip
    def test_from_pretrained(
        self, tied: bool, dtype: torch.dtype, settings: dict[str, Any], tmp_path: Path
    ) -> None:
        model = self.llama(tied, dtype)
        batch = self.quantize(model, **settings)
        before = model.config.to_dict()
        export_torchao(model, tmp_path / "out", args=batch)
        assert model.config.to_dict() == before
        assert not tmp_path.joinpath("out", WEIGHTS).exists()
        loaded = self.transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert set(held(loaded)) == {f"{layer.name}.weight" for layer in quantized_layers(model)}
        with torch.no_grad():
            assert same_bits(loaded.eval()(**batch).logits, model(**batch).logits)
        report = verify(model, [tmp_path / "out"], [batch, {"input_ids": batch["input_ids"][:2]}])
        assert [run.runner for run in report.runs] == ["transformers", "torch.export"]
        assert report.ok

    def test_what_its_config_says(self, tmp_path: Path) -> None:
        model = self.llama(False)
        self.quantize(model, overrides={"lm_head": "skip"})
        export_torchao(model, tmp_path / "out")
        config = json.loads(tmp_path.joinpath("out", "config.json").read_text())
        quantization = config["quantization_config"]
        assert quantization["quant_method"] == "torchao"
        assert quantization["modules_to_not_convert"] == ["lm_head"]
        kind = quantization["quant_type"]["default"]
        assert kind["_type"] == "IntxWeightOnlyConfig"
        assert kind["_data"]["weight_dtype"]["_data"] == "int4"

    def test_a_state_that_its_class_does_not_build(self, tmp_path: Path) -> None:
        model = self.llama(False)
        batch = self.quantize(model, bias="create")
        export_torchao(model, tmp_path / "out")
        assert tmp_path.joinpath("out", WEIGHTS).exists()
        report = verify(model, [tmp_path / "out"], [batch])
        assert report.ok and report.runs[0].runner == "load_state_dict"


def test_trained_encoder(tmp_path: Path) -> None:
    minilm = pytest.importorskip("benchmarks.workloads.minilm")
    try:
        model, tokenizer = minilm.load_encoder()
    except ImportError as error:
        pytest.skip(str(error))
    model.encoder.layer = model.encoder.layer[:1]
    model.config.num_hidden_layers = 1
    batches = minilm.text_batches(tokenizer, sequences=8, length=16, batch_size=4)
    quantize_(model, batches, preset="fast", bits=4, progress=False)
    export_torchao(model, tmp_path / "out", args=batches[0])
    held_out = minilm.text_batches(tokenizer, "held_out", sequences=4, length=32, batch_size=4)
    report = verify(model, [tmp_path / "out"], held_out)
    assert report.ok
    assert [run.runner for run in report.runs] == ["transformers", "torch.export"]
