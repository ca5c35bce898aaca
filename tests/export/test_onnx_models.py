"""ONNX export of models of many kinds: the file gives what the model gives."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from adaround_ext.export.onnx import runners
from tests.support import models
from tests.support.onnx_exports import Many, assert_same, exported, initializers, nodes, rounded

pytestmark = pytest.mark.usefixtures("one_thread")


def sizes(values: Any) -> dict[str, list[Any]]:
    """The shapes of a graph's inputs or outputs, with names for what may change."""
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in values
    }


def many(batch: int, *layers: tuple[nn.Module, tuple[int, ...]]) -> tuple[nn.Module, list[Tensor]]:
    return Many(*(layer for layer, _ in layers)), [torch.randn(batch, *size) for _, size in layers]


def convolutions(batch: int) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(1)
    return many(
        batch,
        (nn.Conv2d(4, 6, (2, 4), padding="same"), (4, 7, 7)),
        (nn.Conv2d(4, 6, (2, 3), padding="same", dilation=(1, 2), groups=2), (4, 7, 7)),
        (nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"), (4, 7, 7)),
        (nn.Conv3d(4, 6, 2, padding=1, stride=2, padding_mode="replicate"), (4, 5, 5, 5)),
        (nn.Conv2d(4, 8, 3, padding="valid", stride=2, groups=4, bias=False), (4, 7, 7)),
        (nn.Conv1d(4, 6, 3), (4, 9)),
        (nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2), (4, 5, 5)),
        (nn.ConvTranspose1d(4, 6, 3, stride=2, dilation=2, bias=False), (4, 5)),
        (nn.ConvTranspose3d(4, 6, 2, stride=2), (4, 3, 3, 3)),
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4},
        {"bits": 3, "symmetric": False, "granularity": "per_tensor"},
        {"bits": 8, "symmetric": False},
    ],
    ids=["4-channel", "3-tensor-asym", "8-channel-asym"],
)
def test_convolutions(tmp_path: Path, settings: dict[str, Any]) -> None:
    model, batch = convolutions(2)
    rounded(model, **settings)
    file = exported(model, batch, tmp_path / "out")
    _, other = convolutions(5)
    assert_same(model, tmp_path / "out", [batch, other])
    axes = [0] * 6 + [1] * 3  # the channels that come out, in each weight's own shape
    if settings.get("granularity") == "per_tensor":
        assert all(not node.attribute for node in nodes(file, "DequantizeLinear"))
    else:
        found = [node.attribute[0].i for node in nodes(file, "DequantizeLinear")]
        assert found[:6] + found[7:] == axes[:6] + axes[7:]  # the grouped one has blocks


def test_groups_of_convolutions(tmp_path: Path) -> None:
    """Groups within a kernel, of whole kernels and of several; 1x1 kernels; transposed ones."""
    groups = [2, 9, 18, 2, 8, 8, 32]
    model, batch = many(
        2,
        (nn.Conv2d(8, 6, 3), (8, 5, 5)),
        (nn.Conv2d(8, 6, 3), (8, 5, 5)),
        (nn.Conv2d(8, 6, 3, groups=2), (8, 5, 5)),
        (nn.Conv2d(8, 6, 1), (8, 5, 5)),
        (nn.Conv1d(8, 6, 4), (8, 9)),
        (nn.ConvTranspose2d(8, 6, 4), (8, 5, 5)),
        (nn.ConvTranspose2d(8, 6, 4), (8, 5, 5)),
    )
    for layer, size in zip(model.layers, groups, strict=True):
        rounded(layer, granularity="per_group", group_size=size, symmetric=False)
    file = exported(model, batch, tmp_path / "out")
    assert_same(model, tmp_path / "out", [batch])
    assert len(nodes(file, "Reshape")) == 4  # none where a kernel is 1x1 or transposed


