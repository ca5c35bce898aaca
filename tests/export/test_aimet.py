"""Exports for AIMET: encodings by AIMET's own rules, and the model that they are for."""

from __future__ import annotations

import copy
import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, quantize_
from adaround_ext.activations.hooks import quantizers
from adaround_ext.export.aimet import export_aimet, runners
from adaround_ext.export.aimet.runner import ENCODINGS, KIND, MODEL
from adaround_ext.export.manifest import read_manifest, write_manifest
from adaround_ext.export.parity import ParityReport, verify
from adaround_ext.export.quantized_layers import quantized_layers
from tests.support.export_models import convolutional, quantized, tied
from tests.support.models import Net, Transformer

np = pytest.importorskip("numpy")
onnx = pytest.importorskip("onnx", reason="needs onnx")
numpy_helper = pytest.importorskip("onnx.numpy_helper")
pytest.importorskip("onnxscript", reason="needs onnxscript")
pytest.importorskip("onnxruntime", reason="needs onnxruntime")
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
]
# The axes that aimet_onnx.quantsim.QuantizationSimModel._get_quantization_axes has.
AXES = {"Conv": (0, 1), "ConvTranspose": (1, 0), "MatMul": (-1, -2)}
GROUPS = {"granularity": "per_group", "group_size": 8}
# Every width, kind and granularity once, and each kind of granularity in both versions.
CASES = [
    pytest.param({"bits": 4}, "1.0.0", id="4"),
    pytest.param({"bits": 3, "symmetric": False}, "2.0.0", id="3-asymmetric"),
    pytest.param(
        {"bits": 8, "symmetric": False, "granularity": "per_tensor"}, "1.0.0", id="8-tensor"
    ),
    pytest.param({"bits": 5, "granularity": "per_tensor"}, "2.0.0", id="5-tensor"),
]
GROUPED = [
    pytest.param({"bits": 4, **GROUPS, "symmetric": False}, "1.0.0", id="4-groups-asymmetric"),
    pytest.param({"bits": 2, **GROUPS}, "2.0.0", id="2-groups"),
]


def linear() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8)), torch.randn(40, 16)


def read(folder: Path) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """The graph, its initializers as arrays, and the encodings."""
    graph = onnx.load(folder / MODEL).graph
    arrays = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return graph, arrays, json.loads((folder / ENCODINGS).read_text())


