"""Layers as matrix products: the weight as a matrix, the inputs as patches, and back.

A linear layer or a convolution, without its bias, is `weight @ patches`: the weight as
[rows, cols] times the piece of the input that each output position sees. With groups it is that
product once per group. A transposed convolution is an ordinary one with a flipped kernel over an
input spread out with zeros (Dumoulin and Visin, "A guide to convolution arithmetic for deep
learning", 2016, section 4).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from math import prod

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.lazy import LazyModuleMixin

from adaround_ext.layers.positions import draw_positions, tiles_of
from adaround_ext.linalg.tiles import TileSize

# 32 MiB of float32: little next to a model, enough for a matrix product at full speed; 512 MiB on a
# GPU, where adding up the products of small chunks would take longer than the products.
# Sums over patches are made chunk by chunk, so another value changes their last bits.
MAX_CHUNK_ELEMENTS = TileSize(cpu=2**23, cuda=2**27)


class MatrixLayer:
    """A layer seen as a matrix product; immutable, and it never changes the layer.

    `rows` are all output channels, `cols` is C_in / groups times the kernel volume. For x from
    `samples`, `forward(x, weight, None)` laid out as [groups, rows / groups, n] equals
    `weight_matrix().view(groups, rows / groups, cols) @ patches`, in one position order: samples,
    then the output's spatial dimensions, the last one fastest.

    This class is a Linear, which has no spatial dimensions; the convolutions extend it.
    """

    def __init__(self, layer: nn.Module, rows: int, channels: int, *kernel: int, groups: int = 1):
        self.layer = layer
        self.rows = rows
        self.cols = channels // groups * prod(kernel)
        self.groups = groups
        self._function: Callable[[Tensor, Tensor, Tensor | None], Tensor] = F.linear
        self._channels = channels
        self._shape = (rows, channels // groups, *kernel)

    @property
    def weight(self) -> Tensor:
        """The layer's own weight, detached; not a copy."""
        return self.layer.get_parameter("weight").detach()

    @property
    def bias(self) -> Tensor | None:
        """The layer's own bias, detached, or None."""
        bias = getattr(self.layer, "bias", None)
        return bias.detach() if isinstance(bias, Tensor) else None

    @property
    def geometry(self) -> tuple[object, ...]:
        """Everything that decides the patches: layers equal in it see the same ones."""
        return (self._channels, self.groups, self.cols)

    def weight_matrix(self) -> Tensor:
        """A detached, contiguous copy of the layer's weight as [rows, cols], in its dtype."""
        weight = self._reorder(self.weight)
        return weight.reshape(self.rows, self.cols).clone(memory_format=torch.contiguous_format)

    def weight_from_matrix(self, matrix: Tensor) -> Tensor:
        """The matrix [rows, cols] in the shape of the layer's weight; it may share memory.

        ValueError for another shape.
        """
        if matrix.shape != (self.rows, self.cols):
            rule = f"matrix must have shape [{self.rows}, {self.cols}]"
            raise ValueError(f"{rule}, got {list(matrix.shape)}")
        return self._reorder(matrix.reshape(self._shape))

    def samples(self, x: Tensor) -> Tensor:
        """Inputs as `patches` takes them: [tokens, in] or [samples, channels, *size].

        The leading dimensions of a Linear's input are flattened; a convolution's unbatched input
        becomes one sample. ValueError for a shape that the layer does not take.
        """
        x = self._batched(x, self._channels, "inputs")
        if min((*x.shape[2:], *self.output_size(x)), default=1) < 1:
            rule = "inputs must be large enough for one output position"
            raise ValueError(f"{rule}, got shape {list(x.shape)}")
        return x

    def output_samples(self, y: Tensor) -> Tensor:
        """The same for the layer's outputs, or targets of their shape."""
        return self._batched(y, self.rows, "targets")

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The layer's output, in x's dtype, for a weight in the layer's own shape and a bias.

        Differentiable in all three.
        """
        return self._function(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def patches(
        self,
        x: Tensor,
        outputs: Tensor | None = None,
        *,
        positions: int | None = None,
        generator: torch.Generator | None = None,
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Yield (patches [groups, cols, n], outputs [groups, rows / groups, n] or None) in chunks.

        x comes from `samples`, outputs from `output_samples`; dtypes are kept. A chunk of patches
        has at most MAX_CHUNK_ELEMENTS elements, or one position. Chunks come in position order and
        depend on shapes only. They may share memory with x and outputs: do not write to them.

        With `positions`, each sample gives at most that many of its output positions, drawn
        without replacement by `generator` and in order. A Linear's token is one position.

        ValueError where outputs do not fit x, positions is below 1, or generator is missing.
        """
        size = self.output_size(x)
        expected = [len(x), self.rows, *size]
        if outputs is not None and list(outputs.shape) != expected:
            rule = f"targets must have shape {expected} for inputs of shape {list(x.shape)}"
            raise ValueError(f"{rule}, got {list(outputs.shape)}")
        if positions is not None and positions < 1:
            raise ValueError(f"positions must be at least 1, got {positions}")
        drawn = None
        if positions is not None and positions < prod(size):
            if generator is None:
                raise ValueError("generator must be given to draw positions, got None")
            drawn = draw_positions(len(x), prod(size), positions, generator).to(x.device)
        return self._chunks(x.detach(), None if outputs is None else outputs.detach(), size, drawn)

    def _chunks(
        self, x: Tensor, outputs: Tensor | None, size: Sequence[int], drawn: Tensor | None
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """`patches` of all positions, or of the drawn ones [samples, positions]."""
        lengths = (len(x), *(size if drawn is None else drawn.shape[1:]))
        # The padded input is bounded too: few positions may be drawn of a large one.
        elements = MAX_CHUNK_ELEMENTS.on(x.device)
        padded = max(1, elements // (self._channels * prod(self._padded_size(x))))
        most = min(elements // (self.groups * self.cols), padded * prod(lengths[1:]))
        batches, *tiles = tiles_of(lengths, most)
        for batch in batches:
            windows = self._windows(x[batch])
            targets = None if outputs is None else outputs[batch].transpose(0, 1)
            for tile in product(*tiles):
                where: tuple[slice | Tensor, ...] = (slice(None), *tile)
                if drawn is not None:
                    flat = drawn[batch][where]
                    sample = torch.arange(len(flat), device=flat.device).unsqueeze(1)
                    where = (sample, *torch.unravel_index(flat, size))
                seen = windows[(..., *where)].reshape(self.groups, self.cols, -1)
                if targets is None:
                    yield seen, None
                else:
                    yield seen, targets[(..., *where)].reshape(self.groups, -1, seen.shape[-1])

    def _batched(self, x: Tensor, channels: int, name: str) -> Tensor:
        """x with one batch dimension, its shape checked."""
        if x.dim() == 0 or x.shape[-1] != channels:
            rule = f"{name} must have {channels} features in their last dimension"
            raise ValueError(f"{rule}, got shape {list(x.shape)}")
        return x.reshape(-1, channels)

    def _padded_size(self, x: Tensor) -> Sequence[int]:
        """Spatial size of what the windows move over."""
        return ()

    def output_size(self, x: Tensor) -> Sequence[int]:
        """Spatial size of the layer's output."""
        return ()

    def _windows(self, x: Tensor) -> Tensor:
        """What each output position sees: a view [channels, *kernel, samples, *output size]."""
        return x.t()

    def _reorder(self, weight: Tensor) -> Tensor:
        """The layer's weight as [rows, C_in / groups, *kernel], and that one back."""
        return weight


class _Conv(MatrixLayer):
    """The input is spread (entries `spread` apart, zeros between, `extra` zeros at the end) and
    padded (before, after); windows of taps `dilation` apart then move over it by `stride`.
    """

    def __init__(self, layer: nn.modules.conv._ConvNd) -> None:
        kernel, channels = layer.kernel_size, layer.in_channels
        super().__init__(layer, layer.out_channels, channels, *kernel, groups=layer.groups)
        self._spread, self._extra = (1,) * len(kernel), layer.output_padding
        self._dilation, self._stride = layer.dilation, layer.stride
        self._reach = [d * (k - 1) for d, k in zip(layer.dilation, kernel, strict=True)]
        if layer.padding == "same":  # the larger half of an odd total comes after
            self._pads = [(reach // 2, reach - reach // 2) for reach in self._reach]
        else:
            padding = [0] * len(kernel) if layer.padding == "valid" else layer.padding
            self._pads = [(int(p), int(p)) for p in padding]
        self._mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
        self._function = layer._conv_forward  # the one place that knows all padding modes

    @property
    def geometry(self) -> tuple[object, ...]:
        window = (self._reach, self._dilation, self._stride, self._spread, self._extra, self._pads)
        return (*super().geometry, self._mode, *(tuple(values) for values in window))

    def _batched(self, x: Tensor, channels: int, name: str) -> Tensor:
        dims = len(self._reach)
        if x.dim() not in (dims + 1, dims + 2) or x.shape[-dims - 1] != channels:
            rule = f"{name} must be [samples, {channels}, *size] or [{channels}, *size]"
            got = f"got shape {list(x.shape)}"
            raise ValueError(f"{rule} with {dims} spatial dimensions, {got}")
        return x if x.dim() == dims + 2 else x.unsqueeze(0)

    def _padded_size(self, x: Tensor) -> Sequence[int]:
        dims = zip(x.shape[2:], self._spread, self._extra, self._pads, strict=True)
        return [n * spread + extra + sum(pads) for n, spread, extra, pads in dims]

    def output_size(self, x: Tensor) -> Sequence[int]:
        dims = zip(self._padded_size(x), self._reach, self._stride, strict=True)
        return [(n - reach - 1) // stride + 1 for n, reach, stride in dims]

    def _windows(self, x: Tensor) -> Tensor:
        x = x.contiguous()  # windows of a channels-last input copy slowly
        if max(self._spread) > 1 or any(self._extra):
            x = self._spread_out(x)
        if any(map(any, self._pads)):
            x = F.pad(x, [p for pads in reversed(self._pads) for p in pads], self._mode)
        dims = len(self._reach)
        for i in range(dims):
            x = x.unfold(i + 2, self._reach[i] + 1, self._stride[i])[..., :: self._dilation[i]]
        # From [samples, channels, *output size, *kernel].
        return x.permute(1, *range(dims + 2, 2 * dims + 2), 0, *range(2, dims + 2))

    def _spread_out(self, x: Tensor) -> Tensor:
        dims = list(zip(x.shape[2:], self._spread, self._extra, strict=True))
        spread = x.new_zeros(*x.shape[:2], *(n * step + extra for n, step, extra in dims))
        entries = (slice(0, n * step, step) for n, step, _ in dims)
        spread[(slice(None), slice(None), *entries)] = x
        return spread


class _ConvTranspose(_Conv):
    def __init__(self, layer: nn.modules.conv._ConvTransposeNd) -> None:
        super().__init__(layer)
        self._spread, self._stride = self._stride, self._spread
        # Cropped are the layer's padding and the spread - 1 zeros after the last entry.
        padding = [p for p, _ in self._pads]
        dims = zip(self._reach, padding, self._spread, strict=True)
        self._pads = [(reach - p, reach - p - spread + 1) for reach, p, spread in dims]
        self._function = partial(
            (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[len(self._reach) - 1],
            stride=layer.stride,
            padding=padding,
            output_padding=layer.output_padding,
            groups=layer.groups,
            dilation=layer.dilation,
        )

    def _reorder(self, weight: Tensor) -> Tensor:
        # [in, out / groups, *kernel] to [out, in / groups, *kernel]; the same steps lead back.
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:]).transpose(1, 2)
        return grouped.flatten(0, 1).flip(*range(2, weight.dim()))


_CONV = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_CONV_TRANSPOSE = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SUPPORTED = (nn.Linear, *_CONV, *_CONV_TRANSPOSE)


def matrix_layer(layer: nn.Module) -> MatrixLayer:
    """See a Linear, Conv or ConvTranspose layer (or a subclass) as a matrix product.

    TypeError for another module and for a weight of another dtype than _DTYPES; ValueError for a
    weight that is computed (parametrized, pruned), holds no data, is empty, or not of the shape
    that the layer's sizes say, as its bias.
    """
    if not isinstance(layer, SUPPORTED) or isinstance(layer, LazyModuleMixin):
        names = ", ".join(kind.__name__ for kind in SUPPORTED)
        raise TypeError(f"layer must be one of {names}, got {type(layer).__name__}")
    # Reading layer.weight would run a parametrization, which may change the layer.
    weight = dict(layer.named_parameters(recurse=False)).get("weight")
    if weight is None:
        raise ValueError("layer must own its weight as a parameter, got a computed one")
    if weight.dtype not in _DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
        raise TypeError(f"layer must have a weight of dtype {names}, got {weight.dtype}")
    if weight.is_meta or weight.numel() == 0:
        got = "a meta tensor" if weight.is_meta else f"shape {list(weight.shape)}"
        raise ValueError(f"layer must have a weight that holds data, got {got}")
    if isinstance(layer, nn.Linear):
        matrix = MatrixLayer(layer, layer.out_features, layer.in_features)
    else:
        matrix = _ConvTranspose(layer) if isinstance(layer, _CONV_TRANSPOSE) else _Conv(layer)
    _check_shapes(matrix)
    return matrix


def _check_shapes(matrix: MatrixLayer) -> None:
    """A parameter may have been replaced by one that the layer's own sizes do not know of."""
    by_sizes = torch.empty(matrix.rows, matrix.cols, device="meta")
    shapes = {"weight": matrix.weight_from_matrix(by_sizes).shape, "bias": (matrix.rows,)}
    for name, shape in shapes.items():
        tensor = matrix.weight if name == "weight" else matrix.bias
        if tensor is not None and tensor.shape != shape:
            rule = f"layer must have a {name} of shape {list(shape)}, as its sizes say"
            raise ValueError(f"{rule}, got {list(tensor.shape)}")