def test_circular_padding(tmp_path: Path) -> None:
    model = rounded(nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"))
    exported(model, torch.randn(2, 4, 5, 5), tmp_path / "out")
    assert_same(model, tmp_path / "out", [torch.randn(3, 4, 5, 5)])
    assert all(r.name.startswith("onnxruntime") for r in runners(tmp_path / "out", model))
    with pytest.raises(ValueError, match="it has no circular padding"):
        exported(model, torch.randn(2, 4, 5, 5), tmp_path / "openvino", target="openvino")


def test_linears_of_any_rank(tmp_path: Path) -> None:
    layers = [nn.Linear(6, 4, bias=bias) for bias in (True, False) * 2]
    batch = [torch.randn(*size, 6) for size in ((5,), (2, 5), (2, 3, 5), ())]
    model = rounded(Many(*layers), symmetric=False)
    file = exported(model, batch, tmp_path / "out")
    assert_same(model, tmp_path / "out", [batch])
    assert len(nodes(file, "MatMul")) == 4
    assert [len(nodes(file, kind)) for kind in ("Add", "Sum")] == [1, 1]
    assert not nodes(file, "Gemm") + nodes(file, "Transpose")


def test_layers_that_are_used_twice_or_share_a_weight(tmp_path: Path) -> None:
    model = rounded(models.Reused(), symmetric=False)
    file = exported(model, torch.randn(4, 8), tmp_path / "out")
    assert_same(model, tmp_path / "out", [torch.randn(7, 8)])
    codes = [name for name in initializers(file) if name.endswith("weight")]
    assert sorted(codes) == ["again.weight", "first.weight", "last.weight", "left.weight"]
    uses = [node.input[0] for node in nodes(file, "DequantizeLinear")]
    assert sorted(uses) == sorted([*codes, "again.weight", "left.weight"])


class Awkward(nn.Module):
    """An unused input, a nested one, a constant, **kwargs, and outputs of all kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(
        self,
        x: Tensor,
        unused: Tensor,
        state: dict[str, Any],
        scale: int = 2,
        flag: bool | None = None,
        **more: Tensor,
    ) -> dict[str, Any]:
        y = torch.relu(self.a(x) * scale + state["h"][0] + more["extra"])
        return {"y": self.b(y), "twice": [y, y], "x": x, "none": None, "count": scale}


def awkward(batch: int, scale: int = 3) -> dict[str, Any]:
    return {
        "extra": torch.randn(batch, 8),
        "state": {"h": (torch.randn(batch, 8), torch.randn(4))},
        "scale": scale,
        "unused": torch.randn(batch, 2),
        "x": torch.randn(batch, 8),
    }


def test_awkward_arguments_and_outputs(tmp_path: Path) -> None:
    model = rounded(Awkward())
    file = exported(model, awkward(4), tmp_path / "out")
    assert [i.name for i in file.graph.input] == ["x", "unused", "state_h_0", "state_h_1", "extra"]
    assert [o.name for o in file.graph.output] == ["y", "twice_0", "twice_1", "x_out"]
    assert_same(model, tmp_path / "out", [awkward(4), awkward(2)])
    with pytest.raises(ValueError, match=r"was called with {'scale': 3} .*, got {'scale': 2}"):
        assert_same(model, tmp_path / "out", [awkward(4, scale=2)])
    less = {key: value for key, value in awkward(4).items() if key != "state"} | {"state": {}}
    with pytest.raises((KeyError, ValueError)):
        assert_same(model, tmp_path / "out", [less])


class Adding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(8, 8)

    def forward(self, x: Tensor, more: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        y = self.a(x) + more["y"]
        return y, y.argmax(-1)


def test_a_dict_as_last_positional_argument(tmp_path: Path) -> None:
    model = rounded(Adding())
    batch = (torch.randn(4, 8), {"y": torch.randn(4, 8)})
    file = exported(model, batch, tmp_path / "out")
    assert list(sizes(file.graph.input)) == ["x", "more_y"]
    assert list(sizes(file.graph.output)) == ["output_0", "output_1"]
    assert_same(model, tmp_path / "out", [batch, (torch.randn(3, 8), {"y": torch.randn(3, 8)})])


def test_one_tensor_for_two_arguments(tmp_path: Path) -> None:
    model = rounded(Adding())
    x = torch.randn(4, 8)
    exported(model, (x, {"y": x}), tmp_path / "out")
    assert_same(model, tmp_path / "out", [(torch.randn(4, 8), {"y": torch.randn(4, 8)})])


class OwnForward(nn.Linear):
    def forward(self, x: Tensor, extra: None = None) -> Tensor:
        return F.linear(x, self.weight, self.bias)


def test_a_linear_with_its_own_forward(tmp_path: Path) -> None:
    model = rounded(nn.Sequential(OwnForward(8, 8), nn.ReLU(), nn.Linear(8, 3)))
    exported(model, torch.randn(4, 8), tmp_path / "out")
    assert_same(model, tmp_path / "out", [torch.randn(4, 8)])
    with pytest.raises(ValueError, match="0: a Linear with a forward of its own"):
        exported(model, torch.randn(4, 8), tmp_path / "qnn", target="qnn")


def test_hooks_run(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model[1].register_forward_hook(lambda module, args, y: y.relu())
    rounded(model)
    exported(model, torch.randn(4, 8), tmp_path / "out")
    assert_same(model, tmp_path / "out", [torch.randn(4, 8)])


def test_a_branch_on_data(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            y = self.layer(x)
            return torch.cond(x.sum() > 0, lambda y: y + 1, lambda y: y.relu(), (y,))

    model = rounded(Model())
    exported(model, torch.randn(4, 8), tmp_path / "out")
    x = torch.rand(4, 8)
    assert_same(model, tmp_path / "out", [x, -x])


def test_what_torch_cannot_trace(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"torch\.onnx\.export can trace, got .*data-dependent"):
        exported(rounded(models.Experts()), torch.randn(4, 8), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_float16(tmp_path: Path) -> None:
    """Scales that float16 has are stored in it; of others the product is rounded to it."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).half()
    for index, dtype in enumerate((torch.float16, torch.float32)):
        rounded(model, scale_dtype=dtype, symmetric=False)
        file = exported(model, torch.randn(4, 8).half(), tmp_path / str(index))
        assert len(nodes(file, "Cast")) == 2 * index
        # ONNX Runtime sums in float32, PyTorch rounds sums to float16.
        plain = runners(tmp_path / str(index), model)[0]
        assert (plain.exact, "float16" in plain.note) == (False, True)
        x = torch.randn(5, 8).half()
        [y] = plain.run((x,), {})
        want = model(x).detach().double()
        assert (y.dtype, float((y - want).norm() / want.norm()) < 2e-3) == (x.dtype, True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes(tmp_path: Path, dtype: torch.dtype) -> None:
    model = rounded(nn.Sequential(nn.Linear(8, 4)).to(dtype))
    with pytest.raises(ValueError, match=f"0: weights must be float32 or float16, got {dtype}"):
        exported(model, torch.randn(2, 8, dtype=dtype), tmp_path / "out")


def test_sizes_that_may_change(tmp_path: Path) -> None:
    model = rounded(models.Transformer())
    del model.layers[1:]

    def batch(*shape: int) -> tuple[Tensor, Tensor]:
        mask = torch.ones(shape, dtype=torch.long)
        mask[0, -1] = 0
        return models.tokens(*shape), mask

    # As many tokens as samples, which must not be taken for the same size; and single ones.
    for index, shape in enumerate([(8, 8), (1, 6)]):
        file = exported(model, batch(*shape), tmp_path / str(index))
        assert set(sizes(file.graph.input)) == {"ids", "attention_mask"}
        assert sizes(file.graph.input)["ids"] == ["batch", "sequence"]
        assert sizes(file.graph.output)["output_0"] == ["batch", "sequence", 20]
        assert_same(model, tmp_path / str(index), [batch(3, 5), batch(1, 7), batch(8, 8)])


def test_sizes_that_the_model_or_the_caller_fixes(tmp_path: Path) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x).reshape(4, 2, 4)

    model = rounded(Model())
    exported(model, torch.randn(4, 8), tmp_path / "model")
    assert_same(model, tmp_path / "model", [torch.randn(4, 8)])
    model = rounded(nn.Sequential(nn.Linear(8, 4)))
    file = exported(model, torch.randn(2, 3, 8), tmp_path / "none", dynamic_shapes=None)
    assert sizes(file.graph.input) == {"input": [2, 3, 8]}
    shapes = {"input": {1: torch.export.Dim("tokens", min=1, max=64)}}
    file = exported(model, torch.randn(2, 3, 8), tmp_path / "own", dynamic_shapes=shapes)
    assert sizes(file.graph.input) == {"input": [2, "tokens", 8]}
    assert_same(model, tmp_path / "own", [torch.randn(2, 5, 8)])


def test_encoder_of_hugging_face(tmp_path: Path) -> None:
    """Padded batches; outputs are named as the fields of its ModelOutput."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.BertConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        intermediate_size=64, max_position_embeddings=16,
    )  # fmt: skip
    model = rounded(transformers.BertModel(config))
    ids = torch.randint(1, 50, (4, 8))
    padded = {"attention_mask": (torch.arange(8) < torch.tensor([[8], [3], [5], [7]])).long()}
    file = exported(model, ids, tmp_path / "out", kwargs=padded)
    assert list(sizes(file.graph.input)) == ["input_ids", "attention_mask"]
    assert list(sizes(file.graph.output)) == ["last_hidden_state", "pooler_output"]
    batch = {"input_ids": ids, **padded}
    assert_same(model, tmp_path / "out", [batch, {k: v[:3, :5] for k, v in batch.items()}])


def test_decoder_of_hugging_face(tmp_path: Path) -> None:
    """Its cache is no tensor, and left out."""
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=32, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=48, max_position_embeddings=32,
    )  # fmt: skip
    model = rounded(transformers.LlamaForCausalLM(config), symmetric=False)
    file = exported(model, {"input_ids": torch.randint(50, (4, 8))}, tmp_path / "out")
    assert sizes(file.graph.output) == {"logits": ["batch", "sequence", 50]}
    assert_same(model, tmp_path / "out", [{"input_ids": torch.randint(50, (3, 5))}])
