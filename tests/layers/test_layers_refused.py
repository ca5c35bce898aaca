"""Layers, inputs and targets that matrix_layer takes or refuses."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from adaround_ext.layers.matrix import matrix_layer
from tests.layers.test_matrix import CONV, make

# PyTorch says that it pads more on one side then, which is what is tested.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")


def test_subclasses_are_taken() -> None:
    class Odd(nn.Conv2d):
        pass

    assert matrix_layer(Odd(2, 3, 3)).cols == 18
    assert matrix_layer(nn.MultiheadAttention(4, 2).out_proj).rows == 4


@pytest.mark.parametrize("layer", [nn.Embedding(3, 4), nn.LazyLinear(3), nn.LazyConv2d(3, 3)])
def test_unsupported_layers(layer: nn.Module) -> None:
    names = "Linear, Conv1d, Conv2d, Conv3d, ConvTranspose1d, ConvTranspose2d, ConvTranspose3d"
    message = f"layer must be one of {names}, got {type(layer).__name__}"
    with pytest.raises(TypeError, match=message):
        matrix_layer(layer)


def test_unsupported_weights() -> None:
    normed = parametrizations.spectral_norm(nn.Linear(3, 4))
    state = {key: value.clone() for key, value in normed.state_dict().items()}
    pruned = prune.random_unstructured(nn.Linear(3, 4), "weight", amount=0.5)
    for layer in (normed, pruned):
        with pytest.raises(ValueError, match="own its weight as a parameter, got a computed one"):
            matrix_layer(layer)
    assert all(torch.equal(normed.state_dict()[key], value) for key, value in state.items())

    integer = nn.Linear(3, 4)
    integer.weight = nn.Parameter(torch.ones(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match=r"dtype float32, .*, got torch\.int8"):
        matrix_layer(integer)
    with pytest.raises(ValueError, match="weight that holds data, got a meta tensor"):
        matrix_layer(nn.Linear(3, 4, device="meta"))
    empty = nn.Linear(3, 4)
    empty.weight = nn.Parameter(torch.empty(0, 3))
    with pytest.raises(ValueError, match=r"weight that holds data, got shape \[0, 3\]"):
        matrix_layer(empty)
    with pytest.raises(TypeError, match=r"dtype float32, .*, got torch\.float8_e4m3fn"):
        matrix_layer(nn.Linear(3, 4).to(torch.float8_e4m3fn))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(3, 4), (3, 4)),
        (nn.Linear(3, 4), (12,)),
        (nn.Conv1d(4, 6, 3, groups=2), (6, 4, 3)),
        (nn.ConvTranspose2d(4, 6, 3), (6, 4, 3, 3)),
    ],
)
def test_weights_that_are_not_what_the_sizes_say(layer: nn.Module, shape: tuple[int, ...]) -> None:
    own = list(layer.weight.shape)
    layer.weight = nn.Parameter(torch.randn(shape))
    message = f"weight of shape {own}, as its sizes say, got {list(shape)}"
    with pytest.raises(ValueError, match=re.escape(message)):
        matrix_layer(layer)


def test_biases_that_are_not_what_the_sizes_say() -> None:
    layer = nn.Linear(3, 4)
    layer.bias = nn.Parameter(torch.randn(1))
    with pytest.raises(ValueError, match=r"bias of shape \[4\], as its sizes say, got \[1\]"):
        matrix_layer(layer)


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("linear", (2, 4), r"have 5 features in their last dimension, got shape \[2, 4\]"),
        ("linear", (), r"have 5 features in their last dimension, got shape \[\]"),
        ("conv2d", (2, 4, 5, 6), r"be \[samples, 3, \*size\] or \[3, \*size\] with 2 spatial"),
        ("conv2d", (2, 1, 3, 5, 6), r"with 2 spatial dimensions, got shape \[2, 1, 3, 5, 6\]"),
        ("conv2d", (3, 5), r"with 2 spatial dimensions, got shape \[3, 5\]"),
        ("transposed1d", (2, 3, 5), r"\[samples, 4, \*size\] .* got shape \[2, 3, 5\]"),
    ],
)
def test_wrong_input_shapes(name: str, shape: tuple[int, ...], message: str) -> None:
    _, form, _ = make(name, torch.device("cpu"))
    with pytest.raises(ValueError, match="inputs must .*" + message):
        form.samples(torch.zeros(shape))


@pytest.mark.parametrize(
    ("name", "shape"),
    [("conv2d-no-bias", (2, 3, 2, 6)), ("conv2d", (2, 3, 0, 6)), ("transposed2d", (2, 4, 1, 0))],
)
def test_too_small_inputs(name: str, shape: tuple[int, ...]) -> None:
    _, form, _ = make(name, torch.device("cpu"))
    with pytest.raises(ValueError, match="inputs must be large enough for one output"):
        form.samples(torch.zeros(shape))


def test_wrong_targets() -> None:
    layer, form, x = make("conv2d", torch.device("cpu"))
    y = layer(x)
    with pytest.raises(ValueError, match=r"targets must be \[samples, 4, \*size\]"):
        form.output_samples(x)
    for wrong in (y[:1], y[..., 1:]):
        with pytest.raises(ValueError, match=r"targets must have shape \[2, 4, 5, 6\] for inputs"):
            form.patches(x, wrong)
    layer, form, x = make("linear", torch.device("cpu"))
    with pytest.raises(ValueError, match="targets must have 3 features"):
        form.output_samples(x)
    with pytest.raises(ValueError, match=r"must have shape \[7, 3\] for inputs .* \[6, 3\]"):
        form.patches(x, layer(x)[1:])


def test_wrong_positions() -> None:
    _, form, x = make(CONV, torch.device("cpu"))
    with pytest.raises(ValueError, match="positions must be at least 1, got 0"):
        form.patches(x, positions=0, generator=torch.Generator())
    with pytest.raises(ValueError, match="generator must be given to draw positions, got None"):
        form.patches(x, positions=1)


def test_wrong_matrix() -> None:
    _, form, _ = make("transposed2d-groups", torch.device("cpu"))
    with pytest.raises(ValueError, match=r"matrix must have shape \[6, 18\], got \[18, 6\]"):
        form.weight_from_matrix(torch.zeros(18, 6))
