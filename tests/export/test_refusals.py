"""What exports say where they cannot write, and how to go on where they refuse layers."""

from __future__ import annotations

import errno
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from adaround_ext import export_model, quantize_, verify
from adaround_ext.export.formats import FORMATS
from tests.support.export_models import convolutional, quantized

pytestmark = pytest.mark.usefixtures("one_thread")
PACKAGES = {"onnx": "onnxscript", "aimet": "onnxscript", "compressed-tensors": "compressed_tensors"}


def bert(**sizes: int) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2} | sizes
    config = transformers.BertConfig(vocab_size=64, num_hidden_layers=1, **sizes)
    return transformers.BertModel(config).eval()


def exportable(kind: str) -> tuple[nn.Module, Any]:
    """A model and a batch of it that a format takes."""
    pytest.importorskip(PACKAGES.get(kind, kind))
    model, batch = (
        nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 64)),
        torch.randn(9, 64),
    )
    if kind == "compressed-tensors":
        model, batch = bert(), {"input_ids": torch.randint(64, (2, 8))}
    settings: dict[str, Any] = {"granularity": "per_group", "group_size": 32}
    return quantized(model, batch, bits=4, scale_dtype=torch.float16, **settings), batch


@contextmanager
def small_files(size: int) -> Iterator[None]:
    """The system refuses what goes beyond, as a full disk does."""
    _, most = limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("size", [100, 3000])
@pytest.mark.parametrize("kind", FORMATS)
def test_files_that_cannot_be_written(kind: str, size: int, tmp_path: Path) -> None:
    model, batch = exportable(kind)
    folder = tmp_path / "out"
    with small_files(size), pytest.raises(OSError, match=r"got File too large") as caught:
        export_model(model, folder, kind, batch=batch)
    assert str(folder) in str(caught.value)
    assert caught.value.errno == errno.EFBIG
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("error", "number"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), errno.ENOSPC),
        (safetensors.SafetensorError("No space left on device (os error 28)"), None),
        (OSError("No space left on device"), None),
    ],
    ids=str,
)
def test_the_cause_is_what_the_writer_says(
    error: Exception, number: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> None:
        raise error

    model, _ = exportable("safetensors")
    monkeypatch.setattr(safetensors.torch, "save_file", full)
    message = r"folder must be one that can be written to, .*out, got No space left on device"
    with pytest.raises(OSError, match=message) as caught:
        export_model(model, tmp_path / "out", "safetensors")
    assert caught.value.errno == number
    assert list(tmp_path.iterdir()) == []


def test_other_errors_stay_what_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("something else")

    model, _ = exportable("safetensors")
    monkeypatch.setattr(safetensors.torch, "save_file", broken)
    with pytest.raises(RuntimeError, match=r"^something else$"):
        export_model(model, tmp_path / "out", "safetensors")
    assert list(tmp_path.iterdir()) == []


def way_out(message: str) -> dict[Any, str]:
    """The overrides that a message names, which must name options too unless they are classes."""
    found = re.search(r"by overrides=(\{.*?\})", message)
    assert found is not None, message
    overrides: dict[Any, str] = eval(found[1], {"nn": nn})
    for name in overrides:
        assert not isinstance(name, str) or f"--skip {name}" in message
    return overrides


class Columns(nn.Module):
    """Rows of 48 columns, which blocks of 32 do not divide, beside others."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(64, columns), nn.Linear(columns, 64)
        self.third = nn.Linear(columns, 32, bias=False)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = torch.relu(self.first(x))
        return self.second(x), self.third(x)


@pytest.mark.parametrize("columns", [48, 33, 16])
def test_columns_that_are_no_blocks(columns: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    x, settings = torch.randn(64, 64), {"bits": 4, "scale_dtype": torch.float16}
    model = quantized(Columns(columns), x, **settings)
    message = rf"second, third: its columns must be whole blocks of 32, got {columns}; leave it out"
    with pytest.raises(ValueError, match=message) as caught:
        export_model(model, tmp_path / "out", "gguf")
    overrides = way_out(str(caught.value))
    settings |= {"granularity": "per_group", "group_size": 32, "overrides": overrides}
    model = quantized(Columns(columns), x, **settings)
    export_model(model, tmp_path / "out", "gguf")
    assert verify(model, tmp_path / "out", x).ok


def vit() -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.ViTConfig(**sizes, num_hidden_layers=1, image_size=8, patch_size=4)
    return transformers.ViTModel(config).eval(), {"pixel_values": torch.randn(4, 3, 8, 8)}


def clip() -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2}
    config = transformers.CLIPVisionConfig(
        **sizes, num_hidden_layers=1, image_size=8, patch_size=4, projection_dim=32
    )
    model = transformers.CLIPVisionModelWithProjection(config).eval()
    return model, {"pixel_values": torch.randn(4, 3, 8, 8)}


def whisper() -> tuple[Any, dict[str, Tensor]]:
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.WhisperConfig(
        vocab_size=64, num_mel_bins=8, d_model=32, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=64,
        decoder_ffn_dim=64, max_source_positions=16, max_target_positions=16, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1, use_cache=False,
    )  # fmt: skip
    model = transformers.WhisperForConditionalGeneration(config).eval()
    ids = torch.randint(3, 64, (2, 6))
    return model, {"input_features": torch.randn(2, 8, 32), "decoder_input_ids": ids}


@pytest.mark.parametrize(
    ("make", "names"),
    [
        (vit, ["embeddings.patch_embeddings.projection"]),
        (clip, ["vision_model.embeddings.patch_embedding"]),
        (whisper, ["model.encoder.conv1", "model.encoder.conv2"]),
    ],
)
def test_convolutions_in_compressed_tensors(make: Any, names: list[str], tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    model, batch = make()
    settings: dict[str, Any] = {"bits": 4, "preset": "fast", "progress": False}
    quantize_(model, [batch], **settings)
    with pytest.raises(
        ValueError, match=r"it must be a Linear, got Conv\dd; leave it out"
    ) as caught:
        export_model(model, tmp_path / "out", "compressed-tensors")
    overrides = way_out(str(caught.value))
    assert list(overrides) == names
    model, _ = make()
    quantize_(model, [batch], overrides=overrides, **settings)
    export_model(model, tmp_path / "out", "compressed-tensors")
    assert verify(model, tmp_path / "out", [batch]).ok


def test_many_layers_by_their_class(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    layers = [nn.Conv1d(4, 4, 1) for _ in range(9)]
    x = torch.randn(8, 4, 32)
    net = nn.Sequential(*layers, nn.Linear(32, 4))
    model = quantized(net, x, bits=4, scale_dtype=torch.float16)
    with pytest.raises(ValueError, match="got Conv1d; leave it out") as caught:
        export_model(model, tmp_path / "out", "gguf")
    assert way_out(str(caught.value)) == {nn.Conv1d: "skip"}


def test_transposed_convolutions_in_torchao(tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    model, x = convolutional()
    with pytest.raises(ValueError, match="got ConvTranspose2d; leave it out") as caught:
        export_model(quantized(model, x), tmp_path / "out", "torchao")
    assert way_out(str(caught.value)) == {"7": "skip"}
