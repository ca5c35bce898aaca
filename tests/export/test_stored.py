"""Our own format against other models and forged files: refused before anything changes."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from adaround_ext import ActivationConfig, load_quantized, save_quantized
from adaround_ext.activations.hooks import quantizers
from adaround_ext.export.manifest import NAME, read_manifest, write_manifest
from adaround_ext.export.packed.stored import FILE, KIND
from tests.support.export_models import quantized, tied

pytestmark = pytest.mark.usefixtures("one_thread")


def wrong_class(model: nn.Module) -> None:
    model.first = nn.Conv1d(16, 16, 1)


def wrong_shape(model: nn.Module) -> None:
    model.last = nn.Linear(16, 8, bias=False)


def wrong_dtype(model: nn.Module) -> None:
    model.double()


def untied(model: nn.Module) -> None:
    model.second.weight = nn.Parameter(model.second.weight.clone())


def tied_otherwise(model: nn.Module) -> None:
    model.second.bias = model.first.bias


def more_bias(model: nn.Module) -> None:
    model.last = nn.Linear(16, 7)


def more_layers(model: nn.Module) -> None:
    model.extra = nn.Linear(2, 2)


def other_constant(model: nn.Module) -> None:
    model.factor += 1


def other_dtype(model: nn.Module) -> None:
    model.factor = model.factor.double()


def other_class(model: nn.Module) -> None:
    class Odd(nn.Embedding):
        pass

    model.embedding.__class__ = Odd


def no_layer(model: nn.Module) -> None:
    del model.last


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (wrong_class, "model must have at 'first' a Linear of shape .*, got a Conv1d"),
        (wrong_shape, r"at 'last' a Linear of shape \[7, 16\] .*, got a Linear of shape \[8, 16\]"),
        (wrong_dtype, "in torch.float32, got a Linear .* in torch.float64"),
        (
            untied,
            "model must share the same parameters .*, got first.weight, second.weight",
        ),
        (tied_otherwise, "got first.bias, second.bias"),
        (more_bias, "model must have no bias at 'last'"),
        (more_layers, "state/extra.bias must be .*, got absent"),
        (
            other_constant,
            "structure and constants of the Tied saved: factor must be torch.float32 "
            r"of shape \[\] with the hash \w+, got torch.float32 of shape \[\] with the hash \w+$",
        ),
        (other_dtype, r"factor must be torch.float32 of shape \[\] .*, got torch.float64 of shape"),
        (other_class, "saved: module embedding must be Embedding, got .*Odd$"),
        (no_layer, "model must have the layer 'last', got none"),
    ],
)
def test_other_models_are_refused(
    change: Callable[[nn.Module], None], message: str, tmp_path: Path
) -> None:
    model, x = tied()
    quantized(model, x)
    save_quantized(model, tmp_path / "saved")
    target, _ = tied()
    change(target)
    before = copy.deepcopy(target)
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path / "saved", target)
    assert list(before.state_dict()) == list(target.state_dict())
    assert all(torch.equal(v, target.state_dict()[k]) for k, v in before.state_dict().items())
    assert not any(hasattr(module, "quantized_weight") for module in target.modules())


def test_bad_arguments(tmp_path: Path) -> None:
    model, x = tied()
    with pytest.raises(ValueError, match="model must hold layers that quantize_ has quantized"):
        save_quantized(model, tmp_path / "saved")
    with pytest.raises(TypeError, match="model must be a torch module, got int"):
        save_quantized(3, tmp_path / "saved")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="model must be a torch module, got dict"):
        load_quantized(tmp_path, {})  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match=r"got none with adaround\.json"):
        load_quantized(tmp_path / "nowhere", model)
    assert list(tmp_path.iterdir()) == []
    quantized(model, x)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="folder must be new or empty"):
        save_quantized(model, tmp_path / "full")
    with torch.no_grad():
        model.last.weight[0, 0] += 1
    with pytest.raises(ValueError, match="got another weight of last than its codes give"):
        save_quantized(model, tmp_path / "saved")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def rewrite(folder: Path, change: Callable[[dict[str, Any], dict[str, Tensor]], None]) -> None:
    """Changes details and tensors, and makes the manifest agree: a file made with intent."""
    details = read_manifest(folder).details
    tensors = safetensors.torch.load_file(folder / FILE)
    change(details, tensors)
    safetensors.torch.save_file(tensors, folder / FILE)
    write_manifest(folder, KIND, details)


def forged(**changes: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda details, tensors: details["layers"]["last"].update(changes)


def tensor(key: str, value: Callable[[Tensor], Tensor]) -> Callable[..., None]:
    return lambda details, tensors: tensors.update({key: value(tensors[key])})


@pytest.mark.parametrize(
    "change",
    [
        forged(bits=9),
        forged(bits=1),
        forged(bits=3),
        forged(bits="4"),
        forged(bits=True),
        forged(symmetric=1),
        forged(scales=[7, 3]),
        forged(scales=[7, 0]),
        forged(scales=[7]),
        forged(scales=[-1, 1]),
        forged(shape=[7, 1 << 62]),
        forged(scale_dtype="int8"),
        forged(names=[]),
        forged(names=["last", "first"]),
        forged(names=["nowhere"]),
        forged(biases=["last"]),
        forged(biases=["first"]),
        forged(more=1),
        tensor("scale/last", torch.zeros_like),
        tensor("scale/last", lambda t: t * torch.nan),
        tensor("scale/last", lambda t: t.double()),
        tensor("codes/last", lambda t: t[:, 1:].contiguous()),
        tensor("codes/last", lambda t: t.to(torch.int8)),
        lambda details, tensors: tensors.pop("codes/last"),
        lambda details, tensors: tensors.update(extra=torch.zeros(1)),
        lambda details, tensors: details.pop("layers"),
        lambda details, tensors: details.update(identities=["first"]),
        lambda details, tensors: details.update(identities=["nowhere"]),
        lambda details, tensors: details.update(quantizers={"x": {"config": {}, "sites": []}}),
        lambda details, tensors: details.update(fingerprint="0"),
        lambda details, tensors: details.update(complete=False),
    ],
)
def test_forged_files_are_refused(change: Callable[..., None], tmp_path: Path) -> None:
    model, x = tied()
    quantized(model, x)
    save_quantized(model, tmp_path / "saved")
    rewrite(tmp_path / "saved", change)
    target, _ = tied()
    before = copy.deepcopy(target.state_dict())
    with pytest.raises(ValueError, match="must"):
        load_quantized(tmp_path / "saved", target)
    assert all(torch.equal(before[key], value) for key, value in target.state_dict().items())
    rewrite(
        tmp_path / "saved", lambda details, tensors: None
    )  # what is refused, is refused for good
    with pytest.raises(ValueError, match="must"):
        load_quantized(tmp_path / "saved", target)


def test_forged_quantizers_are_refused(tmp_path: Path) -> None:
    x = torch.randn(64, 8)
    model = quantized(nn.Sequential(nn.Linear(8, 3)), x, activations=ActivationConfig())
    save_quantized(model, tmp_path / "saved")
    (name,) = quantizers(model)

    def site(**changes: Any) -> Callable[..., None]:
        return lambda details, _: details["quantizers"][name]["sites"][0].update(changes)

    def row(index: int, value: float) -> Callable[..., None]:
        return lambda _, tensors: tensors[f"quantizer/{name}"].__setitem__(index, value)

    original = [(tmp_path / "saved" / file).read_bytes() for file in (NAME, FILE)]
    for change in (
        site(module="nowhere"),
        site(kind="sideways"),
        site(tensors=[]),
        site(tensors=[-1]),
        row(0, float("nan")),
        row(0, 0.0),
        row(1, 300),
        row(3, 127),
        lambda details, _: details["quantizers"][name].update(config={"bits": 99}),
        lambda details, _: details["quantizers"][name].update(config={"other": 1}),
        lambda details, _: details["quantizers"][name].update(sites=[]),
    ):
        for file, content in zip((NAME, FILE), original, strict=True):
            (tmp_path / "saved" / file).write_bytes(content)
        rewrite(tmp_path / "saved", change)
        target = nn.Sequential(nn.Linear(8, 3))
        with pytest.raises(ValueError, match="must"):
            load_quantized(tmp_path / "saved", target)
        assert not quantizers(target)
