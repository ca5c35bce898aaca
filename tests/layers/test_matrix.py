"""Every layer in matrix form against the layer itself."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from adaround_ext.layers import matrix as matrix_module
from adaround_ext.layers.matrix import MatrixLayer, matrix_layer
from adaround_ext.linalg.tiles import TileSize

# name: (layer type, its positional arguments, its keyword arguments, input shape)
CASES = {
    "linear": (nn.Linear, (5, 3), {}, (7, 5)),
    "linear-3d": (nn.Linear, (5, 3), {"bias": False}, (2, 4, 5)),
    "linear-1d": (nn.Linear, (5, 3), {}, (5,)),
    "conv1d": (nn.Conv1d, (4, 6, 3), {}, (2, 4, 9)),
    "conv1d-unbatched": (nn.Conv1d, (4, 6, 3), {"padding": 1}, (4, 9)),
    "conv1d-circular": (
        nn.Conv1d,
        (2, 3, 4),
        {"padding": 3, "padding_mode": "circular"},
        (2, 2, 6),
    ),
    "conv1d-same-even": (nn.Conv1d, (2, 3, 4), {"padding": "same"}, (2, 2, 6)),
    "conv2d": (nn.Conv2d, (3, 4, 3), {"padding": 1}, (2, 3, 5, 6)),
    "conv2d-no-bias": (nn.Conv2d, (3, 4, 3), {"bias": False}, (2, 3, 5, 6)),
    "conv2d-valid": (nn.Conv2d, (3, 4, (2, 3)), {"padding": "valid", "stride": 2}, (2, 3, 5, 6)),
    "conv2d-1x1": (nn.Conv2d, (3, 4, 1), {}, (2, 3, 5, 6)),
    "conv2d-1x1-stride": (nn.Conv2d, (3, 4, 1), {"stride": (2, 3)}, (2, 3, 5, 6)),
    "conv2d-uneven": (
        nn.Conv2d,
        (3, 4, (3, 2)),
        {"stride": (1, 2), "padding": (2, 1), "dilation": (2, 3)},
        (2, 3, 6, 7),
    ),
    "conv2d-same-dilated": (
        nn.Conv2d,
        (3, 4, (2, 3)),
        {"padding": "same", "dilation": (3, 2), "padding_mode": "reflect"},
        (2, 3, 6, 7),
    ),
    "conv2d-reflect": (
        nn.Conv2d,
        (3, 4, 3),
        {"padding": (1, 2), "padding_mode": "reflect"},
        (2, 3, 5, 6),
    ),
    "conv2d-replicate": (
        nn.Conv2d,
        (3, 4, 3),
        {"padding": 2, "padding_mode": "replicate", "stride": 2},
        (2, 3, 5, 6),
    ),
    "conv2d-circular": (
        nn.Conv2d,
        (4, 4, 3),
        {"padding": (2, 1), "padding_mode": "circular", "groups": 2},
        (2, 4, 5, 6),
    ),
    "conv2d-groups": (nn.Conv2d, (4, 6, 3), {"groups": 2, "padding": 1}, (2, 4, 5, 6)),
    "conv2d-depthwise": (nn.Conv2d, (4, 8, 3), {"groups": 4, "stride": 2}, (2, 4, 5, 6)),
    "conv2d-unbatched": (nn.Conv2d, (3, 4, 3), {"stride": 2}, (3, 5, 6)),
    "conv3d": (nn.Conv3d, (2, 3, (2, 3, 1)), {"padding": (0, 1, 2)}, (2, 2, 3, 4, 3)),
    "conv3d-dilated": (nn.Conv3d, (2, 3, 2), {"dilation": (1, 2, 1)}, (2, 2, 3, 4, 3)),
    "conv3d-replicate": (
        nn.Conv3d,
        (2, 4, 2),
        {"padding": 1, "padding_mode": "replicate", "groups": 2, "stride": (1, 2, 1)},
        (1, 2, 3, 4, 3),
    ),
    "transposed1d": (nn.ConvTranspose1d, (4, 6, 3), {}, (2, 4, 5)),
    "transposed1d-padding-over-kernel": (
        nn.ConvTranspose1d,
        (2, 3, 2),
        {"padding": 3, "stride": 3},
        (2, 2, 5),
    ),
    "transposed1d-unbatched": (nn.ConvTranspose1d, (4, 6, 3), {"groups": 2}, (4, 5)),
    # The crop is longer than the input, and what is left are zeros.
    "transposed1d-only-zeros": (
        nn.ConvTranspose1d,
        (2, 3, 1),
        {"padding": 2, "output_padding": 4, "dilation": 5},
        (2, 2, 1),
    ),
    "transposed2d": (nn.ConvTranspose2d, (4, 3, 3), {"padding": 1}, (2, 4, 3, 4)),
    "transposed2d-1x1": (nn.ConvTranspose2d, (4, 3, 1), {"bias": False}, (2, 4, 3, 4)),
    "transposed2d-stride": (
        nn.ConvTranspose2d,
        (4, 3, (4, 2)),
        {"stride": (2, 3), "padding": (1, 0), "output_padding": (1, 2)},
        (2, 4, 3, 4),
    ),
    "transposed2d-dilation": (
        nn.ConvTranspose2d,
        (4, 3, (2, 3)),
        {"stride": (1, 2), "dilation": (3, 2), "output_padding": (2, 1)},
        (2, 4, 3, 4),
    ),
    "transposed2d-groups": (
        nn.ConvTranspose2d,
        (4, 6, 3),
        {"stride": 2, "groups": 2, "padding": 1, "output_padding": 1},
        (2, 4, 3, 4),
    ),
    "transposed2d-depthwise": (
        nn.ConvTranspose2d,
        (4, 8, 3),
        {"stride": 2, "groups": 4},
        (2, 4, 3, 4),
    ),
    "transposed3d": (
        nn.ConvTranspose3d,
        (2, 4, (2, 1, 3)),
        {"stride": (2, 1, 2), "groups": 2, "output_padding": (1, 0, 1)},
        (1, 2, 2, 3, 2),
    ),
}
# PyTorch says that it pads more on one side then, which is what is tested.
pytestmark = [
    pytest.mark.on_a_device,
    pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel"),
]

CONV = "conv2d-uneven"  # for what does not differ from one convolution to the next


def make(name: str, device: torch.device) -> tuple[nn.Module, MatrixLayer, Tensor]:
    """(layer, its matrix form, inputs) of a case, in float64."""
    kind, args, options, shape = CASES[name]
    generator = torch.Generator().manual_seed(0)
    layer = kind(*args, **options, dtype=torch.float64)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    x = torch.randn(shape, generator=generator, dtype=torch.float64).to(device)
    layer = layer.to(device)
    return layer, matrix_layer(layer), x


def by_position(form: MatrixLayer, y: Tensor) -> Tensor:
    """An output of the layer as [groups, rows / groups, positions]."""
    return form.output_samples(y).transpose(0, 1).reshape(form.groups, form.rows // form.groups, -1)


def grouped_weight(form: MatrixLayer) -> Tensor:
    return form.weight_matrix().view(form.groups, form.rows // form.groups, form.cols)


def joined(chunks: list[tuple[Tensor, Tensor | None]]) -> tuple[Tensor, Tensor]:
    patches = torch.cat([patches for patches, _ in chunks], dim=-1)
    return patches, torch.cat([outputs for _, outputs in chunks], dim=-1)


@pytest.mark.parametrize("name", CASES)
def test_weight_times_patches_is_the_output(name: str, device: torch.device) -> None:
    layer, form, x = make(name, device)
    y = layer(x)
    without_bias = form.forward(x, layer.weight, None)

    patches, outputs = joined(list(form.patches(form.samples(x), form.output_samples(y))))

    assert patches.shape[:2] == (form.groups, form.cols)
    torch.testing.assert_close(grouped_weight(form) @ patches, by_position(form, without_bias))
    assert torch.equal(outputs, by_position(form, y))
    if layer.bias is not None:
        bias = layer.bias.view(form.groups, -1, 1)
        torch.testing.assert_close(grouped_weight(form) @ patches + bias, outputs)


@pytest.mark.parametrize("name", CASES)
def test_forward_is_the_layer(name: str, device: torch.device) -> None:
    layer, form, x = make(name, device)
    torch.testing.assert_close(form.forward(x, layer.weight, layer.bias), layer(x))


@pytest.mark.parametrize("name", CASES)
def test_weight_matrix_and_back(name: str, device: torch.device) -> None:
    layer, form, _ = make(name, device)
    matrix = form.weight_matrix()
    assert matrix.shape == (form.rows, form.cols)
    assert matrix.is_contiguous() and not matrix.requires_grad
    assert torch.equal(form.weight_from_matrix(matrix), layer.weight)
    matrix.zero_()
    assert layer.weight.count_nonzero() == layer.weight.numel()


@pytest.mark.parametrize("most", [1, 60, 400, 1500])
@pytest.mark.parametrize("name", CASES)
def test_chunks_are_bounded_and_in_order(
    name: str, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, form, x = make(name, device)
    x, y = form.samples(x), form.output_samples(layer(x))
    whole = joined(list(form.patches(x, y)))
    monkeypatch.setattr(matrix_module, "MAX_CHUNK_ELEMENTS", TileSize(most, most))
    chunks = list(form.patches(x, y))
    assert all(patches.numel() <= max(most, form.groups * form.cols) for patches, _ in chunks)
    assert all(torch.equal(a, b) for a, b in zip(joined(chunks), whole, strict=True))


def test_chunks_cut_samples_before_rows(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    form = matrix_layer(nn.Conv2d(1, 1, 1))
    x = torch.zeros(5, 1, 4, 6, device=device)
    monkeypatch.setattr(matrix_module, "MAX_CHUNK_ELEMENTS", TileSize(2 * 24, 2 * 24))
    assert [patches.shape[-1] for patches, _ in form.patches(x)] == [48, 48, 24]
    # Drawn positions are few, but no more of the input is padded at a time.
    drawn = form.patches(x, positions=1, generator=torch.Generator())
    assert [patches.shape[-1] for patches, _ in drawn] == [2, 2, 1]
    monkeypatch.setattr(matrix_module, "MAX_CHUNK_ELEMENTS", TileSize(20, 20))
    assert [patches.shape[-1] for patches, _ in form.patches(x)] == [18, 6] * 5


def test_linear_patches_are_a_view(device: torch.device) -> None:
    _, form, x = make("linear", device)
    ((patches, _),) = form.patches(form.samples(x))
    assert patches.data_ptr() == x.data_ptr()
    assert torch.equal(patches[0], x.t())


@pytest.mark.parametrize("most", [1, 100, 1000, 2**23])
@pytest.mark.parametrize("name", [CONV, "conv1d", "transposed2d-groups", "conv3d-dilated"])
def test_positions(
    name: str, most: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, form, x = make(name, device)
    x, y = form.samples(x), form.output_samples(layer(x))
    everything, _ = joined(list(form.patches(x, y)))
    monkeypatch.setattr(matrix_module, "MAX_CHUNK_ELEMENTS", TileSize(most, most))

    def draw(seed: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return joined(list(form.patches(x, y, positions=3, generator=generator)))

    patches, outputs = draw(0)
    assert patches.shape[-1] == 3 * len(x)
    bias = layer.bias.view(form.groups, -1, 1)
    torch.testing.assert_close(grouped_weight(form) @ patches + bias, outputs)
    # Each drawn column is one of its sample's columns, later than the one drawn before.
    columns = everything.flatten(0, 1).T.reshape(len(x), -1, form.groups * form.cols)
    for sample, drawn in zip(columns, patches.flatten(0, 1).T.split(3), strict=True):
        found = [(sample == column).all(dim=1).nonzero() for column in drawn]
        assert all(len(matches) == 1 for matches in found)
        assert all(int(a) < int(b) for a, b in pairwise(found))
    assert all(torch.equal(a, b) for a, b in zip(draw(0), (patches, outputs), strict=True))
    assert not torch.equal(draw(1)[0], patches)


def test_positions_are_uniform_and_use_no_global_randomness(device: torch.device) -> None:
    form = matrix_layer(nn.Conv1d(1, 1, 1))
    x = torch.arange(10.0, device=device).expand(4000, 1, 10)
    before = torch.get_rng_state()
    generator = torch.Generator().manual_seed(0)
    ((patches, _),) = form.patches(x, positions=3, generator=generator)
    counts = patches.flatten().long().bincount(minlength=10)
    # Each position is drawn by 1200 samples, give or take a standard deviation of 29.
    assert ((counts - 1200).abs() < 5 * 29).all()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["linear", "conv1d", CONV])
def test_positions_no_fewer_than_there_are_change_nothing(name: str, device: torch.device) -> None:
    layer, form, x = make(name, device)
    x, y = form.samples(x), form.output_samples(layer(x))
    positions = 1 if name == "linear" else y[0, 0].numel()
    some = joined(list(form.patches(x, y, positions=positions)))
    assert all(
        torch.equal(a, b) for a, b in zip(some, joined(list(form.patches(x, y))), strict=True)
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["linear", CONV, "transposed2d-stride"])
def test_dtype_is_that_of_the_input(name: str, dtype: torch.dtype, device: torch.device) -> None:
    layer, form, x = make(name, device)
    x = x.to(dtype)
    assert form.forward(x, layer.weight, layer.bias).dtype == dtype
    assert all(patches.dtype == dtype for patches, _ in form.patches(form.samples(x)))


@pytest.mark.parametrize("name", ["linear-3d", CONV, "conv2d-circular", "transposed2d-groups"])
def test_forward_is_differentiable(name: str, device: torch.device) -> None:
    layer, form, x = make(name, device)
    layer(x).square().sum().backward()
    matrix = form.weight_matrix().requires_grad_()
    form.forward(x, form.weight_from_matrix(matrix), layer.bias).square().sum().backward()
    torch.testing.assert_close(form.weight_from_matrix(matrix.grad), layer.weight.grad)


@pytest.mark.parametrize("name", ["linear-3d", CONV, "transposed2d-groups"])
def test_layer_and_input_stay_unchanged(name: str, device: torch.device) -> None:
    layer, form, x = make(name, device)
    x.requires_grad_()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    inputs = x.detach().clone()
    y = layer(x)
    outputs = y.detach().clone()
    chunks = list(form.patches(form.samples(x), form.output_samples(y)))
    form.forward(x, form.weight_from_matrix(form.weight_matrix() + 1), None)
    assert not any(tensor.requires_grad for chunk in chunks for tensor in chunk)
    assert form.layer is layer and layer.training
    assert torch.equal(x, inputs) and torch.equal(y, outputs)
    assert all(torch.equal(layer.state_dict()[key], value) for key, value in state.items())
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_channels_last_and_strided_inputs(device: torch.device) -> None:
    layer, form, x = make("conv2d-groups", device)
    ((expected, _),) = form.patches(x)
    strided = x.repeat_interleave(2, dim=-1)[..., ::2]
    for same in (x.to(memory_format=torch.channels_last), strided):
        ((patches, _),) = form.patches(form.samples(same))
        assert torch.equal(patches, expected)
    matrix = form.weight_matrix()
    layer.to(memory_format=torch.channels_last)
    assert torch.equal(form.weight_matrix(), matrix) and form.weight_matrix().is_contiguous()


@pytest.mark.parametrize("name", ["linear", CONV, "transposed2d-stride"])
def test_no_samples_give_no_chunks(name: str, device: torch.device) -> None:
    _, form, x = make(name, device)
    assert list(form.patches(form.samples(x[:0]))) == []
    generator = torch.Generator()
    assert list(form.patches(form.samples(x[:0]), positions=2, generator=generator)) == []