def by_aimet(entry: dict[str, Any], operator: str, x: Any) -> Any:
    """Quantizes and dequantizes as aimet_onnx/_encoding.py says: (clamp(x/s - o) + o) s."""
    channel, block = (axis % x.ndim for axis in AXES[operator])
    full = [1] * x.ndim
    full[channel] = x.shape[channel]
    if "bw" in entry:  # 1.0.0: offsets of unsigned codes; blocks of a matrix by outputs
        scale, offset = np.array(entry["scale"]), np.array(entry["offset"])
        low, high = 0, 2 ** entry["bw"] - 1
        kind = entry["enc_type"]
    else:
        scale = np.array(entry["y_scale"])
        offset = -np.array(entry.get("y_zero_point", np.zeros(scale.shape)), np.float64)
        sign, bits = entry["output_dtype"].split("int")
        low, high = (
            (0, 2 ** int(bits) - 1) if sign else (-(2 ** int(bits) // 2), 2 ** int(bits) // 2 - 1)
        )
        kind = "PER_BLOCK" if "block_size" in entry else "PER_CHANNEL" if "axis" in entry else ""
        if kind:
            assert entry["axis"] == (block if kind == "PER_BLOCK" else channel)
    if kind == "PER_BLOCK":
        size = entry["block_size"]
        full[block] = x.shape[block] // size
        if "bw" in entry and (x.ndim, channel) == (2, 1):
            scale, offset = (t.reshape(full[::-1]).T for t in (scale, offset))
        if "bw" not in entry:
            assert list(scale.shape) == full
        scale, offset = (t.reshape(full).repeat(size, block) for t in (scale, offset))
    elif kind == "PER_CHANNEL":
        scale, offset = scale.reshape(full), offset.reshape(full)
    else:
        assert scale.size == 1
    codes = np.clip(np.round(x / scale - offset), low, high)
    return ((codes + offset) * scale).astype(np.float32)


def check(model: nn.Module, folder: Path, version: str) -> None:
    """Entries are of weights that their operators read, and have the simulated weights' grids."""
    graph, arrays, content = read(folder)
    assert content["version"] == version
    entries = content["param_encodings" if version == "1.0.0" else "encodings"]
    named = {entry["name"]: entry for entry in entries}
    layers = {f"{layer.name}.weight": layer for layer in quantized_layers(model)}
    assert named.keys() == layers.keys() and len(named) == len(entries)
    drawn = np.random.default_rng(0)
    for name, layer in layers.items():
        entry, weight = named[name], layer.matrix.weight.numpy()
        readers = {node.op_type for node in graph.node if name in node.input}
        places = {list(node.input).index(name) for node in graph.node if name in node.input}
        assert len(readers) == 1 and places == {1}
        operator = readers.pop()
        if operator == "MatMul":
            weight = weight.T
        assert np.array_equal(arrays[name], weight)
        if version == "1.0.0":
            assert (entry["dtype"], entry["bw"]) == ("INT", layer.bits)
            assert entry["is_sym"] is layer.symmetric
        else:
            assert entry["output_dtype"] == f"{'' if layer.symmetric else 'u'}int{layer.bits}"
        assert np.allclose(by_aimet(entry, operator, weight), weight, rtol=3e-7, atol=0)
        noise = drawn.uniform(-0.4, 0.4, weight.shape) * float(layer.weight.scale.min())
        back = by_aimet(entry, operator, weight + noise)
        assert np.allclose(back, weight, rtol=3e-7, atol=0)


def exported(model: nn.Module, batch: Any, folder: Path, **settings: Any) -> ParityReport:
    export_aimet(model, batch, folder, **settings)
    report = verify(model, [folder], [batch])
    assert [run.runner for run in report.runs] == ["onnxruntime with AIMET encodings"]
    return report


@pytest.mark.parametrize(("settings", "version"), [*CASES[:1], *GROUPED])
def test_linear_layers(settings: dict[str, Any], version: str, tmp_path: Path) -> None:
    model, x = linear()
    quantized(model, x, **settings)
    before = copy.deepcopy(model).state_dict()
    report = exported(model, x, tmp_path / "out", version=version)
    assert report.runs[0].exact and report.ok
    check(model, tmp_path / "out", version)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[key]), key


def test_a_shared_weight_is_one_initializer(tmp_path: Path) -> None:
    model, x = tied()
    quantized(model, x, **GROUPS)
    assert exported(model, x, tmp_path / "out").ok
    check(model, tmp_path / "out", "1.0.0")
    _, arrays, _ = read(tmp_path / "out")
    assert "first.weight" in arrays and "second.weight" not in arrays


@pytest.mark.parametrize(("settings", "version"), CASES)
def test_convolutions(settings: dict[str, Any], version: str, tmp_path: Path) -> None:
    model, x = convolutional()
    quantized(model, x, **settings)
    report = exported(model, x, tmp_path / "out", version=version)
    assert report.runs[0].exact and report.ok
    check(model, tmp_path / "out", version)
    assert verify(model, [tmp_path / "out"], [x[:3]]).ok  # another batch size


@pytest.mark.parametrize("version", ["1.0.0", "2.0.0"])
@pytest.mark.parametrize("dims", [1, 2])
def test_groups_of_convolutions(dims: int, version: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    conv, transposed = (
        (nn.Conv1d, nn.ConvTranspose1d) if dims == 1 else (nn.Conv2d, nn.ConvTranspose2d)
    )
    model = nn.Sequential(conv(8, 6, 3), conv(6, 4, 1), transposed(4, 6, 3))
    sizes = {"0": 4 * 3**dims, "1": 2, "2": 2 * 3**dims}
    overrides = {name: {"group_size": size} for name, size in sizes.items()}
    x = torch.randn(8, 8, *[5] * dims)
    settings = {"granularity": "per_group", "group_size": 2, "symmetric": dims == 1}
    quantized(model, x, overrides=overrides, **settings)
    assert exported(model, x, tmp_path / "out", version=version).ok
    check(model, tmp_path / "out", version)


def test_the_entries_of_known_numbers(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[0].weight.data = torch.tensor([[-2.0, 1.75], [0.5, -1.0]])
    model[1].weight.data = torch.tensor([[0.0, 3.75], [-1.0, 6.5]])
    scale = {"0": torch.tensor([0.25, 0.125]), "1": torch.tensor([0.25, 0.5])}
    overrides = {
        name: {"scale": values, "symmetric": name == "0"} for name, values in scale.items()
    }
    quantize_(
        model, torch.eye(2), preset="fast", bits=4, bias="keep", progress=False,
        overrides=overrides,
    )  # fmt: skip
    export_aimet(model, torch.eye(2), tmp_path / "1")
    assert read(tmp_path / "1")[2]["param_encodings"] == [
        {
            "name": "0.weight", "dtype": "INT", "bw": 4, "is_sym": True, "enc_type": "PER_CHANNEL",
            "scale": [0.25, 0.125], "offset": [-8.0, -8.0],
        },
        {
            "name": "1.weight", "dtype": "INT", "bw": 4, "is_sym": False, "enc_type": "PER_CHANNEL",
            "scale": [0.25, 0.5], "offset": [0.0, -2.0],
        },
    ]  # fmt: skip
    export_aimet(model, torch.eye(2), tmp_path / "2", version="2.0.0")
    assert read(tmp_path / "2")[2]["encodings"] == [
        {"name": "0.weight", "output_dtype": "int4", "y_scale": [0.25, 0.125], "axis": 1},
        {
            "name": "1.weight", "output_dtype": "uint4", "y_scale": [0.25, 0.5],
            "y_zero_point": [0, 2], "axis": 1,
        },
    ]  # fmt: skip


def test_other_layers_and_biases_have_no_entries(tmp_path: Path) -> None:
    model, x = convolutional()
    quantized(model, x, overrides={"3": "skip"})
    assert exported(model, x, tmp_path / "out").ok
    _, arrays, content = read(tmp_path / "out")
    names = [entry["name"] for entry in content["param_encodings"]]
    assert names == ["0.weight", "5.weight", "7.weight", "10.weight"]
    assert content["activation_encodings"] == []
    assert {"3.weight", "3.bias", "10.bias"} <= arrays.keys()


def branching(after: Callable[[Any, Tensor], Any]) -> nn.Module:
    torch.manual_seed(4)
    children = {"a": nn.Linear(8, 8), "b": nn.Linear(8, 4), "c": nn.Linear(4, 2)}
    return Net(lambda net, x: after(net, torch.tanh(net.a(x))), **children)


# What a quantized tensor is read by beside the layer, and so whether there is a tensor for it.
BRANCHES = {
    "alone": (lambda net, h: net.b(h), 0),
    "another": (lambda net, h: torch.cat([net.b(h), torch.sin(h)], -1), 1),
    "output": (lambda net, h: (net.b(h), h), 1),
    "views": (lambda net, h: net.b(h) + net.c(h.view(-1, 2, 4)).flatten(1), 1),
    "twice": (lambda net, h: net.b(h) + net.b(net.a(h)), 0),
}


@pytest.mark.parametrize("name", BRANCHES)
def test_activations(name: str, tmp_path: Path) -> None:
    after, identities = BRANCHES[name]
    model = branching(after)
    x = torch.randn(8, 8)
    quantized(model, x, activations=ActivationConfig(bits=8))
    report = exported(model, x, tmp_path / "out")
    assert report.ok and report.runs[0].relative_error <= 1e-5
    assert not report.runs[0].exact and "threshold" in report.runs[0].note
    graph, _, content = read(tmp_path / "out")
    assert sum(node.op_type == "Identity" for node in graph.node) == identities
    tensors = {value.name for value in graph.input}
    tensors |= {output for node in graph.node for output in node.output}
    found = quantizers(model)
    details = read_manifest(tmp_path / "out", KIND).details["activations"]
    assert {entry["name"] for entry in content["activation_encodings"]} == details.keys() <= tensors
    assert set(details.values()) == found.keys()
    for entry in content["activation_encodings"]:
        quantizer = found[details[entry["name"]]]
        assert entry["scale"] == [float(quantizer.scale)]
        assert entry["offset"] == [-float(quantizer.zero_point)]
        assert (entry["bw"], entry["is_sym"], entry["enc_type"]) == (8, False, "PER_TENSOR")
    # Without them the file computes something else: the places matter.
    entries, content["activation_encodings"] = content["activation_encodings"], []
    (tmp_path / "out" / ENCODINGS).write_text(json.dumps(content))
    write_manifest(tmp_path / "out", KIND, {})
    without = verify(model, [tmp_path / "out"], [x]).runs[0]
    assert entries and without.exact and without.relative_error > 1e-4


@pytest.mark.parametrize(
    "config", [ActivationConfig(bits=8, symmetric=True), ActivationConfig(bits=5)]
)
def test_activations_of_a_transformer(config: ActivationConfig, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model, ids = Transformer(), torch.randint(0, 20, (4, 6))
    quantized(model, ids, activations=config)
    report = exported(model, ids, tmp_path / "out")
    assert report.runs[0].relative_error <= 1e-5
    with pytest.raises(ValueError, match=r"version must be '1.0.0' for quantized activations"):
        export_aimet(model, ids, tmp_path / "other", version="2.0.0")


def test_disabled_quantizers_have_no_entries(tmp_path: Path) -> None:
    model, x = linear()
    quantized(model, x, activations=ActivationConfig(bits=4))
    for quantizer in quantizers(model).values():
        quantizer.enabled = False
    report = exported(model, x, tmp_path / "out", version="2.0.0")
    assert report.runs[0].exact and report.ok


def test_arguments_by_keyword(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Transformer()
    batch = {
        "attention_mask": torch.ones(4, 6, dtype=torch.int64),
        "ids": torch.randint(0, 20, (4, 6)),
    }
    batch["attention_mask"][:, 4:] = 0
    quantize_(model.eval(), [batch], preset="fast", progress=False)
    assert exported(model, batch, tmp_path / "out").ok
    graph, _, _ = read(tmp_path / "out")
    assert [value.name for value in graph.input] == ["ids", "attention_mask"]
    shorter = {name: x[:2, :5] for name, x in batch.items()}
    assert verify(model, [tmp_path / "out"], [shorter]).ok
    with pytest.raises(ValueError, match="takes the tensors attention_mask, ids, got ids"):
        verify(model, [tmp_path / "out"], [batch["ids"]])


class OwnForward(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return input @ self.weight.t() + self.bias


def test_what_it_cannot_hold(tmp_path: Path) -> None:
    x = torch.randn(8, 4, 6, 6)
    model = quantized(nn.Sequential(nn.Conv2d(4, 4, 3)), x, granularity="per_group", group_size=4)
    with pytest.raises(ValueError, match=r"0: AIMET has scales along output channels and blocks"):
        export_aimet(model, x, tmp_path / "out")
    x = torch.randn(8, 4)
    model = quantized(nn.Sequential(nn.Linear(4, 4)).bfloat16(), x.bfloat16())
    with pytest.raises(ValueError, match=r"0: AIMET computes in float32, got .* torch.bfloat16"):
        export_aimet(model, x.bfloat16(), tmp_path / "out")
    model = quantized(nn.Sequential(OwnForward(4, 4)), x)
    with pytest.raises(ValueError, match="0: a Linear with a forward of its own"):
        export_aimet(model, x, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_bad_arguments(tmp_path: Path) -> None:
    model, x = linear()
    with pytest.raises(ValueError, match="got none"):
        export_aimet(model, x, tmp_path / "out")
    quantized(model, x)
    with pytest.raises(ValueError, match=r"version must be '1.0.0' or '2.0.0', got '0.6.1'"):
        export_aimet(model, x, tmp_path / "out", version="0.6.1")
    with pytest.raises(TypeError, match="args must fit the model's forward"):
        export_aimet(model, {"other": x}, tmp_path / "out")
    with pytest.raises(ValueError, match=r"args must be what the model takes, got RuntimeError"):
        export_aimet(model, x[:, :3], tmp_path / "out")
    assert not list(tmp_path.iterdir())
    tmp_path.joinpath("file").touch()
    with pytest.raises(ValueError, match="folder must be new or empty"):
        export_aimet(model, x, tmp_path)


def test_a_layer_that_the_batch_does_not_reach(tmp_path: Path) -> None:
    model = branching(lambda net, h: net.b(h))
    model.run = lambda net, x: net.c(net.b(net.a(x)))
    x = torch.randn(16, 8)
    quantized(model, x)
    model.run = lambda net, x: net.b(net.a(x))
    with pytest.raises(ValueError, match="lead through every quantized layer, got none for c"):
        export_aimet(model, x, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert "forward" not in model.__dict__ and "forward" not in model.a.__dict__


def test_damage_is_refused(tmp_path: Path) -> None:
    model, x = linear()
    export_aimet(quantized(model, x), x, tmp_path / "out")
    path = tmp_path / "out" / ENCODINGS
    content = json.loads(path.read_text())
    path.write_text(path.read_text() + " ")
    with pytest.raises(ValueError, match="another size"):
        runners(tmp_path / "out", model)
    content["param_encodings"][0]["scale"][0] *= 1.5
    path.write_text(json.dumps(content))
    write_manifest(tmp_path / "out", KIND, {})
    with pytest.raises(ValueError, match=r"0.weight must be on the grid of its encoding"):
        runners(tmp_path / "out", model)
    content["param_encodings"][0]["name"] = "no.weight"
    path.write_text(json.dumps(content))
    write_manifest(tmp_path / "out", KIND, {})
    with pytest.raises(ValueError, match=r"must have the tensor no.weight, got none"):
        runners(tmp_path / "out", model)


def test_without_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model, x = linear()
    export_aimet(quantized(model, x), x, tmp_path / "out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r'onnx: pip install "adaround_ext\[export\]"'):
        export_aimet(model, x, tmp_path / "other")
    with pytest.raises(ImportError, match=r'pip install "adaround_ext\[export\]"'):
        runners(tmp_path / "out", model)


def test_trained_encoder(tmp_path: Path) -> None:
    minilm = pytest.importorskip("benchmarks.workloads.minilm")
    try:
        model, tokenizer = minilm.load_encoder()
    except ImportError as error:
        pytest.skip(str(error))
    model.encoder.layer = model.encoder.layer[:1]
    batches = minilm.text_batches(tokenizer, sequences=8, length=16, batch_size=4)
    quantize_(model, batches, preset="fast", bits=4, progress=False)
    export_aimet(model, batches[0], tmp_path / "out")
    _, arrays, content = read(tmp_path / "out")
    name = "encoder.layer.0.attention.self.query.weight"
    assert name in {entry["name"] for entry in content["param_encodings"]}
    assert np.array_equal(arrays[name].T, model.get_parameter(name).detach().numpy())
    held_out = minilm.text_batches(tokenizer, "held_out", sequences=4, length=32, batch_size=4)
    assert verify(model, [tmp_path / "out"], held_out).ok
